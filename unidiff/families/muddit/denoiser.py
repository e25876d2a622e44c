"""The MM-DiT behind the sampler's interface: one row holds a text and an image, any part of which may be hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from unidiff.families.muddit.text import ClipText, TextFeatures
from unidiff.models.block import Condition
from unidiff.models.denoiser import CachePlan, DenoiserTraits, LayerFlops, PartialHidden, Select
from unidiff.models.mmdit import MMDiT
from unidiff.models.mmdit_partial import MMDiTInputs, mmdit_store, partial_mmdit
from unidiff.models.store import FeatureStore, StoreOptions
from unidiff.schema import Between, check_fields
from unidiff.tokens import Modality, TokenBatch, Vocabulary

TIME_CONVENTIONS = ("fraction", "index", "training")
_Moderate = Annotated[float, Between(-1e6, 1e6)]


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
    """How text and codes lie in the rows of a call: bool `[L]`, and rows and columns of the image."""

    is_text: Tensor
    size: tuple[int, int]

    def text(self, x: Tensor) -> Tensor:
        """`[B, L]` to `[B, T]`."""
        return x[:, self.is_text]

    def image(self, x: Tensor) -> Tensor:
        """`[B, L]` to `[B, H, W]`."""
        return x[:, ~self.is_text].unflatten(1, self.size)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """`[B, T, ...]` and `[B, H, W, ...]` to `[B, L, ...]`."""
        joined = text.new_empty(len(text), len(self.is_text), *text.shape[2:])
        joined[:, self.is_text], joined[:, ~self.is_text] = text, image.flatten(1, 2)
        return joined


class MudditDenoiser:
    """A `PartialDenoiser` for Muddit and Meissonic, made for one request.

    Every row is one text span of the encoder's length and one image span, in either order, without padding; all rows of
    a call have the same layout. A text is encoded anew when it has changed.

    A partial pass recomputes the text tokens and cells of codes of the plan: with downsampling 2 x 2 codes share a token of
    the blocks, and are recomputed together. The text encoder always reads whole texts. Time reaches every layer, so that
    what is kept belongs to an earlier time too: every cache is an approximation.

    Args:
        model: the network.
        encoder: the text encoder, with a mask embedding where text may be hidden.
        vocabulary: the shared id space, see `muddit_vocabulary`.
        steps: N of the time conventions.
        passes: those that the sampler plans, the last of the N steps; None for all.
        told: time convention and micro conditions.
        factor: pixels per code.
        empty_prompt: int64 `[T]`, ids of the empty prompt. It stands for a text that is hidden altogether while image
            codes are hidden too: the family's unconditional stream. None leaves such a text hidden.
    """

    def __init__(
        self,
        model: MMDiT,
        encoder: ClipText,
        vocabulary: Vocabulary,
        steps: int = 48,
        passes: int | None = None,
        told: MudditConditions | None = None,
        factor: int = 16,
        empty_prompt: Tensor | None = None,
    ) -> None:
        self.model, self.encoder, self.vocabulary = model, encoder, vocabulary
        self.steps, self.passes = steps, steps if passes is None else passes
        self.told = MudditConditions() if told is None else told
        self.factor, self.empty_prompt = factor, empty_prompt
        self._read: tuple[Tensor, TextFeatures] | None = None  # the texts of the last pass
        self._rows: _Rows | None = None  # of the request with a store

    @property
    def traits(self) -> DenoiserTraits:
        """See `PartialDenoiser`."""
        d = self.model.config.num_heads * self.model.config.head_dim
        layer = LayerFlops(4 * d * d, 2 * d * d, 2 * d * d, 16 * d * d, 4 * d)  # double and single blocks alike
        return DenoiserTraits(
            self.vocabulary.size,
            d,
            (layer,) * self.model.num_blocks,
            affine_head=False,
            timed=True,
            codes_per_token=self.model.cell_side**2,
            recordable=False,
        )

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Features `[B, L, D]` for `head`; arguments as `MaskedTransformer.hidden`, `time` the sampler's diffusion time.

        Raises:
            ValueError: padding or packed samples, rows of different layout, or an image span that is no whole grid.
        """
        rows = _rows_of(modality, positions, attention_mask)
        codes = rows.image(ids) - self.vocabulary.image[0]
        text, moment = self._conditions(ids, rows, time)
        out = self.model.features(codes, text.sequence, text.pooled, self._micro(rows, ids.device), moment)
        return rows.join(out.text, out.image)

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`[..., D]` to logits of the ids `[start, stop)`, which lie in one modality: its head is used.

        Raises:
            ValueError: a range that is in neither modality.
        """
        stop = self.vocabulary.size if stop is None else stop
        for modality, head in ((Modality.TEXT, self.model.text_head), (Modality.IMAGE, self.model.image_head)):
            low, high = self.vocabulary.range_of(modality)
            if low <= start <= stop <= high:
                return head(hidden, start - low, stop - low)
        raise ValueError(
            f"ids [{start}, {stop}) span two heads; ask for a range inside {self.vocabulary.text} or {self.vocabulary.image}"
        )

    def make_store(self, batch: TokenBatch, options: StoreOptions | None = None) -> FeatureStore:
        """See `PartialDenoiser`. Its positions are the tokens of the blocks, the text's first."""
        rows = self._rows = _rows_of(batch.modality, batch.positions, batch.attention_mask())
        return mmdit_store(self.model, len(batch.ids), int(rows.is_text.sum()), rows.size, options)

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
        inner = replace(plan, query=query, verify=verify, logits=None, others={})

        def select_tokens(layer: int, similarity: Tensor) -> Tensor | None:
            assert select is not None and plan.verify is not None
            of_codes = torch.where(plan.verify, self._to_positions(similarity, rows), torch.nan)
            chosen = select(layer, of_codes)
            return None if chosen is None else self._to_tokens(chosen, rows)

        inputs = MMDiTInputs(text.sequence, cells, Condition(condition.vector.expand(len(ids), -1)))
        work, fresh = partial_mmdit(self.model, inputs, inner, store, None if select is None else select_tokens)
        return PartialHidden(store.hidden[:, :-1], store.everywhere(), work, fresh)

    def shifted(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """From the tokens of the blocks to every position of a row, see `PartialDenoiser.shifted`."""
        rows, width = self._stored(), hidden.shape[-1] // self.model.cell_side**2
        count = int(rows.is_text.sum())
        codes = hidden[:, count:].unflatten(-1, (-1, width))  # [B, N, c, D]
        return rows.join(hidden[:, :count, :width], self.model.grid(codes, rows.size))

    def _stored(self) -> _Rows:
        if self._rows is None:
            raise ValueError("no store was made; call make_store with the rows of the request first")
        return self._rows

    def _to_tokens(self, where: Tensor, rows: _Rows) -> Tensor:
        """A flag bool `[B, L]` to that of the tokens `[B, T + N]`: a cell is meant where one of its codes is."""
        return torch.cat((rows.text(where), self.model.cells(rows.image(where)).any(2)), dim=1)

    def _to_positions(self, x: Tensor, rows: _Rows) -> Tensor:
        """`[B, T + N]` to `[B, L]`: the codes of a cell share its number."""
        count = int(rows.is_text.sum())
        codes = x[:, count:, None].expand(-1, -1, self.model.cell_side**2)
        return rows.join(x[:, :count], self.model.grid(codes, rows.size))

    def _conditions(self, ids: Tensor, rows: _Rows, time: Tensor | None) -> tuple[TextFeatures, Tensor]:
        """The texts as the network reads them, and `[B]` times in the checkpoint's convention."""
        text, hides_image = rows.text(ids), rows.image(ids).flatten(1) == self.vocabulary.image_mask
        hides_text = text == self.vocabulary.mask_id
        if self.empty_prompt is not None:
            unconditional = hides_text.all(1) & hides_image.any(1)
            text = torch.where(unconditional[:, None], self.empty_prompt.to(text.device), text)
        if self._read is None or not torch.equal(self._read[0], text):
            features = TextFeatures(*(x.to(ids.device) for x in self.encoder(text)))
            self._read = text, features
        return self._read[1], self._moment(hides_text, hides_image, time)

    def _moment(self, hides_text: Tensor, hides_image: Tensor, time: Tensor | None) -> Tensor:
        """The sampler's t before pass j of P is 1 - j / P, with P - 1 - j passes to come."""
        if self.told.time == "training":
            return 1000 * torch.maximum(hides_text.float().mean(1), hides_image.float().mean(1))
        if time is None:
            raise ValueError("this network needs the diffusion time: give `time`, a float tensor [B]")
        left = (time.float() * self.passes - 1).clamp_min(0)
        return left if self.told.time == "index" else left / self.steps

    def _micro(self, rows: _Rows, device: torch.device) -> Tensor:
        return self.told.micro(rows.size[0] * self.factor, rows.size[1] * self.factor, device)


def _rows_of(modality: Tensor, positions: Tensor, attention_mask: Tensor | None) -> _Rows:
    if attention_mask is not None or not bool((modality == modality[:1]).all()):
        raise ValueError("this network takes rows of one layout without padding; decode rows of other lengths apart")
    is_text = modality[0] == Modality.TEXT
    count = int((~is_text).sum())
    height, width = (positions[0, ~is_text, 1:].amax(0) + 1).tolist() if count else (0, 0)
    if height * width != count or count == 0:
        raise ValueError(f"a row has {count} codes on a grid of {height}x{width}; expected one whole image")
    return _Rows(is_text, (height, width))
