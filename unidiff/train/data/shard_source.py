"""Pre-tokenised shards, of pairs (`ShardTokens`, a `TokenSource`) and of documents: a position is a number, so resuming needs
no state."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
import torch
from torch import Tensor

from unidiff.data.encode import PROGRESS, EncodeSettings, encode_shards
from unidiff.data.report import SkipReport
from unidiff.data.sources import MixtureSchedule, expand_shards, parse_sources
from unidiff.data.token_set import DOCUMENTS, PAIRS, DocumentRow, Row, RowKind, TokenRow, TokenSet, is_tokenised
from unidiff.diffusion.noise import keyed_bits
from unidiff.tokens import Span, TokenBatch, Vocabulary
from unidiff.tokens.image.protocols import ImageEncoder
from unidiff.tokens.text import TextTokenizer
from unidiff.train.data.source import TokenRows, TokenTable

_LOG = logging.getLogger(__name__)
_PICK_STREAM = 0x5EED_0002


class WeightedShards(Generic[Row]):
    """Token shards of one kind, one set or several weighted ones.

    Sample i comes from the set that `MixtureSchedule` names, at that set's own draw number; its shards are permuted every
    epoch and rows are shuffled among 8 shards at a time. So sample i does not depend on batch size, rank or history. A row
    that was lost since the shards were written (a cut or vanished tar) is named in `report`, and another takes its place.

    Args:
        sets: (shard pattern, weight) of each set, see `parse_sources`.

    Raises:
        FileNotFoundError: shards without `tokens.json`.
        ValueError: refused sources, sets of different layout, or a set without rows of this kind.
    """

    def __init__(self, sets: Sequence[tuple[str, float]], seed: int, kind: RowKind[Row]) -> None:
        # all by name: several processes tell each other what they lost, and none may count twice
        self.report, self.seed = SkipReport(listed=10**9), seed
        self._sets: list[TokenSet[Row]] = [TokenSet.open(name, seed, self.report, kind) for name, _ in sets]
        self._schedule = MixtureSchedule(tuple(weight for _, weight in sets), seed)
        layouts = [part.layout for part in self._sets]
        common: list[Any] = [x.layout() if kind.one_length else (x.vocabulary, x.grid) for x in layouts]
        if any(other != common[0] for other in common):
            must_agree = "vocabulary, grid or text length" if kind.one_length else "vocabulary or grid"
            raise ValueError(f"the sets {[p for p, _ in sets]} differ in {must_agree}; encode them alike")
        self.vocabulary, self.grid = Vocabulary.from_dict(layouts[0].vocabulary), layouts[0].grid

    @property
    def encoding(self) -> dict[str, SkipReport]:
        """What the encoding of raw shards left out, by folder of token shards; those that miss nothing are left out."""
        manifests = {folder: manifest for part in self._sets for folder, manifest in part.manifests.items()}
        return {f: SkipReport.from_state_dict(m.skipped) for f, m in sorted(manifests.items()) if m.skipped}

    @property
    def rows(self) -> int:
        """Distinct samples, of all sets."""
        return sum(part.total for part in self._sets)

    @property
    def text_length(self) -> int:
        """Tokens of the longest row of text."""
        return max(part.layout.text_length for part in self._sets)

    def stamp(self) -> list[Any]:
        """What the rows are known by later, as plain data."""
        return [*(part.stamp() for part in self._sets), list(self._schedule.weights)]

    def draw(self, index: Tensor) -> list[Row]:
        """The rows of the samples `index` (int64 `[B]`, unbounded)."""
        places = [self._schedule.locate(i) for i in index.tolist()]
        return [self._sets[part].draw(number) for part, number in places]


class DocumentTokens(WeightedShards[DocumentRow]):
    """Pre-tokenised interleaved documents by number; see `WeightedShards`."""

    def __init__(self, spec: str | Sequence[str], seed: int = 0) -> None:
        super().__init__(parse_sources(spec), seed, DOCUMENTS)

    def fetch(self, index: Tensor) -> TokenBatch:
        """The documents `index` (int64 `[B]`, unbounded): all tokens are targets; `[B, length]`, batch padding behind them.

        Every picture has rows and columns of its own; the first position counts through the document.
        """
        return TokenBatch.from_spans([self._spans(row) for row in self.draw(index)], self.text_length)

    def _spans(self, row: DocumentRow) -> list[Span]:
        vocabulary, size, place = self.vocabulary, self.grid[0] * self.grid[1], 0
        tokens, spans = row.tokens.long(), []
        for start in [*row.images.tolist(), len(tokens)]:
            if start > place:
                spans.append(Span.text(tokens[place:start] + vocabulary.text[0]))
            if start < len(tokens):
                codes = tokens[start : start + size].view(self.grid)
                spans.append(Span.image(codes + vocabulary.image[0]))
            place = start + size
        return spans


class ShardTokens(WeightedShards[TokenRow]):
    """Pre-tokenised pairs as a `TokenSource`; see `WeightedShards`. `seed` also picks the question of a sample; one without
    questions gives its caption in place of one."""

    def __init__(self, sets: Sequence[tuple[str, float]], seed: int = 0) -> None:
        super().__init__(sets, seed, PAIRS)
        self.text_prefix = self._sets[0].layout.text_prefix

    @property
    def has_questions(self) -> bool:
        return any(part.questions for part in self._sets)

    def contents(self) -> set[str]:
        """Hashes of the token shards, and of the raw shards behind folders whose token shards are all in use."""
        used = {url for part in self._sets for url in part.urls}
        stamps = [stamp for part in self._sets for stamp in part.stamps]
        for folder, manifest in [held for part in self._sets for held in part.manifests.items()]:
            if used.issuperset(f"{folder}/{name}" if folder else name for name in manifest.shards):
                stamps += manifest.sources.values()
        return {str(stamp["hash"]) for stamp in stamps if "hash" in stamp}

    def seeded(self, seed: int, phases: tuple[tuple[int, int], ...] | None = None) -> ShardTokens:
        """The same rows in another order. Shards have no difficulty levels, so `phases` must be None."""
        if phases is not None:
            raise ValueError("data.curriculum needs `levels`, which token shards do not have; use a token table")
        return self._with([replace(part, seed=seed) for part in self._sets], seed)

    def _with(self, sets: list[TokenSet[TokenRow]], seed: int) -> ShardTokens:
        other = copy.copy(self)
        other._sets, other.seed, other._schedule = sets, seed, MixtureSchedule(self._schedule.weights, seed)
        return other

    def split(self, count: int) -> tuple[ShardTokens, TokenTable]:
        """All but `count` rows, and those: the last rows of each set, in proportion to the weights, as a table."""
        shares = np.asarray(self._schedule.counts) / sum(self._schedule.counts)
        taken = np.diff(np.round(np.cumsum([0.0, *shares]) * count)).astype(int)
        parts = [part.hold_out(int(take)) for part, take in zip(self._sets, taken, strict=True)]
        rest = self._with([part for part, _ in parts], self.seed)
        rows = [row for _, held in parts for row in held]
        stacked = self._stack(rows, torch.arange(len(rows)))
        tensors = {"codes": stacked.codes, "captions": stacked.captions}
        if stacked.questions is not None and stacked.answer_start is not None:
            tensors |= {"questions": stacked.questions, "answer_start": stacked.answer_start}
        return rest, TokenTable(tensors, self.vocabulary, self.text_prefix, self.seed)

    def fetch(self, index: Tensor) -> TokenRows:
        """See `TokenSource.fetch`."""
        return self._stack(self.draw(index), index)

    def _stack(self, rows: list[TokenRow], index: Tensor) -> TokenRows:
        codes = torch.stack([row.codes for row in rows]).long()  # [B, h, w]
        captions = torch.stack([row.caption for row in rows]).long()  # [B, T]
        if not self.has_questions:
            return TokenRows(codes, captions)
        picks = (keyed_bits(self.seed, index, _PICK_STREAM, 1)[:, 0] & 0x7FFFFFFF).tolist()
        questions, starts = captions.clone(), torch.full((len(rows),), self.text_prefix)
        for b, row in enumerate(rows):
            if row.pairs is not None:
                which = picks[b] % len(row.pairs[0])
                questions[b] = torch.from_numpy(row.pairs[0][which]).long()
                starts[b] = int(row.pairs[1][which])
        return TokenRows(codes, captions, questions, starts)


def open_shards(
    spec: str | Sequence[str],
    seed: int = 0,
    cache: str | Path | None = None,
    image_tokenizer: ImageEncoder | None = None,
    text_tokenizer: TextTokenizer | None = None,
    settings: EncodeSettings | None = None,
    allow_missing: bool = False,
) -> ShardTokens:
    """Open shards for training, raw or pre-tokenised.

    Raw ones are encoded once into `cache` (one folder per weighted set), which a later run with the same settings
    reuses; both tokenizers and `cache` are then required. Where the raw shards have changed since, or the cache is damaged,
    they are encoded again, with a note. `allow_missing` counts raw shards that do not exist.

    Raises:
        FileNotFoundError: a raw shard that does not exist.
        ValueError: raw shards without tokenizers or cache; and as `ShardTokens` and `encode_shards`.
    """
    sets = []
    for number, (pattern, weight) in enumerate(parse_sources(spec)):
        if not is_tokenised(pattern):
            if (Path(pattern) / PROGRESS).is_file():
                raise ValueError(f"the encoding of {pattern!r} is not finished; run `unidiff encode` again")
            expand_shards(pattern, allow_missing)
            if image_tokenizer is None or text_tokenizer is None or cache is None:
                raise ValueError(
                    f"{pattern!r} has no tokens.json, so it is read as raw images and captions: "
                    "name tokenizer.image and tokenizer.text, or encode it with `unidiff encode`"
                )
            folder = Path(cache) / f"set{number}"
            manifest = encode_shards(
                pattern, image_tokenizer, text_tokenizer, folder, settings, allow_missing=allow_missing, again=True
            )
            if manifest.skipped.get("counts"):
                _LOG.warning("%s: %s", pattern, SkipReport.from_state_dict(manifest.skipped).summary())
            pattern = str(folder)
        sets.append((pattern, weight))
    return ShardTokens(sets, seed)
