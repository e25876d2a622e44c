"""`Request`: everything one call of the sampler owns. Nothing of it lives in the sampler, the model or the process."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.arguments import UNUSABLE
from unidiff.decoding.cache.base import RefreshPolicy
from unidiff.decoding.commit.base import CommitRule
from unidiff.decoding.config import Guidance, SamplerConfig
from unidiff.decoding.draw import RowNoise
from unidiff.decoding.forward import StreamedModel
from unidiff.decoding.graphs import PassGraphs
from unidiff.decoding.state import DecodeState, EndOfText, ModalityProgress
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary

_AT_ONCE = 256  # positions whose logits are looked at for a complaint
_PATIENCE = 64  # passes in a row in which a policy may withhold every logit
_WIDTHS = 8  # different gather widths per modality; varying shapes cost memory and recompilation


@dataclass
class PassWork:
    """What one modality does in one pass.

    Attributes:
        candidates: bool `[B, L]`, positions whose logits are asked for.
        decided: all candidates are filled whatever the model says (rules that do not look at confidences).
        quota: int64 `[B]`. sigma: float64 `[B]`, ReMDM's chance. time: float64 `[B]`. scale: guidance `[B]`.
        width: most candidates in a row, rounded up so that few different shapes occur. guided: some row has scale != 1.
    """

    progress: ModalityProgress
    candidates: Tensor
    decided: bool
    quota: Tensor
    sigma: Tensor
    time: Tensor
    scale: Tensor
    width: int = 0
    guided: bool = False

    def shown(self, logits: Tensor | None) -> Tensor:
        """Candidates whose logits the cache policy shows, bool `[B, L]`; the progress of rows without any stands still."""
        if logits is None:
            return self.candidates
        shown = self.candidates & logits
        self.progress.hold(self.candidates.any(1) & ~shown.any(1))
        return shown


class Request:
    """State, streams, noise and bookkeeping of one decode.

    Args:
        policy: of this request. The others as in `Sampler`.
    Attributes:
        stream_of: unconditional stream of each modality with targets. further: those that are mixed in besides.
        is_finite: bool scalar, False once a model returned logits that cannot be used.
        unfinished: int64, rows that are not finished, and some that are so that their number takes few values; None for all.
    """

    def __init__(
        self,
        model: Denoiser,
        vocabulary: Vocabulary,
        config: SamplerConfig,
        batch: TokenBatch,
        seeds: Tensor,
        condition: Tensor | None,
        policy: RefreshPolicy,
        others: Sequence[TokenBatch],
        graphs: PassGraphs | None,
        rules: Mapping[Modality, CommitRule],
    ) -> None:
        self.order, self.noise = config.order, RowNoise(seeds, batch.valid)
        found: dict[Modality, ModalityProgress] = {}
        self._block_size: dict[Modality, int] = {}  # most positions of a block
        uncond_masks: list[Tensor] = []
        for modality, settings in ((Modality.TEXT, config.text), (Modality.IMAGE, config.image)):
            progress = ModalityProgress(modality, settings, batch, rules.get(modality))
            most = int(progress.targets.sum(1).max())
            if not most:
                continue
            start, stop = vocabulary.range_of(modality)
            if start == stop:
                raise ValueError(f"the batch has {modality.name.lower()} targets, but the vocabulary has no such ids")
            found[modality], self._block_size[modality] = progress, min(most, settings.block_length or most)
            uncond_masks.append(config.guidance.uncond_mask(modality, batch, condition))
        self.stream_of = {modality: number for number, modality in enumerate(found, 1)}
        if len(found) == 2 and (others or bool((uncond_masks[0] == uncond_masks[1]).all())):  # one serves both
            uncond_masks.pop()
            self.stream_of = dict.fromkeys(found, 1)
        guided = any(config.guidance.full_scale(modality) != 1 for modality in found)
        if not guided and not config.guidance.further:  # no memory for unused streams
            uncond_masks, others = [], ()
        self.further = tuple(range(2, 1 + len(others)))
        self.state = DecodeState.start(batch.hide_targets(vocabulary), found)
        ends = [i for i in (vocabulary.specials.get("eos"), *config.ends) if i is not None]
        fills = config.stop_at_eos and Modality.TEXT in found and bool(ends)
        self._end_of_text = EndOfText(batch, ends, ends[0] if config.fill is None else config.fill) if fills else None
        self.model = StreamedModel(
            model, vocabulary, batch, uncond_masks, policy, self.state.max_logits, others, graphs
        )
        self.is_finite = torch.ones((), dtype=torch.bool, device=batch.ids.device)
        self.unfinished: Tensor | None = None
        self._most = sum(_most_passes(progress) for progress in found.values())  # passes that may write
        self._wrote = 0  # passes that did
        self._stalled = 0  # passes in a row that asked for logits and wrote nothing
        self._busy = False  # the coming pass asks for logits

    def waiting(self, modality: Modality) -> Tensor:
        """bool `[B]`: rows whose other modality goes first, or is behind, and is not complete."""
        state, own = self.state, self.state.progress[modality]
        leader = next((p for name, p in state.progress.items() if name != modality), None)
        if leader is not None and not state.finishing:
            if self.order == "level":
                return own.left(state.masked) < leader.left(state.masked)
            if self.order == f"{leader.modality.name.lower()}_first":
                return (state.masked & leader.targets).any(1) | leader.pending
        return torch.zeros_like(own.running)

    def synchronise(self, work: Sequence[PassWork], blame: Callable[[], str]) -> bool:
        """Read the flags of a pass from the device in one go; False when nothing is left to do.

        Args:
            blame: says why logits could not be used.

        Raises:
            ValueError: the last pass met logits that cannot be used.
            RuntimeError: a policy withholds every logit, pass after pass.
        """
        state = self.state
        alive = state.masked.any(1) if state.finishing else state.unfinished  # [B]
        flags = [alive.sum(), self.is_finite, state.just_unmasked.any()]
        for w in work:
            flags += [w.candidates.sum(1).max(), (w.scale != 1).any()]
        left, is_finite, wrote, *rest = torch.stack([f.long() for f in flags]).tolist()
        if not is_finite:
            raise ValueError(blame())
        self._stalled = 0 if wrote or not self._busy else self._stalled + 1
        self._wrote += wrote
        if self._wrote > self._most:
            raise ValueError(
                f"more than {self._most} passes wrote tokens, which no settings ask for; a cache policy of your own writes in "
                "the state of the decode, which it may only read"
            )
        for w, most, guided in zip(work, rest[::2], rest[1::2], strict=True):
            unit = math.ceil(self._block_size[w.progress.modality] / _WIDTHS)
            w.width = min(unit * math.ceil(most / unit), state.masked.shape[1])
            w.guided = bool(guided) or bool(self.further)
        self._busy = any(w.width for w in work)
        if left and self._stalled > _PATIENCE:
            raise RuntimeError(
                f"nothing was decoded in {self._stalled} passes; the cache policy never asks for logits at the open positions"
            )
        rows, unit = len(alive), math.ceil(len(alive) / _WIDTHS)
        kept = unit * math.ceil(left / unit)
        self.unfinished = (~alive).long().argsort(stable=True)[:kept] if kept < rows else None
        return bool(left)

    def streams_of(self, work: PassWork) -> list[int]:
        """The conditional stream, and the unconditional ones that are mixed in for one modality."""
        return [0, self.stream_of[work.progress.modality], *self.further] if work.guided else [0]

    def open_streams(self, work: Sequence[PassWork]) -> None:
        """Tell the state which streams this pass mixes in, and bool `[B]` for each which rows have a use for it."""
        users: dict[int, Tensor] = {}
        for w in work:
            own = w.candidates.any(1)  # [B]
            guided = own if self.further else own & (w.scale != 1)
            for stream in self.streams_of(w):
                rows = guided if stream else own
                users[stream] = users[stream] | rows if stream in users else rows
        self.state.streams, self.state.users = tuple(sorted(users)), users

    def time(self, work: Sequence[PassWork]) -> Tensor:
        """Diffusion time `[B]` for time-conditioned models: that of the row's modality which is furthest behind.

        A modality of which a row has nothing to fill, or nothing left, does not count.
        """
        busy = [(self.state.masked & w.progress.targets).any(1) | w.progress.pending for w in work]
        return torch.stack([torch.where(row, w.time, 0.0) for row, w in zip(busy, work, strict=True)]).amax(0)

    def end_pass(self) -> None:
        """Close finished texts and move on."""
        state = self.state
        if self._end_of_text is not None:
            state.freeze(self._end_of_text.closed(state.ids, state.masked), self._end_of_text.fill)
        for progress in state.progress.values():
            progress.end_pass()
        state.step += 1

    def complaint(self, vocabulary: Vocabulary, guidance: Guidance, banned: dict[Modality, Tensor]) -> str:
        """The sentence for a pass that met unusable logits: looks at each guidance stream alone, without settings.

        Args:
            banned: offsets that may not be emitted, by modality.
        """
        state, model = self.state, self.model
        dtype = model.features(0).dtype
        for modality, progress in state.progress.items():
            start, stop = vocabulary.range_of(modality)
            for stream in state.streams:
                for features in model.features(stream)[progress.targets].split(_AT_ONCE):  # [n, D]
                    logits: Any = model.denoiser.head(features, start, stop)  # [n, V]
                    top = logits.amax(-1)
                    if bool((top.isnan() | (top == torch.inf)).any()):
                        return UNUSABLE
                    left = logits.index_fill(-1, banned[modality].to(logits.device), -torch.inf).amax(-1)
                    if stream == 0 and bool((left == -torch.inf).any()):
                        return (
                            f"the model gives no {modality.name.lower()} id that may be emitted any probability at some position; "
                            "check the weights, and what `forbid` excludes"
                        )
        blamed = []
        if state.streams != (0,):
            scales = {name: getattr(guidance, name) for name in ("scale", "text_scale", "image_scale")}
            named = [f"guidance.{name} = {value:g}" for name, value in scales.items() if value is not None]
            blamed += [*named, f"guidance.further = {guidance.further}"] if guidance.further else named
        for modality, progress in state.progress.items():
            if (name := progress.rule.adjusts) is not None:
                blamed.append(f"{modality.name.lower()}.{name} = {getattr(progress.settings, name):g}")
        if not blamed:
            return UNUSABLE
        return (
            f"the settings take logits beyond what {str(dtype).removeprefix('torch.')} holds, although the model's own are finite: "
            f"{', '.join(blamed)}; lower them, or use a wider dtype"
        )


def _most_passes(progress: ModalityProgress) -> int:
    """Passes that may write tokens of a modality: one per token, those of its plan, and one per token masked again."""
    targets, planned = torch.stack([progress.targets.sum(), progress.shares.total.max()]).tolist()
    return targets + planned + len(progress.targets) * progress.settings.remask_budget
