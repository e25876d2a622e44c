"""CLIP as Muddit and Meissonic read it: features before the last layer, a pooled vector, and a row for text [MASK]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unidiff.schema import Between, Depth, Epsilon, Index, Rows, Width

_TOKEN_ID = Index | None
CLIP_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), Rows),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), Width),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), Depth),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN_ID),
    "eos_token_id": Index,  # the pooled vector is that of this token
    **dict.fromkeys(("dtype", "torch_dtype"), Literal["float64", "float32", "float16", "bfloat16"] | None),
    "layer_norm_eps": Epsilon,
    "hidden_act": str,
    "attention_dropout": Annotated[float, Between(0, 1)],
}
"""Types of the keys of CLIP's config."""


class TextFeatures(NamedTuple):
    """What the network sees of a text: `sequence` `[B, T, text_dim]` and `pooled` `[B, pooled_dim]`."""

    sequence: Tensor
    pooled: Tensor

    def rows(self, count: int) -> TextFeatures:
        """A single text for `count` rows; more than one is returned as it is."""
        if len(self.pooled) != 1:
            return self
        return TextFeatures(self.sequence.expand(count, -1, -1), self.pooled.expand(count, -1))


class ClipText:
    """Text ids to features.

    Args:
        encoder: transformers' `CLIPTextModelWithProjection`; taken over, set to evaluation mode, and its table grows
            by one row with `mask_embedding`.
        mask_embedding: float `[hidden_size]`, the row of text [MASK] (released as `mask_token_embedding.pth`), whose id
            is the size of the encoder's vocabulary; None where only whole texts are read.

    Attributes:
        mask_id: the id of text [MASK].
        length: T, the number of positions.
        end_id: the id of the end token. (Older CLIP configs name 2, which is none of their tokens' roles: it is the last.)
        reads_masks: whether there is a row for [MASK].
    """

    def __init__(self, encoder: Any, mask_embedding: Tensor | None = None) -> None:
        self.encoder = encoder.eval()
        table = encoder.get_input_embeddings()
        self.mask_id = int(table.num_embeddings)
        self.length = int(encoder.config.max_position_embeddings)
        end = encoder.config.eos_token_id
        self.end_id = end if isinstance(end, int) and end != 2 else self.mask_id - 1
        self.reads_masks = mask_embedding is not None
        if mask_embedding is not None:
            row = mask_embedding.reshape(-1)
            if row.shape != table.weight.shape[1:] or not bool(torch.isfinite(row).all()):
                raise ValueError(
                    f"the mask embedding has shape {tuple(mask_embedding.shape)}; expected {table.weight.shape[1]} finite numbers"
                )
            grown = torch.cat((table.weight.detach(), row[None].to(table.weight)))
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown, freeze=False))

    @property
    def device(self) -> torch.device:
        return self.encoder.get_input_embeddings().weight.device

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> TextFeatures:
        """int64 `[B, T]` to features. The pooled vector is that of the first end token, as CLIP's config defines it.

        Raises:
            ValueError: more positions than the encoder has, an unknown id, or [MASK] without a mask embedding.
        """
        if ids.ndim != 2 or ids.shape[1] > self.length:
            raise ValueError(f"text ids have shape {tuple(ids.shape)}; expected [B, T] with T at most {self.length}")
        largest = int(ids.max())
        if largest > self.mask_id or int(ids.min()) < 0:
            raise ValueError(f"text id {largest} is unknown; ids run from 0 to {self.mask_id} ([MASK])")
        if largest == self.mask_id and not self.reads_masks:
            raise ValueError("the text holds [MASK] but no mask embedding was given; pass mask_token_embedding.pth")
        out = self.encoder(input_ids=ids.to(self.device), output_hidden_states=True)
        return TextFeatures(out.hidden_states[-2], out.text_embeds)


def question_rows(questions: Sequence[Sequence[int]], length: int, mask_id: int) -> Tensor:
    """Rows `[B, length]` that start with a question and are [MASK] from there on.

    Args:
        questions: ids per row without the end token; empty for a caption.

    Raises:
        ValueError: no row, or a question that leaves no room for an answer.
    """
    if not questions:
        raise ValueError("no questions given; pass one list of ids per image, empty for a caption")
    rows = torch.full((len(questions), length), mask_id)
    for row, ids in zip(rows, questions, strict=True):
        if len(ids) >= length:
            raise ValueError(
                f"a question has {len(ids)} tokens and leaves no room for an answer in {length}; shorten it to {length - 1} at most"
            )
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.long)
    return rows


def upstream_wording(text: str) -> str:
    """What the reference does to an answer: drops "such" phrases and repeated words, cuts after the last full stop."""
    for phrase in ("is such is", "such is", "such as", "such"):
        text = text.replace(phrase, "")
    words = text.split()
    if words:
        text = " ".join(word for word, before in zip(words, [None, *words], strict=False) if word != before)
    for stop in ("。", "."):
        if stop in text:
            return text[: text.rindex(stop) + 1]
    return text
