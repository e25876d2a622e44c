"""Token shards by number: a set of pre-tokenised tars as a deterministic map from draw number to row."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from unidiff.addresses import is_remote, local_path
from unidiff.data import report
from unidiff.data.manifest import Stamp, TokenManifest, token_stamp
from unidiff.data.members import MemberError, decode_member
from unidiff.data.report import Skip, SkipReport, printable
from unidiff.data.sources import check_scheme, expand_shards, is_shard_name, split_patterns
from unidiff.data.tar import read_shard
from unidiff.tokens import Vocabulary

_LOG = logging.getLogger(__name__)
_TOGETHER = 8  # shards whose rows are shuffled together
_KEPT = 3 * _TOGETHER  # decoded shards held in memory

Pairs = tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class TokenRow:
    """codes int32 `[h, w]`, caption int32 `[T]`, and (questions int32 `[Q, T]`, answer starts int32 `[Q]`) or None."""

    codes: Tensor
    caption: Tensor
    pairs: Pairs


@dataclass(frozen=True)
class DocumentRow:
    """tokens int32 `[n]`, and int64 `[k]`, where images of a whole grid of codes begin in it, ascending."""

    tokens: Tensor
    images: Tensor


Row = TypeVar("Row", TokenRow, DocumentRow)


@dataclass(frozen=True)
class RowKind(Generic[Row]):
    """Rows of a `TokenManifest.kind`: the members that a sample must have, and how they are read.

    `decode(raw, layout)` raises `MemberError` for members that do not fit the layout.
    """

    name: str
    members: tuple[tuple[str, ...], ...]
    decode: Callable[[dict[str, Any], TokenManifest], Row]


@dataclass(eq=False)
class TokenSet(Generic[Row]):
    """Rows of one list of token shards, addressed by draw number; shards are decoded when needed and kept for a while.

    Args:
        urls: the shards.
        counts: rows of each, from the manifest.
        layout: their common manifest.
        seed: of the order.
        account: gets an entry for every row that can no longer be read.
        kind: what the rows are.
        stamps: what each shard was known by when it was written (`token_stamp`); empty where that is unknown.
        held_out: rows at the end that are not in use.
    """

    urls: list[str]
    counts: list[int]
    layout: TokenManifest
    seed: int
    account: SkipReport
    kind: RowKind[Row]
    stamps: list[Stamp]
    held_out: int = 0
    _reported: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.total = sum(self.counts) - self.held_out
        self._starts = np.cumsum([0, *self.counts])
        self._shards: OrderedDict[int, list[Row]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def draw(self, number: int) -> Row:
        """Row of draw `number`: every epoch permutes shards, and rows among `_TOGETHER` of them."""
        epoch, place = divmod(number, self.total)
        order, starts = self._epoch(epoch)
        group = (int(np.searchsorted(starts, place, side="right")) - 1) // _TOGETHER
        first = group * _TOGETHER
        begin = int(starts[first])
        end = int(starts[min(first + _TOGETHER, len(order))])
        place = begin + int(self._within(epoch, group, end - begin)[place - begin])
        position = int(np.searchsorted(starts, place, side="right")) - 1
        return self.row(int(order[position]), place - int(starts[position]))

    def row(self, shard: int, row: int) -> Row:
        """A row; a lost one is replaced by another of the shard, or of the next shard that has any.

        Raises:
            ValueError: no row in use can be read.
        """
        for step in range(len(self.urls)):
            candidate = (shard + step) % len(self.urls)
            rows = self._load(candidate)
            usable = min(len(rows), self._in_use(candidate))  # a held-out row never stands in for another
            if usable:
                return rows[row % usable]
        raise ValueError(f"none of {len(self.urls)} token shards can be read; {self.account.brief()}")

    def hold_out(self, count: int) -> tuple[TokenSet[Row], list[Row]]:
        """The set without its last `count` rows, and those rows.

        Raises:
            ValueError: nothing would be left.
        """
        if count >= self.total:
            raise ValueError(f"holding out {count} rows leaves nothing of {self.total}; use fewer validation rows")
        places = range(self.total - count, self.total)
        shards = [int(np.searchsorted(self._starts, place, side="right")) - 1 for place in places]
        rows = [self.row(shard, place - int(self._starts[shard])) for shard, place in zip(shards, places, strict=True)]
        return replace(self, held_out=self.held_out + count), rows

    def seeded(self, seed: int) -> TokenSet[Row]:
        """The same rows in another order."""
        return replace(self, seed=seed)

    def _in_use(self, shard: int) -> int:
        """Rows of a shard that are not held out."""
        return int(np.clip(self.total - self._starts[shard], 0, self.counts[shard]))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            order: np.ndarray = _generator(self.seed, epoch, 0).permutation(len(self.urls))
            starts = np.cumsum([0, *(self._in_use(int(shard)) for shard in order)])
            _remember(self._epochs, epoch, (order, starts), 2)
        return self._epochs[epoch]

    def _within(self, epoch: int, group: int, count: int) -> np.ndarray:
        if (epoch, group) not in self._groups:
            _remember(self._groups, (epoch, group), _generator(self.seed, epoch, group + 1).permutation(count), 4)
        return self._groups[epoch, group]

    def _load(self, shard: int) -> list[Row]:
        if shard not in self._shards:
            found: list[Row] = []
            skips: list[Skip] = []
            for item in read_shard(self.urls[shard], self.kind.members):
                try:
                    skips.append(item) if isinstance(item, Skip) else found.append(self.kind.decode(item, self.layout))
                except MemberError as error:
                    skips.append(Skip(error.reason, item["__url__"], item["__key__"], str(error)))  # type: ignore[index]
            if shard not in self._reported:
                self._reported.add(shard)
                skips = skips or self._changed(shard, len(found))
                for skip in skips:
                    self.account.add(skip)
                    then = "is used" if skip.reason == report.CHANGED_SHARD else "other rows take its place"
                    _LOG.warning("token shards: %s; %s", skip, then)
            _remember(self._shards, shard, found, _KEPT)
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def _changed(self, shard: int, rows: int) -> list[Skip]:
        """An entry for a shard that can be read but is not the one that was written."""
        url, wanted = self.urls[shard], self.stamps[shard]
        words = ""
        if rows != self.counts[shard]:
            words = f"{rows} rows in place of {self.counts[shard]}"
        elif wanted and not is_remote(url) and token_stamp(local_path(url)) != wanted:
            words = "not the file that was written"
        return [Skip(report.CHANGED_SHARD, printable(url), "", words)] if words else []


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
        raise MemberError(
            report.BAD_ARRAY,
            f"{len(tokens)} tokens with images at {images.tolist()} are no document of up to {layout.text_length} tokens "
            f"with images of {size}",
        )
    inside = np.zeros(len(tokens), dtype=bool)
    for start in images:
        inside[start : start + size] = True
    for name, part, limit in (
        ("text", tokens[~inside], vocabulary.text_size),
        ("image", tokens[inside], vocabulary.image_size),
    ):
        if part.size and int(part.max()) >= limit:
            raise MemberError(report.BAD_ARRAY, f"tokens.npy has {name} id {part.max()}, outside 0..{limit - 1}")
    return DocumentRow(torch.from_numpy(tokens), torch.from_numpy(images))


PAIRS = RowKind("pairs", (("codes.npy",), ("text.npy",)), _pair)
DOCUMENTS = RowKind("documents", (("tokens.npy",), ("images.npy",)), _document)


def open_token_set(pattern: str, seed: int, account: SkipReport, kind: RowKind[Row]) -> TokenSet[Row]:
    """Open the shards that one pattern names.

    A folder (or a URL that ends in `/`) stands for every shard in its manifest, whether or not the file still exists.

    Raises:
        FileNotFoundError: shards without `tokens.json`.
        ValueError: a refused source, shards of different layout or of another kind, or no rows.
    """
    manifests: dict[str, TokenManifest] = {}
    counts: list[int] = []
    stamps: list[Stamp] = []
    urls = token_shards(pattern)
    for url in urls:
        folder, name = folder_of(url), url.rsplit("/", 1)[-1]
        manifest = manifests.get(folder) or TokenManifest.load(folder)
        if manifest.kind != kind.name:
            where = {"pairs": "data.train", "documents": "data.documents"}[manifest.kind]
            raise ValueError(f"{url!r} holds {manifest.kind}, not {kind.name}; name it in {where}")
        if manifests and manifest.layout() != next(iter(manifests.values())).layout():
            raise ValueError(f"{url!r} has another vocabulary, grid or text length than the shards before it")
        if name not in manifest.shards:
            raise ValueError(f"{url!r} is not listed in its folder's tokens.json; encode it again")
        manifests[folder] = manifest
        counts.append(manifest.shards[name])
        stamps.append(manifest.files.get(name, {}))
    if not sum(counts):
        raise ValueError(f"{pattern!r} holds no rows")
    layout = replace(manifests[folder_of(urls[-1])], questions=sum(m.questions for m in manifests.values()))
    return TokenSet(urls, counts, layout, seed, account, kind, stamps)


def full_report() -> SkipReport:
    """For what is lost while training: all by name, since several processes tell each other, and none may count twice."""
    return SkipReport(listed=10**9)


def encoding_reports(sets: Iterable[TokenSet[Any]]) -> dict[str, SkipReport]:
    """What the encoding of these sets left out, by folder of token shards; folders from which nothing is missing are left out."""
    folders = {folder_of(url) for part in sets for url in part.urls}
    skipped = {folder: TokenManifest.load(folder).skipped for folder in sorted(folders)}
    return {folder: SkipReport.from_state_dict(state) for folder, state in skipped.items() if state}


def stamp_of(part: TokenSet[Any]) -> list[Any]:
    """What a set is known by later, as plain data: its layout, rows in use, shards and their
    content as written, and the fingerprints of their manifests."""
    manifests = [TokenManifest.load(folder) for folder in sorted({folder_of(url) for url in part.urls})]
    layout, shards = manifests[0], [url.rsplit("/", 1)[-1] for url in part.urls]
    about = [layout.vocabulary, layout.text_prefix, part.layout.text_length, list(layout.grid), part.layout.questions]
    content = [stamp.get("hash") for stamp in part.stamps]
    return [*about, part.total, shards, part.counts, [m.fingerprint for m in manifests], content]


def token_shards(pattern: str) -> list[str]:
    """As `expand_shards`, with folders expanded by their manifests.

    Raises:
        FileNotFoundError: neither a folder nor the name of a shard; as `TokenManifest.load`.
    """
    urls = []
    for part in split_patterns(pattern):
        check_scheme(part)
        folder = part.rstrip("/")
        if os.path.isdir(local_path(folder)) or part.endswith("/"):
            urls += [f"{folder}/{name}" for name in TokenManifest.load(folder).shards]
        else:
            found = expand_shards(part)
            for url in found:  # a shard may have vanished, but a name that is no shard's is a mistake
                if not is_remote(url) and not is_shard_name(os.path.basename(url)) and not os.path.exists(url):
                    raise FileNotFoundError(f"{url!r} does not exist; expected a folder of token shards, or .tar files")
            urls += found
    return urls


def folder_of(url: str) -> str:
    """The folder of a shard, "" for the current one."""
    return url.rsplit("/", 1)[0] if "/" in url else ""


def _array(raw: dict[str, Any], name: str, shape: tuple[int, ...], limit: int) -> np.ndarray:
    array = decode_member(name, raw[name])
    fits = array.ndim == len(shape) and all(s in (-1, n) for s, n in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in "iu":
        raise MemberError(report.BAD_ARRAY, f"{name} is {array.dtype} {array.shape}; expected integers {shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < limit:
        raise MemberError(report.BAD_ARRAY, f"{name} has ids {array.min()}..{array.max()}, outside 0..{limit - 1}")
    return array.astype(np.int32)


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFF, *key])


def _remember(store: OrderedDict, key: Any, value: Any, most: int) -> None:
    store[key] = value
    while len(store) > most:
        store.popitem(last=False)
