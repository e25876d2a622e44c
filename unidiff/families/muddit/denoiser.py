"""The MM-DiT behind the sampler's interface, and the CLIP that reads its texts.

One row holds a text and an image, any part of which may be hidden. Of CLIP the network sees the features before the last
layer and the pooled vector; its table has a row more, for text [MASK].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from unidiff.models.block import Condition
from unidiff.models.denoiser import CachePlan, DenoiserTraits, LayerFlops, PartialHidden, Select
from unidiff.models.mmdit import MMDiT
from unidiff.models.parts import gather_rows, query_index
from unidiff.models.store import FeatureStore, StoreOptions
from unidiff.schema import Between, Depth, Epsilon, Index, Rows, Width, check_fields
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.weights.files import check_dtype, check_finite, check_tensor, load_torch
from unidiff.weights.model import load_text_encoder

LAYOUT = "this network takes rows of one layout without padding; decode rows of other lengths apart"
MASK_EMBEDDING = "mask_token_embedding.pth"
TIME_CONVENTIONS = ("fraction", "index", "training")
_Moderate = Annotated[float, Between(-1e6, 1e6)]

CLIP_TYPES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), Rows),
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim"), Width),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), Depth),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), Index | None),
    "eos_token_id": Index,  # the pooled vector is that of this token
    "layer_norm_eps": Epsilon,
    "hidden_act": str,
    "attention_dropout": Annotated[float, Between(0, 1)],
}
"""Types of the keys of CLIP's config."""


class TextFeatures(NamedTuple):
    """What the network sees of a text: `sequence` `[B, T, text_dim]` and `pooled` `[B, pooled_dim]`."""

    sequence: Tensor
    pooled: Tensor


class ClipText:
    """Text ids to features.

    Args:
        encoder: transformers' `CLIPTextModelWithProjection`; taken over, set to evaluation mode, and its table grows
            by one row with `mask_embedding`.
        mask_embedding: float `[hidden_size]`, the row of text [MASK] (released as `mask_token_embedding.pth`), whose id
            is the size of the encoder's vocabulary; None where only whole texts are read.

    Attributes:
        mask_id: the id of text [MASK]. reads_masks: whether there is a row for it.
        length: T, the number of positions.
        end_id: the id of the end token. (Older CLIP configs name 2, which is none of their tokens' roles: it is the last.)
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
            row, width, shape = mask_embedding.reshape(-1), table.weight.shape[1], tuple(mask_embedding.shape)
            if len(row) != width or not bool(torch.isfinite(row).all()):
                raise ValueError(f"the mask embedding has shape {shape}; expected {width} finite numbers")
            grown = torch.cat((table.weight.detach(), row[None].to(table.weight)))
            encoder.set_input_embeddings(nn.Embedding.from_pretrained(grown, freeze=False))

    @classmethod
    def from_folder(cls, folder: Path, dtype: torch.dtype | None = None) -> ClipText:
        """Of a released folder: its `text_encoder`, and text [MASK]'s row where `mask_token_embedding.pth` lies in the folder
        or beside it; None for a dtype keeps the checkpoint's.

        Raises:
            FileNotFoundError: no text encoder. ValueError: weights that do not fit, or a row of another size.
        """
        from transformers import CLIPTextModelWithProjection

        own = CLIPTextModelWithProjection, folder, dtype, CLIP_TYPES, "a Muddit or Meissonic folder"
        # a config may name a kernel on the hub, which is code of others
        encoder = load_text_encoder(*own, attn_implementation="sdpa")
        places = (folder / MASK_EMBEDDING, folder.parent / MASK_EMBEDDING)
        row = next((_read_row(place) for place in places if os.path.lexists(place)), None)
        try:
            return cls(encoder, row)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    @property
    def device(self) -> torch.device:
        return self.encoder.get_input_embeddings().weight.device

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> TextFeatures:
        """int64 `[B, T]` to features. The pooled vector is that of the first end token, as CLIP's config defines it.

        Raises:
            ValueError: too many positions; on the CPU, where a look costs nothing, an unknown id, or [MASK] without a row.
        """
        if ids.ndim != 2 or ids.shape[1] > self.length:
            raise ValueError(f"text ids have shape {tuple(ids.shape)}; expected [B, T] with T at most {self.length}")
        if ids.device.type == "cpu":
            largest = int(ids.max())
            if largest > self.mask_id or int(ids.min()) < 0:
                raise ValueError(f"text id {largest} is unknown; ids run from 0 to {self.mask_id} ([MASK])")
            if largest == self.mask_id and not self.reads_masks:
                raise ValueError("the text holds [MASK] but no mask embedding was given; pass mask_token_embedding.pth")
        out = self.encoder(input_ids=ids.to(self.device), output_hidden_states=True)
        return TextFeatures(out.hidden_states[-2], out.text_embeds)


def _read_row(path: Path) -> Tensor:
    row = load_torch(path)
    if not isinstance(row, Tensor):
        raise ValueError(f"{path} holds a {type(row).__name__}; expected one tensor")
    check_tensor(path, "the mask embedding", row)
    check_dtype(f"the mask embedding of {path}", row)
    check_finite({"the mask embedding": row}, str(path))
    return row


@dataclass(frozen=True)
class MudditConditions:
    """What the network is told besides text and codes.

    Args:
        time: before step k of N: "fraction" (N - 1 - k) / N (Muddit); "index" N - 1 - k (Meissonic); "training" 1000
            times the share of hidden tokens, which is what the training script passes. The network multiplies by 1000.
        aesthetic_score, crop: micro conditions; `crop` is (top, left) in pixels.
    """

    time: str = "fraction"
    aesthetic_score: _Moderate = 6.0
    crop: tuple[_Moderate, _Moderate] = (0.0, 0.0)

    def __post_init__(self) -> None:
        check_fields(self, "")
        if self.time not in TIME_CONVENTIONS:
            raise ValueError(f"time = {self.time!r:.80}; expected one of {list(TIME_CONVENTIONS)}")

    def micro(self, height: int, width: int, device: torch.device | None = None) -> Tensor:
        """float32 `[1, 5]` for an image in pixels: width, height, crop top, crop left, aesthetic score."""
        values = [width, height, *self.crop, self.aesthetic_score]
        return torch.tensor([values], dtype=torch.float32, device=device)


class _Rows(NamedTuple):
    """How text and codes lie in the rows of a call: where each begins and ends, and rows and columns of the image."""

    words: slice
    codes: slice
    size: tuple[int, int]

    @property
    def length(self) -> int:  # T
        return self.words.stop - self.words.start

    def text(self, x: Tensor) -> Tensor:
        return x[:, self.words]  # [B, L] to [B, T]

    def image(self, x: Tensor) -> Tensor:
        return x[:, self.codes].unflatten(1, self.size)  # [B, L] to [B, H, W]

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """`[B, T, ...]` and `[B, H, W, ...]` to `[B, L, ...]`."""
        parts = (text, image.flatten(1, 2))
        return torch.cat(parts if self.words.start == 0 else parts[::-1], dim=1)


@dataclass(eq=False)
class MudditDenoiser:
    """A `PartialDenoiser` for Muddit and Meissonic, made for one request.

    Every row is one text span of the encoder's length and one image span, in either order, without padding; all rows of
    the request have the same layout. Passes read nothing from the device: the layout is looked at once (on the CPU, where
    that costs nothing, in every pass), and a text is encoded once if `prompts` has it, else in every pass (on the CPU, when it
    has changed).

    A partial pass recomputes the text tokens and cells of codes of the plan: with downsampling 2 x 2 codes share a token of
    the blocks, and are recomputed together. The text encoder always reads whole texts. Time reaches every layer, so that
    what is kept belongs to an earlier time too: every cache is an approximation.

    Args:
        encoder: the text encoder, with a mask embedding where text may be hidden.
        vocabulary: the shared id space, see `muddit_vocabulary`.
        steps: N of the time conventions. passes: those that the sampler plans, the last of the N steps; None for all.
        told: time convention and micro conditions. factor: pixels per code.
        empty_prompt: int64 `[T]`, ids of the empty prompt. It stands for a text that is hidden altogether while image
            codes are hidden too: the family's unconditional stream. None leaves such a text hidden.
        prompts: int64 `[K, T]`, all that the rows of the request and of its guidance streams have, where none is written.
    """

    model: MMDiT
    encoder: ClipText
    vocabulary: Vocabulary
    steps: int = 48
    passes: int | None = None
    told: MudditConditions = MudditConditions()
    factor: int = 16
    empty_prompt: Tensor | None = None
    prompts: Tensor | None = None
    _read: tuple[Tensor, TextFeatures] | None = field(default=None, init=False)  # texts that were encoded
    _rows: _Rows | None = field(default=None, init=False)
    _told: Tensor | None = field(default=None, init=False)  # micro conditions

    @property
    def traits(self) -> DenoiserTraits:
        """See `PartialDenoiser`."""
        d = self.model.config.num_heads * self.model.config.head_dim
        layer = LayerFlops(*(2 * d * d,) * 4, 16 * d * d, 4 * d)  # double and single blocks alike
        layers, codes = (layer,) * self.model.num_blocks, self.model.cell_side**2
        kinds = dict(affine_head=True, timed=True, narrows=len(self.model.single_blocks) > 0, recordable=False)
        return DenoiserTraits(self.vocabulary.size, d, layers, codes_per_token=codes, **kinds)

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Features `[B, L, D]` for `head`; arguments as `MaskedTransformer.hidden`, `time` the sampler's diffusion time.
        `wanted` saves work where all of it are codes.

        Raises:
            ValueError: padding or packed samples, rows of different layout, or an image span that is no whole grid.
        """
        rows = self._layout(modality, positions, attention_mask)
        codes = rows.image(ids) - self.vocabulary.image[0]
        text, moment = self._conditions(ids, rows, time)
        inputs = codes, text.sequence, text.pooled, self._micro(rows, ids.device), moment
        if wanted is not None and self._only_codes(wanted, rows):
            return self._codes_at(wanted, rows, inputs)
        out = self.model.features(*inputs)
        hidden = rows.join(out.text, out.image)
        return hidden if wanted is None else gather_rows(hidden, wanted)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`[..., D]` to logits of the ids `[start, stop)`; `ValueError` unless they lie in one modality, whose head is used."""
        stop = self.vocabulary.size if stop is None else stop
        for modality, head in ((Modality.TEXT, self.model.text_head), (Modality.IMAGE, self.model.image_head)):
            low, high = self.vocabulary.range_of(modality)
            if low <= start <= stop <= high:
                return head(hidden, start - low, stop - low)
        ranges = f"{self.vocabulary.text} or {self.vocabulary.image}"
        raise ValueError(f"ids [{start}, {stop}) span two heads; ask for a range inside {ranges}")

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """See `PartialDenoiser`. Its positions are the tokens of the blocks, the text's first."""
        rows = self._layout(batch.modality, batch.positions, batch.attention_mask())
        store = self.model.make_store(len(batch.ids), rows.length, rows.size, options)
        store.tokens_of = lambda where: self._to_tokens(where, rows)
        return store

    def partial(
        self,
        ids: Tensor,
        plan: CachePlan,
        store: FeatureStore,
        time: Tensor | None = None,
        select: Select | None = None,
    ) -> PartialHidden:
        """See `PartialDenoiser.partial`; the work and the result are counted in tokens of the blocks."""
        rows = self._stored()
        text, moment = self._conditions(ids, rows, time)
        condition = self.model.condition(text.pooled, self._micro(rows, ids.device), moment)
        cells = self.model.cells(rows.image(ids) - self.vocabulary.image[0])
        query, verify = (None if x is None else self._to_tokens(x, rows) for x in (plan.query, plan.verify))
        inner = replace(plan, query=query, verify=verify, logits=None, wanted=None, others={})

        def select_tokens(layer: int, similarity: Tensor) -> Tensor | None:
            assert select is not None and plan.verify is not None
            of_codes = torch.where(plan.verify, self._to_positions(similarity, rows), torch.nan)
            chosen = select(layer, of_codes)
            return None if chosen is None else self._to_tokens(chosen, rows)

        condition = Condition(condition.vector.expand(len(ids), -1))
        choose = None if select is None else select_tokens
        return self.model.partial(text.sequence, cells, condition, inner, store, choose)

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """From the tokens of the blocks to every position of a row, see `PartialDenoiser.shifted`."""
        rows, width = self._stored(), hidden.shape[-1] // self.model.cell_side**2
        codes = hidden[:, rows.length :].unflatten(-1, (-1, width))  # [B, N, c, D]
        return rows.join(hidden[:, : rows.length, :width], self.model.grid(codes, rows.size))

    def _only_codes(self, wanted: Tensor, rows: _Rows) -> bool:
        """Whether no position of a text is among them, as far as that is known without asking the device."""
        if self.prompts is not None:
            return True
        words = (wanted >= rows.words.start) & (wanted < rows.words.stop)
        return wanted.device.type == "cpu" and not bool(words.any())

    def _codes_at(self, wanted: Tensor, rows: _Rows, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Features `[B, m, D]` at codes int64 `[B, m]`, from those of their cells alone."""
        (batch, most), length = wanted.shape, max(rows.words.stop, rows.codes.stop)
        asked = torch.zeros(batch, length + 1, dtype=torch.bool, device=wanted.device)
        asked = asked.scatter(1, wanted.clamp_max(length), True)
        cells = self.model.cells(rows.image(asked[:, :-1])).any(2)  # [B, N]
        index = query_index(cells, min(most, cells.shape[1]))
        found = self.model.features_of_cells(*inputs, index).flatten(1, 2)  # [B, n c, D]
        count = self.model.cell_side**2
        rank = (cells.long().cumsum(1) - 1)[..., None] * count + torch.arange(count, device=wanted.device)  # [B, N, c]
        places = rows.join(rank.new_zeros(batch, rows.length), self.model.grid(rank, rows.size))  # [B, L]
        return gather_rows(found, places.gather(1, wanted.clamp_max(length - 1)).clamp_min(0))

    def _stored(self) -> _Rows:
        if self._rows is None:
            raise ValueError("no store was made; call make_store with the rows of the request first")
        return self._rows

    def _to_tokens(self, where: Tensor, rows: _Rows) -> Tensor:
        """A flag bool `[B, L]` to that of the tokens `[B, T + N]`: a cell is meant where one of its codes is."""
        return torch.cat((rows.text(where), self.model.cells(rows.image(where)).any(2)), dim=1)

    def _to_positions(self, x: Tensor, rows: _Rows) -> Tensor:
        """`[B, T + N]` to `[B, L]`: the codes of a cell share its number."""
        codes = x[:, rows.length :, None].expand(-1, -1, self.model.cell_side**2)
        return rows.join(x[:, : rows.length], self.model.grid(codes, rows.size))

    def _conditions(self, ids: Tensor, rows: _Rows, time: Tensor | None) -> tuple[TextFeatures, Tensor]:
        """The texts as the network reads them, and `[B]` times in the checkpoint's convention."""
        text, hides_image = rows.text(ids), rows.image(ids).flatten(1) == self.vocabulary.image_mask
        hides_text = text == self.vocabulary.mask_id
        if self.empty_prompt is not None:
            unconditional = hides_text.all(1) & hides_image.any(1)
            text = torch.where(unconditional[:, None], self.empty_prompt.to(text.device), text)
        return self._encoded(text), self._moment(hides_text, hides_image, time)

    def _encoded(self, text: Tensor) -> TextFeatures:
        known, of = self._read, text if self.prompts is None else self.prompts
        if known is None or (of is text and not (text.device.type == "cpu" and torch.equal(known[0], text))):
            known = self._read = of, TextFeatures(*(x.to(text.device) for x in self.encoder(of)))
        if of is text:
            return known[1]
        which = (text[:, None] == of).all(2).long().argmax(1)
        return TextFeatures(*(x.index_select(0, which) for x in known[1]))

    def _moment(self, hides_text: Tensor, hides_image: Tensor, time: Tensor | None) -> Tensor:
        """The sampler's t before pass j of P is 1 - j / P, with P - 1 - j passes to come."""
        if self.told.time == "training":
            return 1000 * torch.maximum(hides_text.float().mean(1), hides_image.float().mean(1))
        if time is None:
            raise ValueError("this network needs the diffusion time: give `time`, a float tensor [B]")
        left = (time.float() * (self.passes or self.steps) - 1).clamp_min(0)
        return left if self.told.time == "index" else left / self.steps

    def _micro(self, rows: _Rows, device: torch.device) -> Tensor:
        if self._told is None:
            self._told = self.told.micro(rows.size[0] * self.factor, rows.size[1] * self.factor, device)
        return self._told

    def _layout(self, modality: Tensor, positions: Tensor, attention_mask: Tensor | None) -> _Rows:
        if attention_mask is not None:
            raise ValueError(LAYOUT)
        if self._rows is None or modality.device.type == "cpu":
            self._rows = _rows_of(modality, positions)
        return self._rows


def _rows_of(modality: Tensor, positions: Tensor) -> _Rows:
    drawn = modality[0] != Modality.TEXT
    sides = torch.where(drawn[:, None], positions[0, :, 1:] + 1, 0).amax(0)
    same, borders = (modality == modality[:1]).all().long(), (drawn[1:] != drawn[:-1]).sum()
    numbers = torch.stack((same, borders, drawn.sum(), drawn[0].long(), *sides)).tolist()
    same, borders, count, codes_first, height, width = numbers
    if not same or borders > 1:
        raise ValueError(LAYOUT)
    if height * width != count or count == 0:
        raise ValueError(f"a row has {count} codes on a grid of {height}x{width}; expected one whole image")
    border = count if codes_first else modality.shape[1] - count
    parts = slice(0, border), slice(border, modality.shape[1])
    words, codes = reversed(parts) if codes_first else parts
    return _Rows(words, codes, (height, width))
