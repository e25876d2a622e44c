"""What surrounds a decode: the options every task takes, progress and callbacks, conditions, and the recorded way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from unidiff.decoding import CacheConfig, DecodeView, RefreshPolicy, SamplerConfig
from unidiff.decoding.graphs import Record
from unidiff.decoding.state import declines
from unidiff.pipelines.output import Trajectory, to_frames
from unidiff.pipelines.rows import TextSlot, TextSlots
from unidiff.pipelines.seeds import RowGenerator
from unidiff.pipelines.settings import PipelineSettings
from unidiff.tokens import Modality, TokenBatch

StepCallback = Callable[[Any, int, float, dict[str, Tensor]], Any]


class DecodeOptions(TypedDict, total=False):
    """Keyword arguments that every task of the pipeline takes.

    steps: passes per modality; default from the pipeline's settings for the task.
    guidance_scale: classifier-free guidance, 1 is off.
    guidance_hides: what the unconditional pass does not see: `given` tokens, the `other` modality, or given `text` or
        `image`.
    temperature: of token draws, 0 takes the best token.
    sampler: a whole `SamplerConfig` in place of the task's default; the arguments above still apply on top.
    cache: what is kept between passes: "auto", "none" (the default), "prefix", "dual", "vicinity", "interval", "adaptive",
        "max-logit", "modality", "block-causal", or a `CacheConfig`, which says what each costs and gains. "auto" takes
        what suits the task and none where rows are too short to gain (`choose_cache`); results say what was used.
        Every cache but "block-causal" trades some quality for speed.
    policy: a cache policy object of your own, in place of `cache`.
    block_length: tokens per block, for both modalities or as `{"text": 16, "image": 64}`.
    threshold: commit every token of at least this confidence, at least one per pass: of text, in text-to-image of the
        image, or as `{"text": 0.9, "image": 0.5}`.
    num_candidates: decodes of each row, of which the one whose words and picture agree best by the model's own
        likelihoods is kept; costs that many times the time and memory. Left out, the model's own number for the task.
    graphs: record the passes as CUDA graphs and replay them, see `unidiff.decoding.graphs`; without CUDA nothing changes.
        A `Record` in place of True records by other means.
    generator: None, an int, a torch.Generator, or a list with one of either per row.
    output_type: "pil", "pt" (float `[B, 3, H, W]`), "np" (float `[B, H, W, 3]`) or "codes" (int64 `[B, h, w]`).
    callback_on_step_end: `callback(pipe, step, t, {"ids", "open", "confidence"})` after each pass, with t the share
        still open; returning False, or setting `pipe._interrupt`, fills the rest in one last pass.
    record_trajectory: keep what the rows looked like after each pass.
    """

    steps: int | None
    guidance_scale: float | None
    guidance_hides: str | None
    temperature: float | None
    sampler: SamplerConfig | None
    cache: str | CacheConfig | None
    policy: RefreshPolicy | None
    block_length: int | Mapping[str, int] | None
    threshold: float | Mapping[str, float] | None
    num_candidates: int | None
    graphs: bool | Record
    generator: RowGenerator
    output_type: str
    callback_on_step_end: StepCallback | None
    record_trajectory: bool


class ProgressBar(Protocol):
    """The part of tqdm that is used."""

    disable: bool

    def update(self, n: int) -> Any: ...


class StepWatcher:
    """The sampler's callback: moves the progress bar, calls the user's callback, carries an interruption over."""

    def __init__(self, pipe: Any, bar: ProgressBar, targets: int, callback: StepCallback | None) -> None:
        self.pipe, self.bar, self.targets, self.callback = pipe, bar, targets, callback
        self._done = 0

    def __call__(self, step: int, state: DecodeView) -> bool:
        if self.callback is None and self.bar.disable:
            return not self.pipe.interrupt
        left = int(state.open.sum())
        self.bar.update(self.targets - left - self._done)
        self._done = self.targets - left
        answer = None
        if self.callback is not None:
            tensors = {"ids": state.ids, "open": state.open, "confidence": state.confidence}  # copies
            answer = self.callback(self.pipe, step, left / self.targets, tensors)
        return not declines(answer) and not self.pipe.interrupt

    def finish(self) -> None:
        """The bar is full, also where end-of-text fill ended rows early."""
        self.bar.update(self.targets - self._done)


def guidance_condition(batch: TokenBatch, hides: str) -> Tensor | None:
    """bool `[B, L]`: given positions that the unconditional pass does not see, or None to leave it to the sampler.

    The task token at the head of a row stays visible, as in guidance training.
    """
    if hides == "other":
        return None
    condition = batch.given & batch.valid & (batch.positions[..., 0] > 0)
    if hides == "given":
        return condition
    return condition & (batch.modality == (Modality.TEXT if hides == "text" else Modality.IMAGE))


def trajectory_of(
    ids: Sequence[Tensor],
    slots: Sequence[TextSlot],
    text_slots: TextSlots,
    settings: PipelineSettings,
    decode: Callable[[Tensor], Tensor],
) -> Trajectory:
    """Pictures and words of every recorded state `[B, L]`; `decode` maps codes `[B, h, w]` to images `[B, 3, H, W]`."""
    vocabulary, (height, width) = settings.vocabulary, settings.grid
    stacked = torch.stack(list(ids)).cpu()  # [S, B, L]
    pictures = stacked[..., settings.text_length :].unflatten(-1, (height, width))  # [S, B, h, w]
    hidden = pictures == vocabulary.image_mask
    # Open cells show the final codes under their cover, so that the decoder does not bleed wrong colours around them.
    codes = torch.where(hidden, pictures[-1:], pictures) - vocabulary.image[0]
    frames, seen = [], None
    for now, cover in zip(codes, hidden, strict=True):
        if seen is None or not torch.equal(now, seen[0]):
            seen = (now, decode(now).cpu())
        frames.append(to_frames(seen[1], cover))
    texts = [[_words(row, slot, text_slots, vocabulary.mask_id) for row, slot in zip(s, slots)] for s in stacked]
    return Trajectory(stacked, torch.stack(frames), texts)


def _words(ids: Tensor, slot: TextSlot, text_slots: TextSlots, mask_id: int) -> str:
    """The text of one state: known words as far as the first end-of-text, one ` _` per open token."""
    parts: list[str] = []
    run: list[int] = []
    start = text_slots.settings.vocabulary.text[0]
    for i in ids[slot.start : slot.length].tolist():
        if i == mask_id:
            parts += [text_slots.tokenizer.decode(run), " _"]
            run = []
        elif i - start == text_slots.tokenizer.eos_id:
            break
        else:
            run.append(i - start)
    return "".join([*parts, text_slots.tokenizer.decode(run)]).strip()
