"""The MM-DiT behind the sampler's interface: one row holds a text and an image, any part of which may be hidden."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.families.muddit.tasks import MudditSettings, micro_conditions
from unidiff.families.muddit.text import ClipText
from unidiff.models.mmdit import MMDiT
from unidiff.tokens.vocabulary import Modality, Vocabulary


class MudditDenoiser:
    """A `Denoiser` (features, then a head that is sliced by modality) for Muddit and Meissonic.

    Every row is one text span of the encoder's length and one image span, in either order, without padding; all rows of
    a call have the same layout. The text is encoded anew in every pass.

    Args:
        model: the network.
        encoder: the text encoder, with a mask embedding where text may be hidden.
        vocabulary: the shared id space, see `muddit_vocabulary`.
        settings: time convention, steps and micro conditions; the sampler brings the rest. The number of steps has to
            be that of the sampler for the conventions "fraction" and "index".
        factor: pixels per code.
        empty_prompt: int64 `[T]`, ids of the empty prompt. It stands for a text that is hidden altogether while image
            codes are hidden too: the family's unconditional stream. None leaves such a text hidden.
    """

    def __init__(
        self,
        model: MMDiT,
        encoder: ClipText,
        vocabulary: Vocabulary,
        settings: MudditSettings | None = None,
        factor: int = 16,
        empty_prompt: Tensor | None = None,
    ) -> None:
        self.model, self.encoder, self.vocabulary = model, encoder, vocabulary
        self.settings = MudditSettings() if settings is None else settings
        self.factor, self.empty_prompt = factor, empty_prompt

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
        if attention_mask is not None or not bool((modality == modality[:1]).all()):
            raise ValueError(
                "this network takes rows of one layout without padding; decode rows of other lengths apart"
            )
        is_text = modality[0] == Modality.TEXT
        text, codes = ids[:, is_text], ids[:, ~is_text] - self.vocabulary.image[0]
        grid = positions[0, ~is_text, 1:].amax(0) + 1 if bool((~is_text).any()) else torch.zeros(2, dtype=torch.long)
        height, width = grid.tolist()
        if height * width != codes.shape[1] or codes.shape[1] == 0:
            raise ValueError(
                f"a row has {codes.shape[1]} codes on a grid of {height}x{width}; expected one whole image"
            )
        hides_image = codes == self.model.config.vocab_size - 1
        features = self.encoder(self._prompt(text, hides_image))
        micro = micro_conditions(height * self.factor, width * self.factor, self.settings, ids.device)
        moment = self._time(text, hides_image, time)
        out = self.model.features(
            codes.unflatten(1, (height, width)),
            features.sequence.to(ids.device),
            features.pooled.to(ids.device),
            micro,
            moment,
        )
        joined = out.text.new_empty(*ids.shape, out.text.shape[-1])  # [B, L, D]
        joined[:, is_text], joined[:, ~is_text] = out.text, out.image.flatten(1, 2)
        return joined

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

    def _prompt(self, text: Tensor, hides_image: Tensor) -> Tensor:
        if self.empty_prompt is None:
            return text
        unconditional = (text == self.vocabulary.mask_id).all(1) & hides_image.any(1)
        return torch.where(unconditional[:, None], self.empty_prompt.to(text.device), text)

    def _time(self, text: Tensor, hides_image: Tensor, time: Tensor | None) -> Tensor:
        """`[B]` in the checkpoint's convention: the sampler's t before step k of N is 1 - k / N."""
        steps, convention = self.settings.steps, self.settings.time
        if convention == "training":
            shares = ((text == self.vocabulary.mask_id).float().mean(1), hides_image.float().mean(1))
            return 1000 * torch.maximum(*shares)
        if time is None:
            raise ValueError("this network needs the diffusion time: give `time`, a float tensor [B]")
        left = (time.float() - 1 / steps).clamp_min(0)
        return left * steps if convention == "index" else left
