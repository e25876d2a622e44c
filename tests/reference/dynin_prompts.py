"""Dynin-Omni's rows as its prompt builder makes them, padding and all, from the ids that a text tokenizer returned.

    t2i          padding <t2i> bos text eos, soi codes eoi
    i2i          <i2i> soi source eoi, padding bos text eos, soi codes eoi
    i2i_gen      <t2i> soi source eoi bos, padding bos text eos, eos soi codes eoi
    ti2ti_gen    <ti2ti> soi source eoi, padding bos text eos, soi codes eoi, padding bos answer eos
    ti2ti_train  padding, <ti2ti> soi source eoi, bos text eos, soi codes eoi, bos answer eos padding

Image ids are code + offset. Padding is [iPAD], and not visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.tokens import Vocabulary

IGNORED = -100
Ids = Sequence[int]


@dataclass(frozen=True)
class DyninRows:
    """Rows `[B, L]`: ids, visible, and labels (-100 where nothing is learnt)."""

    ids: Tensor
    visible: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DyninPrompts:
    """Builds rows of a vocabulary whose text parts are `part` ids long, task id included where it stands in them."""

    vocabulary: Vocabulary
    part: int

    def t2i(self, texts: Sequence[Ids], codes: Tensor, labels: Tensor | None = None) -> DyninRows:
        """`labels` `[B, N]` of the codes; with them, text ids and marks are learnt as well."""
        s, rows = self.vocabulary.specials, []
        for i, text in enumerate(texts):
            said = self._cut([s["t2i"], *self._opened(text), s["eos"]])
            own = self._part(said)
            marks = [s["soi"], *codes[i].tolist(), s["eoi"]]
            learnt = [IGNORED] * (len(own) + len(marks))
            if labels is not None:
                padding = [IGNORED] * (self.part - len(said))
                learnt = [*padding, *said, s["soi"], *labels[i].tolist(), s["eoi"]]
            rows.append(([*own, *marks], self._seen(said) + [1] * len(marks), learnt))
        return _rows(rows)

    def i2i(self, texts: Sequence[Ids], source: Tensor, codes: Tensor, labels: Tensor | None = None) -> DyninRows:
        s, rows = self.vocabulary.specials, []
        for i, text in enumerate(texts):
            said = self._cut([s["bos"], *text, s["eos"]])
            front, back = self._front("i2i", source[i]), [s["soi"], *codes[i].tolist(), s["eoi"]]
            ids = [*front, *self._part(said), *back]
            learnt = [IGNORED] * len(ids)
            if labels is not None:
                learnt[-1 - codes.shape[1] : -1] = labels[i].tolist()
            rows.append((ids, [1] * len(front) + self._seen(said) + [1] * len(back), learnt))
        return _rows(rows)

    def i2i_gen(self, texts: Sequence[Ids], source: Tensor, codes: Tensor) -> DyninRows:
        s, rows = self.vocabulary.specials, []
        for i, text in enumerate(texts):
            said = self._cut([*self._opened(text), s["eos"]])
            front, back = self._front("t2i", source[i]), [s["eos"], s["soi"], *codes[i].tolist(), s["eoi"]]
            ids = [*front, s["bos"], *self._part(said), *back]
            rows.append((ids, [1] * (len(front) + 1) + self._seen(said) + [1] * len(back), [IGNORED] * len(ids)))
        return _rows(rows)

    def ti2ti_gen(self, texts: Sequence[Ids], targets: Sequence[Ids], source: Tensor, codes: Tensor) -> DyninRows:
        s, rows = self.vocabulary.specials, []
        for i, (text, target) in enumerate(zip(texts, targets, strict=True)):
            said, told = (self._cut([*self._opened(own[: self.part]), s["eos"]]) for own in (text, target))
            front, drawn = self._front("ti2ti", source[i]), [s["soi"], *codes[i].tolist(), s["eoi"]]
            ids = [*front, *self._part(said), *drawn, *self._part(told)]
            seen = [1] * len(front) + self._seen(said) + [1] * len(drawn) + self._seen(told)
            rows.append((ids, seen, [IGNORED] * len(ids)))
        return _rows(rows)

    def ti2ti_train(
        self,
        texts: Sequence[Ids],
        targets: Sequence[Ids],
        source: Tensor,
        codes: Tensor,
        labels: Tensor,
        hidden: Tensor | None = None,
    ) -> DyninRows:
        """`hidden`: bool `[B, part]`, ids of the answer that are masked and learnt; None for none masked and all learnt."""
        s, rows = self.vocabulary.specials, []
        for i, (text, target) in enumerate(zip(texts, targets, strict=True)):
            said = [*self._opened(text[: self.part]), s["eos"]]
            told = self._cut([*self._opened(target[: self.part]), s["eos"]])
            masked = [hidden is not None and bool(hidden[i, n]) for n in range(len(told))]
            shown = [self.vocabulary.mask_id if m else t for t, m in zip(told, masked, strict=True)]
            learnt = [t if m or hidden is None else IGNORED for t, m in zip(told, masked, strict=True)]
            head = [*self._front("ti2ti", source[i]), *said, s["soi"]]
            padding = self.part - len(told)
            ids = [*head, *codes[i].tolist(), s["eoi"], *shown, *[s["ipad"]] * padding]
            seen = [1] * (len(ids) - padding) + [0] * padding
            own = [IGNORED] * len(head) + labels[i].tolist() + [IGNORED] + learnt + [IGNORED] * padding
            rows.append((ids, seen, own))
        longest = max(len(ids) for ids, _, _ in rows)
        return _rows(
            [
                (
                    [s["ipad"]] * (longest - len(ids)) + ids,
                    [0] * (longest - len(ids)) + seen,
                    [IGNORED] * (longest - len(ids)) + own,
                )
                for ids, seen, own in rows
            ]
        )

    def _front(self, task: str, source: Tensor) -> list[int]:
        s = self.vocabulary.specials
        return [s[task], s["soi"], *source.tolist(), s["eoi"]]

    def _opened(self, text: Ids) -> list[int]:
        """With bos, once."""
        bos = self.vocabulary.specials["bos"]
        return list(text) if len(text) and text[0] == bos else [bos, *text]

    def _cut(self, ids: list[int]) -> list[int]:
        """At most `part` ids, the last of which is eos."""
        return ids if len(ids) <= self.part else [*ids[: self.part - 1], ids[-1]]

    def _part(self, ids: list[int]) -> list[int]:
        padding = [self.vocabulary.specials["ipad"]] * (self.part - len(ids))
        return [*padding, *ids]

    def _seen(self, ids: list[int]) -> list[int]:
        return [0] * (self.part - len(ids)) + [1] * len(ids)


def _rows(rows: Sequence[tuple[list[int], list[int], list[int]]]) -> DyninRows:
    ids, seen, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    return DyninRows(ids, seen.bool(), labels)
