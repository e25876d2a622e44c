"""A pipeline whose model is an exact toy (golden set `toy_exact`): two independent strings, words first, then codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from toy_model import TableModel
from tqdm import tqdm

from unidiff.decoding import SamplerConfig
from unidiff.families.layout import DecodeRequest, RowLayout, TaskInputs, lay_out
from unidiff.pipelines.score import score_of
from unidiff.tokens import Span, Vocabulary


class PairOfTables:
    """Two strings of a `TableModel`, independent of each other: of each the first half is words, the rest codes.

    `of_words`, `of_codes`: places in the two strings, one after the other, of a row's words and codes.
    """

    def __init__(self, table: TableModel) -> None:
        self.table, self.size, length = table, table.size, table.length
        cuts = (length + 1) // 2, length // 2
        self.of_words = [*range(cuts[0]), *range(length, length + cuts[1])]
        self.of_codes = [place for place in range(2 * length) if place not in self.of_words]
        self.order = torch.tensor(self.of_words + self.of_codes)  # row place -> place in the strings

    def hidden(
        self, ids: Tensor, modality: Tensor, positions: Tensor, attention_mask: Tensor | None, time: Any = None
    ) -> Tensor:
        symbols = torch.where(ids > self.size, ids - self.size - 1, ids)  # codes count from 0; [MASK] is V
        strings = symbols[:, self.order.argsort()].unflatten(1, (2, -1))  # [B, 2, L]
        logs = self.table.hidden(strings.flatten(0, 1), modality, positions, attention_mask)
        return logs.unflatten(0, (-1, 2)).flatten(1, 2)[:, self.order]  # [B, 2 L, V]

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden  # words and codes have V symbols each


@dataclass(frozen=True)
class TableLayout(RowLayout):
    """Words of digits, and one line of codes; hidden where they are not given."""

    model: PairOfTables
    vocabulary: Vocabulary
    family: str = "table"

    def inpaint(self, inputs: TaskInputs) -> DecodeRequest:
        """Equal rows are laid out once: tests have thousands of them."""
        own = lambda row: (inputs.texts and inputs.texts[row], () if inputs.codes is None else inputs.codes[row])  # noqa: E731
        keys = [
            (text, tuple(map(int, torch.as_tensor(codes).flatten()))) for text, codes in map(own, range(inputs.count))
        ]
        first = {key: row for row, key in reversed(list(enumerate(keys)))}
        request = lay_out([self._row(inputs, row) for row in first.values()], SamplerConfig())
        place = torch.tensor([list(first).index(key) for key in keys])
        batch, words, picture = request.batch.rows(place), request.words[place], request.picture[place]
        return replace(request, batch=batch, words=words, picture=picture)

    def _row(self, inputs: TaskInputs, row: int) -> tuple[Span, Span]:
        words = [None] * len(self.model.of_words) if inputs.texts is None else list(map(int, inputs.texts[row]))
        picture = inputs.picture(row, self.vocabulary, (1, len(self.model.of_codes)))
        return Span.words(words, self.vocabulary, read=True), picture


DIGITS = SimpleNamespace(unk_token_id=None)  # a tokenizer that knows all there is


@dataclass(frozen=True)
class TablePipeline:
    """What `pipe.score` asks of a pipeline that is given texts and codes `[B, 1, n]`."""

    transformer: PairOfTables
    images: str = "codes"
    texts: Any = field(default_factory=lambda: SimpleNamespace(known_words=None, tokenizer=DIGITS))
    _execution_device: str = "cpu"
    layout: TableLayout = field(init=False)

    def __post_init__(self) -> None:
        size = self.transformer.size
        object.__setattr__(self, "layout", TableLayout(self.transformer, Vocabulary.unified(size, size)))

    @property
    def vocabulary(self) -> Vocabulary:
        return self.layout.vocabulary

    def progress_bar(self, total: int) -> Any:
        return tqdm(total=total, disable=True)

    score = score_of

    def split(self, strings: Sequence[str]) -> tuple[str, Tensor]:
        """Words and codes `[1, n]` of two strings."""
        symbols = "".join(strings)
        codes = [[int(symbols[place]) for place in self.transformer.of_codes]]
        return "".join(symbols[place] for place in self.transformer.of_words), torch.tensor(codes)
