"""Interleaved documents in training: token shards of documents, and their place among the samples of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unidiff.data.mixture import MixtureSchedule, parse_sources
from unidiff.data.token_set import (
    DOCUMENTS,
    DocumentRow,
    TokenSet,
    encoding_reports,
    full_report,
    open_token_set,
    stamp_of,
)
from unidiff.models.trained_on import TASKS
from unidiff.tokens import Span, TokenBatch, Vocabulary
from unidiff.train.data.tasks import TaskBatch, TaskMixer


class DocumentTokens:
    """Pre-tokenised documents by number, of one set or several weighted ones.

    Document i is the same for every batch size, rank and history; one that was lost since the shards were written is in
    `report`, and another takes its place.

    Args:
        spec: shard patterns and weights, see `parse_sources`.
        seed: of the order.

    Attributes:
        report: documents that could not be read so far. encoding: what the encoding left out, by folder.

    Raises:
        FileNotFoundError: shards without `tokens.json`.
        ValueError: refused sources, shards that hold no documents, or sets of different layout.
    """

    def __init__(self, spec: str | Sequence[str], seed: int = 0) -> None:
        self.report = full_report()
        parts = parse_sources(spec)
        self._sets: list[TokenSet[DocumentRow]] = [open_token_set(p, seed, self.report, DOCUMENTS) for p, _ in parts]
        self._schedule = MixtureSchedule(tuple(weight for _, weight in parts), seed)
        first = self._sets[0].layout
        for pattern, other in zip(parts, self._sets, strict=True):
            if (other.layout.vocabulary, other.layout.grid) != (first.vocabulary, first.grid):
                raise ValueError(
                    f"{pattern[0]!r} differs from {parts[0][0]!r} in vocabulary or grid; encode them alike"
                )
        self.vocabulary = Vocabulary.from_dict(first.vocabulary)
        self.grid: tuple[int, int] = first.grid
        self.length = max(part.layout.text_length for part in self._sets)
        self.encoding = encoding_reports(self._sets)

    def __len__(self) -> int:
        """Documents of all sets."""
        return sum(part.total for part in self._sets)

    def stamp(self) -> list[Any]:
        """What the documents are known by later, as plain data; see `stamp_of`."""
        return [*map(stamp_of, self._sets), list(self._schedule.weights)]

    def fetch(self, index: Tensor) -> TokenBatch:
        """The documents `index` (int64 `[B]`, unbounded): all tokens are targets; `[B, length]`, batch padding behind them.

        Every picture has rows and columns of its own; the first position counts through the document.
        """
        rows = []
        for i in index.tolist():
            part, number = self._schedule.locate(i)
            rows.append(self._spans(self._sets[part].draw(number)))
        return TokenBatch.from_spans(rows, self.length)

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


class DocumentMixer:
    """`TaskMixer.batch` with documents among the pairs, by exact shares and a fixed order.

    A document is trained on as `generate` is: text and pictures hidden at one rate, with that task's settings.

    Args:
        pairs: makes the batches of pairs. documents: the others. share: of the samples, in (0, 1).

    Raises:
        ValueError: another vocabulary or grid than the pairs', or block diffusion.
    """

    def __init__(self, pairs: TaskMixer, documents: DocumentTokens, share: float) -> None:
        if documents.vocabulary != pairs.source.vocabulary or documents.grid != pairs.source.grid:
            raise ValueError("data.documents has another vocabulary or grid than data.train; encode them alike")
        if pairs.block_length:
            raise ValueError(
                "documents have no blocks, so a block-causal model cannot train on them; empty data.documents"
            )
        self._pairs, self._documents = pairs, documents
        self._schedule = MixtureSchedule((1 - share, share), pairs.seed)

    def batch(self, first: int, count: int) -> TaskBatch:
        """The samples `first .. first + count - 1`, pairs before documents."""
        places = [self._schedule.locate(i) for i in range(first, first + count)]
        pairs, documents = (torch.tensor([n for kind, n in places if kind == wanted]) for wanted in (0, 1))
        parts = []
        if len(pairs):
            parts.append(self._pairs.of(pairs))
        if len(documents):
            task = torch.full_like(documents, TASKS.index("generate"))
            batch = self._documents.fetch(documents)
            parts.append(self._pairs.masked(-1 - documents, task, batch))  # draws of their own: pairs count upwards
        return TaskBatch.cat(parts)
