"""Task mixture: which positions of each row are given, how many are hidden, and what a hidden token weighs in the loss.

Every draw is a function of (seed, global sample index), so batch size, ranks and workers change nothing. The hidden set
has an exact size: with N targets and rate r, n = ceil(r N) of them, chosen by ranking keyed noise. For r uniform, n is
uniform on 1..N and the weight N / n gives the mask-count form of the NELBO, whose variance is far below that of
independent coin flips with weight 1 / r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.diffusion.noise import keyed_bits, keyed_uniform
from unidiff.models.trained_on import TASKS
from unidiff.tokens import Modality, TokenBatch, Visibility, Vocabulary
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.source import TokenRows, TokenSource

_TASK_STREAM, _MASK_STREAM, _TIME_STREAM, _BLOCK_STREAM = 101, 102, 103, 104
SOFTMIN_GAMMA = 5.0  # UniDisc's softmin_snr
_STEP = -7046029254386353131  # 2^64 / golden ratio: the additive step of a low-discrepancy sequence


@dataclass(frozen=True)
class TaskBatch:
    """A batch of mixed tasks, ready to be masked.

    Attributes:
        batch: clean ids with `given` set per task; a dropped condition is given as [MASK].
        task: int64 `[B]`, index into `config.TASKS`; `[B, L]` where samples share rows.
        rate: float64 `[B]`, share of the targets to hide; `[B, L]` where samples share rows.
        noise: float64 `[B, L]`; a target is hidden where `noise < rate`, which hides exactly ceil(rate * targets).
        weight: float32 `[B, L]`, loss weight of a position if it is hidden.
        visible: which keys a query may see, where that is not the batch's own `visibility()`.
    """

    batch: TokenBatch
    task: Tensor
    rate: Tensor
    noise: Tensor
    weight: Tensor
    visible: Visibility | None = None

    def to(self, device: torch.device) -> TaskBatch:
        if device.type == "cpu":
            return self
        task, rate, noise, weight = (
            x.to(device, non_blocking=True) for x in (self.task, self.rate, self.noise, self.weight)
        )
        visible = None if self.visible is None else self.visible.to(device)
        return TaskBatch(self.batch.to(device), task, rate, noise, weight, visible)

    @classmethod
    def cat(cls, parts: Sequence[TaskBatch]) -> TaskBatch:
        """Stack batches of any lengths along rows, with padding behind the shorter ones; all of one sample per row."""
        if len(parts) == 1:
            return parts[0]
        batch = TokenBatch.cat([part.batch for part in parts])

        def stacked(name: str, fill: float) -> Tensor:
            values = [getattr(part, name) for part in parts]
            return torch.cat([torch.nn.functional.pad(v, (0, batch.shape[1] - v.shape[1]), value=fill) for v in values])

        task, rate = (torch.cat([getattr(part, name) for part in parts]) for name in ("task", "rate"))
        return cls(batch, task, rate, stacked("noise", 1.0), stacked("weight", 0.0))


class TaskMixer:
    """Makes `TaskBatch`es from a `TokenSource`.

    Args:
        source: tokens by global sample index.
        tasks: weights and settings of the five tasks.
        objective: modality weights.
        seed: of every draw.
        crop_fill: probability that the EOS fill is cut to a random length.
        block_length: every block of so many positions of a sample has a rate of its own (block diffusion); 0: one per row.

    Raises:
        ValueError: the answer task has a weight but the source has no questions, or `elbo` weights where the rate's
            distribution does not reach every count.
    """

    def __init__(
        self,
        source: TokenSource,
        tasks: TasksConfig,
        objective: ObjectiveConfig,
        seed: int,
        crop_fill: float = 0.0,
        block_length: int = 0,
    ) -> None:
        self.source, self.objective, self.seed, self.crop_fill = source, objective, seed, crop_fill
        self.block_length = block_length
        if block_length and tasks.caption.weight + tasks.answer.weight > 0:
            raise ValueError(
                "a block-causal model sees no later block, so a caption or answer cannot see the picture behind it; "
                "set tasks.caption.weight and tasks.answer.weight to 0"
            )
        self.settings: tuple[TaskConfig, ...] = tuple(getattr(tasks, name) for name in TASKS)
        if tasks.answer.weight > 0 and not source.has_questions:
            raise ValueError(
                "tasks.answer.weight is above 0 but the data has no questions; set it to 0 or add questions"
            )
        for name, settings in zip(TASKS, self.settings, strict=True):
            if settings.loss == "elbo" and settings.rates.mask_rate(torch.zeros(())) > 0:
                raise ValueError(f"tasks.{name}: loss elbo needs a rate that reaches 0; use uniform, cosine or beta")
        weights = torch.tensor([s.weight for s in self.settings], dtype=torch.float64)
        self._edges = (weights / weights.sum()).cumsum(0)

    def batch(self, first: int, count: int) -> TaskBatch:
        """The samples `first .. first + count - 1`. See `of`."""
        return self.of(torch.arange(first, first + count))

    def of(self, index: Tensor, task: int | None = None) -> TaskBatch:
        """The samples `index` (int64 `[B]`); `task` overrides the drawn task (validation)."""
        draw = keyed_uniform(self.seed, index, _TASK_STREAM, 4)  # [B, 4]: task, dropout, crop?, crop where
        chosen = torch.searchsorted(self._edges, draw[:, 0].contiguous(), right=True).clamp_max(len(TASKS) - 1)
        if task is not None:
            chosen = torch.full_like(chosen, task)
        batch, hide = self._lay_out(self.source.fetch(index), chosen, draw)
        return self.masked(index, chosen, drop_condition(batch, hide, self.source.vocabulary))

    def masked(self, index: Tensor, chosen: Tensor, batch: TokenBatch) -> TaskBatch:
        """Clean rows with what is hidden of them: rates, noise and weights of the tasks `chosen` (int64 `[B]`).

        Args:
            index: int64 `[B]`, what the draws are keyed by.
        """
        noise = keyed_uniform(self.seed, index, _MASK_STREAM, batch.shape[1])  # [B, L]
        modality_weight = torch.where(
            batch.modality == Modality.IMAGE, self.objective.image_weight, self.objective.text_weight
        )  # [B, L]
        if self.block_length:
            noise, rate, weight = self._block_rates(index, chosen, batch, noise)  # [B, L] each
            weight = (weight * modality_weight).float()
            return TaskBatch(batch, chosen[:, None].expand_as(rate), rate, noise, weight)
        noise, total = rank_noise(noise, batch.targets)
        rate, row_weight = self._rates(self._times(index), chosen, total)  # [B], [B]
        return TaskBatch(batch, chosen, rate, noise, (row_weight[:, None] * modality_weight).float())

    def _block_rates(
        self, index: Tensor, task: Tensor, batch: TokenBatch, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise ranked within each block, the block's rate, and its weight, at every position."""
        block = torch.div(batch.positions[..., 0], self.block_length, rounding_mode="floor")  # [B, L]
        count = int(block.max()) + 1
        members = torch.nn.functional.one_hot(block, count).bool() & batch.targets[..., None]  # [B, L, K]
        ranked, total = rank_noise(
            noise[:, None].expand(-1, count, -1).flatten(0, 1), members.transpose(1, 2).flatten(0, 1)
        )
        noise = ranked.view(-1, count, block.shape[1]).gather(1, block[:, None])[:, 0]
        times = keyed_uniform(self.seed, index, _BLOCK_STREAM, count)  # [B, K]
        rate, weight = self._rates(times, task[:, None], total.view(-1, count).clamp_min(1))
        return noise, rate.gather(1, block), weight.gather(1, block)

    def _times(self, index: Tensor) -> Tensor:
        # A low-discrepancy sequence over the sample index: any run of samples covers (0, 1) evenly.
        offset = keyed_bits(self.seed, torch.zeros((), dtype=torch.long), _TIME_STREAM, 1)
        bits = ((index * _STEP + offset) >> 11) & ((1 << 53) - 1)
        return (bits.double() + 0.5) * 2.0**-53

    def _rates(self, u: Tensor, task: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        rate, weight = torch.zeros_like(u), torch.zeros_like(u)
        for number, settings in enumerate(self.settings):
            r = settings.rates.draw_rate(u)
            n = (r * total).ceil().clamp_min(1)  # hidden count
            if settings.loss == "elbo":
                below = settings.rates.chance_below
                chance = below(n / total) - below((n - 1) / total)
                w = 1 / (n * chance)
            elif settings.loss == "softmin":
                share = n / total
                w = 1 / (share + (1 - share) / SOFTMIN_GAMMA)
            else:
                w = total / n if settings.loss == "inverse_rate" else torch.ones_like(n)
            if settings.per_sample:
                w = w * self.source.text_length / total.clamp_min(1)
            rate = torch.where(task == number, r, rate)
            weight = torch.where(task == number, settings.scale * w, weight)
        return rate, weight

    def _lay_out(self, rows: TokenRows, task: Tensor, draw: Tensor) -> tuple[TokenBatch, Tensor]:
        """Clean ids with `given` per task, and the bool `[B, L]` condition that guidance training hides."""
        vocabulary, (height, width) = self.source.vocabulary, self.source.grid
        together, to_image, caption, answer, text_only = (task == n for n in range(len(TASKS)))  # [B] each
        text, prefix = rows.captions, torch.full_like(task, self.source.text_prefix)
        if rows.questions is not None and rows.answer_start is not None:
            text = torch.where(answer[:, None], rows.questions, text)  # [B, T]
            prefix = torch.where(answer, rows.answer_start, prefix)
        count, length = text.shape
        place = torch.arange(length)
        given_text = (place < prefix[:, None]) | to_image[:, None]  # [B, T]
        given_image = (caption | answer | text_only)[:, None].expand(-1, height * width)  # [B, h*w]
        ids = torch.cat([text + vocabulary.text[0], rows.codes.flatten(1) + vocabulary.image[0]], 1)  # [B, L]
        given = torch.cat([given_text, given_image], 1)

        # The condition is everything given except the task token, and a caption's always-given prefix.
        rates = torch.tensor([0.0, *(s.dropout for s in self.settings[1:4]), 1.0], dtype=torch.float64)
        dropped = draw[:, 1] < rates[task]  # [B]; text only = caption whose image is always hidden
        kept = place < self.source.text_prefix
        hide = torch.cat([given_text & ~kept, given_image], 1) & dropped[:, None] & ~together[:, None]

        valid = torch.ones_like(given)
        if self.crop_fill > 0:
            eos = vocabulary.specials["eos"] - vocabulary.text[0]
            valid[:, :length] = keep_fill(text, eos, draw[:, 2] < self.crop_fill, draw[:, 3])
        total = length + height * width
        positions = torch.zeros(total, 3, dtype=torch.long)
        positions[:, 0] = torch.arange(total)
        positions[length:, 1] = torch.arange(height).repeat_interleave(width)
        positions[length:, 2] = torch.arange(width).repeat(height)
        modality = torch.zeros(total, dtype=torch.long)
        modality[length:] = int(Modality.IMAGE)
        sample_ids = torch.where(valid, 0, -1)
        batch = TokenBatch(
            ids, modality.expand(count, -1), given | ~valid, valid, positions.expand(count, -1, -1), sample_ids
        )
        return batch, hide & valid


def drop_condition(batch: TokenBatch, hide: Tensor, vocabulary: Vocabulary) -> TokenBatch:
    """`hide` positions (bool `[B, L]`) become given [MASK]: seen by the model as hidden, never a target."""
    mask = torch.where(batch.modality == Modality.IMAGE, vocabulary.image_mask, vocabulary.mask_id)
    return batch.replace(ids=torch.where(hide, mask, batch.ids), given=batch.given | hide)


def rank_noise(noise: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Replace noise by its rank among a row's targets over their number N, so that `noise < r` holds ceil(r N) times.

    Returns:
        (float64 `[B, L]`, with 1 outside the targets; float64 `[B]`, N)
    """
    total = targets.sum(1).double()  # [B]
    order = noise.masked_fill(~targets, 2.0).argsort(1)  # [B, L]
    rank = torch.empty_like(noise).scatter_(1, order, torch.arange(noise.shape[1]).double().expand_as(noise))
    return torch.where(targets, rank / total[:, None].clamp_min(1), 1.0), total


def keep_fill(text: Tensor, eos: int, crop: Tensor, u: Tensor) -> Tensor:
    """bool `[B, T]`: False on the part of the trailing EOS fill that is cut; at least one EOS stays.

    Args:
        text: int64 `[B, T]` with an EOS fill at the end (or none).
        eos: its id, counted like `text`.
        crop: bool `[B]`, rows to cut.
        u: `[B]` in (0, 1), picks the new length uniformly.
    """
    length = text.shape[1]
    is_fill = (text == eos).flip(1).long().cumprod(1).flip(1)  # [B, T] trailing run of EOS
    fill = is_fill.sum(1)  # [B]
    keep = torch.where(crop, 1 + (u * fill).long().clamp_max((fill - 1).clamp_min(0)), fill)
    return torch.arange(length) < (length - fill + keep)[:, None]
