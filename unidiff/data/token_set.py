"""Token shards by number: a set of pre-tokenised tars as a deterministic map from draw number to row."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from unidiff.addresses import in_store, is_remote, local_path
from unidiff.data import report
from unidiff.data.manifest import TokenManifest, token_stamp
from unidiff.data.members import decode_member
from unidiff.data.report import Skip, SkipReport, Unusable, printable
from unidiff.data.sources import check_scheme, expand_shards, is_shard_name, parse_sources, split_patterns
from unidiff.data.tar import read_shard
from unidiff.tokens import Vocabulary

_LOG = logging.getLogger(__name__)
_TOGETHER = 8  # shards whose rows are shuffled together
_KEPT = 3 * _TOGETHER  # decoded shards held in memory


@dataclass(frozen=True)
class TokenRow:
    codes: Tensor  # int32 [h, w]
    caption: Tensor  # int32 [T]
    pairs: tuple[np.ndarray, np.ndarray] | None  # questions int32 [Q, T], answer starts int32 [Q]


@dataclass(frozen=True)
class DocumentRow:
    tokens: Tensor  # int32 [n]
    images: Tensor  # int64 [k], where images of a whole grid of codes begin, ascending


Row = TypeVar("Row", TokenRow, DocumentRow)


@dataclass(frozen=True)
class RowKind(Generic[Row]):
    """Rows of a `TokenManifest.kind`: the members that a sample must have, and how they are read.

    `decode(raw, layout)` raises `Unusable` for members that do not fit the layout. Sets that are mixed must agree in
    vocabulary and grid, and in the length of texts too where `one_length`.
    """

    name: str
    members: tuple[tuple[str, ...], ...]
    decode: Callable[[dict[str, Any], TokenManifest], Row]
    one_length: bool


@dataclass(eq=False)
class TokenSet(Generic[Row]):
    """Rows of one list of token shards, addressed by draw number; shards are decoded when needed and kept for a while.

    A row that can no longer be read gets an entry in `account`.
    """

    urls: list[str]
    manifests: dict[str, TokenManifest]  # by folder, all of the same layout
    seed: int  # of the order
    account: SkipReport
    kind: RowKind[Row]
    held_out: int = 0  # rows at the end that are not in use
    _reported: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        named = [(self.manifests[folder_of(url)], _name_of(url)) for url in self.urls]
        self.counts = [manifest.shards[name] for manifest, name in named]
        self.stamps = [manifest.files.get(name, {}) for manifest, name in named]
        self.layout = next(iter(self.manifests.values()))
        self.questions = sum(manifest.questions for manifest in self.manifests.values())
        self.total = sum(self.counts) - self.held_out
        self._starts = np.cumsum([0, *self.counts])
        self._shards: OrderedDict[int, list[Row]] = OrderedDict()
        self._latest: tuple[int, np.ndarray, np.ndarray] | None = None  # epoch, its order of shards, their first rows

    @staticmethod
    def open(pattern: str, seed: int, account: SkipReport, kind: RowKind[Row]) -> TokenSet[Row]:
        """Open the shards that one pattern names.

        A folder (or a URL that ends in `/`) stands for every shard in its manifest, whether or not the file still exists.

        Raises:
            FileNotFoundError: shards without `tokens.json`.
            ValueError: a refused source, shards of different layout or of another kind, or no rows.
        """
        manifests: dict[str, TokenManifest] = {}
        urls = token_shards(pattern)
        for url in urls:
            if (folder := folder_of(url)) not in manifests:
                manifests[folder] = TokenManifest.load(folder)
            manifest = manifests[folder]
            if manifest.kind != kind.name:
                where = {"pairs": "data.train", "documents": "data.documents"}[manifest.kind]
                raise ValueError(f"{url!r} holds {manifest.kind}, not {kind.name}; name it in {where}")
            if manifest.layout() != next(iter(manifests.values())).layout():
                raise ValueError(f"{url!r} has another vocabulary, grid or text length than the shards before it")
            if _name_of(url) not in manifest.shards:
                raise ValueError(f"{url!r} is not listed in its folder's tokens.json; encode it again")
        found = TokenSet(urls, manifests, seed, account, kind) if urls else None
        if found is None or not found.total:
            raise ValueError(f"{pattern!r} holds no rows")
        return found

    def draw(self, number: int) -> Row:
        """Row of draw `number`: every epoch permutes shards, and rows among `_TOGETHER` of them."""
        epoch, place = divmod(number, self.total)
        order, starts = self._epoch(epoch)
        group = (int(np.searchsorted(starts, place, side="right")) - 1) // _TOGETHER
        first = group * _TOGETHER
        begin = int(starts[first])
        end = int(starts[min(first + _TOGETHER, len(order))])
        place = begin + int(_permutation(self.seed, epoch, group + 1, end - begin)[place - begin])
        position = int(np.searchsorted(starts, place, side="right")) - 1
        return self.row(int(order[position]), place - int(starts[position]))

    def row(self, shard: int, row: int) -> Row:
        """A row; a lost one is replaced by another of the shard, or of the next shard that has any (else ValueError)."""
        for candidate in [*range(shard, len(self.urls)), *range(shard)]:
            rows = self._load(candidate)
            if usable := min(len(rows), self._in_use(candidate)):  # a held-out row never stands in for another
                return rows[row % usable]
        raise ValueError(f"none of {len(self.urls)} token shards can be read; {self.account.brief()}")

    def hold_out(self, count: int) -> tuple[TokenSet[Row], list[Row]]:
        """The set without its last `count` rows, and those rows. Raises ValueError where nothing would be left."""
        if count >= self.total:
            raise ValueError(f"holding out {count} rows leaves nothing of {self.total}; use fewer validation rows")
        places = range(self.total - count, self.total)
        shards = [int(np.searchsorted(self._starts, place, side="right")) - 1 for place in places]
        rows = [self.row(shard, place - int(self._starts[shard])) for shard, place in zip(shards, places, strict=True)]
        return replace(self, held_out=self.held_out + count), rows

    def stamp(self) -> list[Any]:
        """What the set is known by later, as plain data: its layout, rows in use, shards and their content as written, and
        the fingerprints of their manifests."""
        manifests = [self.manifests[folder] for folder in sorted(self.manifests)]
        x, names, content = manifests[0], [_name_of(url) for url in self.urls], [s.get("hash") for s in self.stamps]
        layout: list[Any] = [x.vocabulary, x.text_prefix, x.text_length, list(x.grid), self.questions]
        return [*layout, self.total, names, self.counts, [m.fingerprint for m in manifests], content]

    def _in_use(self, shard: int) -> int:
        """Rows of a shard that are not held out."""
        return int(np.clip(self.total - self._starts[shard], 0, self.counts[shard]))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._latest is None or self._latest[0] != epoch:
            order: np.ndarray = _permutation(self.seed, epoch, 0, len(self.urls))
            self._latest = epoch, order, np.cumsum([0, *(self._in_use(int(shard)) for shard in order)])
        return self._latest[1:]

    def _load(self, shard: int) -> list[Row]:
        if shard not in self._shards:
            found: list[Row] = []
            skips: list[Skip] = []
            for item in read_shard(self.urls[shard], self.kind.members):
                try:
                    skips.append(item) if isinstance(item, Skip) else found.append(self.kind.decode(item, self.layout))
                except Unusable as error:
                    skips.append(Skip(error.reason, item["__url__"], item["__key__"], str(error)))  # type: ignore[index]
            if shard not in self._reported:
                self._reported.add(shard)
                skips = skips or self._changed(shard, len(found))
                for skip in skips:
                    self.account.add(skip)
                    then = "is used" if skip.reason == report.CHANGED_SHARD else "other rows take its place"
                    _LOG.warning("token shards: %s; %s", skip, then)
            self._shards[shard] = found
            if len(self._shards) > _KEPT:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def _changed(self, shard: int, rows: int) -> list[Skip]:
        """An entry for a shard that can be read but is not the one that was written."""
        url, wanted = self.urls[shard], self.stamps[shard]
        if rows != self.counts[shard]:
            return [Skip(report.CHANGED_SHARD, printable(url), "", f"{rows} rows in place of {self.counts[shard]}")]
        if wanted and not is_remote(url) and token_stamp(local_path(url)) != wanted:
            return [Skip(report.CHANGED_SHARD, printable(url), "", "not the file that was written")]
        return []


def _pair(raw: dict[str, Any], layout: TokenManifest) -> TokenRow:
    vocabulary, length = Vocabulary.from_dict(layout.vocabulary), layout.text_length
    codes = torch.from_numpy(_array(raw, "codes.npy", tuple(layout.grid), vocabulary.image_size))
    text = torch.from_numpy(_array(raw, "text.npy", (length,), vocabulary.text_size))
    if "questions.npy" not in raw or "answer_start.npy" not in raw:
        return TokenRow(codes, text, None)
    questions = _array(raw, "questions.npy", (-1, length), vocabulary.text_size)
    starts = _array(raw, "answer_start.npy", (len(questions),), length)
    return TokenRow(codes, text, (questions, starts) if len(questions) else None)


def _document(raw: dict[str, Any], layout: TokenManifest) -> DocumentRow:
    vocabulary, size = Vocabulary.from_dict(layout.vocabulary), layout.grid[0] * layout.grid[1]
    tokens = _array(raw, "tokens.npy", (-1,), max(vocabulary.text_size, vocabulary.image_size))
    images = _array(raw, "images.npy", (-1,), layout.text_length).astype(np.int64)
    ends = np.append(images, len(tokens))
    if not 0 < len(tokens) <= layout.text_length or (np.diff(ends) < size).any():
        found = f"{len(tokens)} tokens with images at {images.tolist()}"
        wanted = f"document of up to {layout.text_length} tokens with images of {size}"
        raise Unusable(report.BAD_ARRAY, f"{found} are no {wanted}")
    inside = np.zeros(len(tokens), dtype=bool)
    for start in images:
        inside[start : start + size] = True
    for name, where, limit in (("text", ~inside, vocabulary.text_size), ("image", inside, vocabulary.image_size)):
        if (largest := tokens.max(where=where, initial=0)) >= limit:
            raise Unusable(report.BAD_ARRAY, f"tokens.npy has {name} id {largest}, outside 0..{limit - 1}")
    return DocumentRow(torch.from_numpy(tokens), torch.from_numpy(images))


PAIRS = RowKind("pairs", (("codes.npy",), ("text.npy",)), _pair, one_length=True)
DOCUMENTS = RowKind("documents", (("tokens.npy",), ("images.npy",)), _document, one_length=False)


def is_tokenised(spec: str | Sequence[str]) -> bool:
    """Whether every set that `spec` names has a `tokens.json`, that is, needs no tokenizers."""
    try:
        for pattern, _ in parse_sources(spec):
            for folder in {folder_of(url) for url in token_shards(pattern)}:
                TokenManifest.load(folder)
    except FileNotFoundError:
        return False
    return True


def token_shards(pattern: str) -> list[str]:
    """As `expand_shards`, with folders expanded by their manifests.

    Raises:
        FileNotFoundError: neither a folder nor the name of a shard; as `TokenManifest.load`.
    """
    urls = []
    for part in split_patterns(pattern):
        check_scheme(part)
        folder = part.rstrip("/")
        stored = in_store(part) and not is_shard_name(folder.rpartition("/")[2])
        if stored or os.path.isdir(local_path(folder)) or part.endswith("/"):
            urls += [f"{folder}/{name}" for name in TokenManifest.load(folder).shards]
            continue
        for url in expand_shards(part):  # a shard may have vanished, but a name that is no shard's is a mistake
            if not is_remote(url) and not is_shard_name(os.path.basename(url)) and not os.path.exists(url):
                raise FileNotFoundError(f"{url!r} does not exist; expected a folder of token shards, or .tar files")
            urls.append(url)
    return urls


def folder_of(url: str) -> str:
    """The folder of a shard, "" for the current one."""
    return url.rpartition("/")[0]


def _name_of(url: str) -> str:
    return url.rpartition("/")[2]


def _array(raw: dict[str, Any], name: str, shape: tuple[int, ...], limit: int) -> np.ndarray:
    array = decode_member(name, raw[name])
    fits = array.ndim == len(shape) and all(s in (-1, n) for s, n in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in "iu":
        raise Unusable(report.BAD_ARRAY, f"{name} is {array.dtype} {array.shape}; expected integers {shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
        raise Unusable(report.BAD_ARRAY, f"{name} has ids {array.min()}..{array.max()}, outside 0..{limit - 1}")
    return array.astype(np.int32)


@lru_cache(maxsize=32)
def _permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed & 0xFFFFFFFF, epoch, stream]).permutation(count)
