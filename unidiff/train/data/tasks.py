"""Training batches. `TaskMixer`: which positions of each row are given, how many are hidden, and what a hidden token weighs.

Every draw is a function of (seed, global sample index), so batch size, ranks and workers change nothing. The hidden set
has an exact size: with N targets and rate r, n = ceil(r N) of them, chosen by ranking keyed noise. For r uniform, n is
uniform on 1..N and the weight N / n gives the mask-count form of the NELBO, whose variance is far below that of
independent coin flips with weight 1 / r.

Block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573, section 3.1 and algorithm 1): when a block is decoded, the
blocks before it are finished. So every noisy block must learn from *clean* earlier blocks, all in one pass: a row holds each
sample twice, clean and noisy (`double_rows`), and `Visibility` says what each copy sees. Each block has a time of its own. The
loss is the sum of the blocks' NELBOs given the blocks before them, which bounds -log p of the row more tightly than one time
for all.

Packing: samples of different lengths share rows (`pack_tasks`), and attention keeps them apart. A packed batch trains exactly
as the batch it was made from: every token keeps its position in its sample, its noise, its rate and its weight, and sees the
tokens of its own sample only (`TokenBatch.sample_ids`). Only the padding goes.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.data.sources import MixtureSchedule
from unidiff.diffusion.noise import NoisyBatch, keyed_bits, keyed_uniform, mask_tokens
from unidiff.diffusion.objective import head_parts
from unidiff.diffusion.streamed_nll import HeadPart
from unidiff.models.trained_on import TASKS
from unidiff.tokens import Modality, Span, TokenBatch, Visibility, Vocabulary
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig
from unidiff.train.data.shard_source import DocumentTokens
from unidiff.train.data.source import TokenRows, TokenSource

_TASK_STREAM, _MASK_STREAM, _TIME_STREAM, _BLOCK_STREAM = 101, 102, 103, 104
SOFTMIN_GAMMA = 5.0  # UniDisc's softmin_snr
_STEP = -7046029254386353131  # 2^64 / golden ratio: the additive step of a low-discrepancy sequence


@dataclass(frozen=True)
class TaskBatch:
    """A batch of mixed tasks, ready to be masked: a target is hidden where `noise < rate`, which are ceil(rate * targets).

    Attributes:
        batch: clean ids with `given` set per task; a dropped condition is given as [MASK].
        task: index into `TASKS`; `[B, L]` where samples share rows or have several rates.
        rate: share of the targets to hide. weight: of a position in the loss if it is hidden.
        visible: which keys a query may see, where that is not the batch's own `visibility()`.
    """

    batch: TokenBatch
    task: Tensor  # int64 [B] or [B, L]
    rate: Tensor  # float64, as `task`
    noise: Tensor  # float64 [B, L]
    weight: Tensor  # float32 [B, L]
    visible: Visibility | None = None

    @classmethod
    def cat(cls, parts: Sequence[TaskBatch]) -> TaskBatch:
        """Stack batches of any lengths along rows, with padding behind the shorter ones; all of one sample per row."""
        if len(parts) == 1:
            return parts[0]
        batch = TokenBatch.cat([part.batch for part in parts])
        task, rate = (torch.cat([getattr(part, name) for part in parts]) for name in ("task", "rate"))
        noise, weight = (
            torch.cat([F.pad(v := getattr(part, name), (0, batch.shape[1] - v.shape[1]), value=fill) for part in parts])
            for name, fill in (("noise", 1.0), ("weight", 0.0))
        )
        return cls(batch, task, rate, noise, weight)


@dataclass(frozen=True)
class HiddenBatch:
    """A batch of mixed tasks as a step takes it. It is made on the host, which so knows how much is hidden, and then moved.

    Attributes:
        clean, noisy: before and after hiding.
        visible: which keys a query may see; None for all.
        parts: the hidden positions, gathered for the head.
    """

    clean: TaskBatch
    noisy: NoisyBatch
    visible: Visibility | None
    parts: tuple[HeadPart, ...]

    @classmethod
    def of(cls, clean: TaskBatch, vocabulary: Vocabulary, chunk: int) -> HiddenBatch:
        """With exactly ceil(rate * targets) hidden in each row, `chunk` positions at most in a part's chunk."""
        noisy = mask_tokens(clean.batch, clean.rate, vocabulary, clean.noise)
        visible = clean.visible or noisy.batch.visibility()
        return cls(clean, noisy, visible, head_parts(noisy.masked, clean.batch, vocabulary, chunk))


class TaskMixer:
    """Makes the batches of a run from samples: the only place that does.

    Args:
        source: tokens of pairs by global sample index.
        crop_fill: probability that the EOS fill is cut to a random length.
        block_length: every block of so many positions of a sample has a rate of its own (block diffusion); 0: one per row.
        documents: take `document_share` of the samples, by exact shares and a fixed order. Text and pictures of a document
            are hidden at one rate, with the settings of `generate`.
        pack: tokens of a row that samples share; 0 gives each a row of its own.

    Raises:
        ValueError: a task that the data or a block-causal model cannot have, `elbo` weights where the rate's distribution
            does not reach every count, or documents of another vocabulary or grid.
    """

    def __init__(
        self,
        source: TokenSource,
        tasks: TasksConfig,
        objective: ObjectiveConfig,
        seed: int,
        crop_fill: float = 0.0,
        block_length: int = 0,
        documents: DocumentTokens | None = None,
        document_share: float = 0.5,
        pack: int = 0,
    ) -> None:
        self.source, self.objective, self.seed, self.crop_fill = source, objective, seed, crop_fill
        self.block_length, self.documents, self.pack = block_length, documents, pack
        if block_length and tasks.caption.weight + tasks.answer.weight > 0:
            raise ValueError(
                "a block-causal model sees no later block, so a caption or answer cannot see the picture behind it; "
                "set tasks.caption.weight and tasks.answer.weight to 0"
            )
        if documents is not None and (documents.vocabulary, documents.grid) != (source.vocabulary, source.grid):
            raise ValueError("data.documents has another vocabulary or grid than data.train; encode them alike")
        if documents is not None and block_length:
            raise ValueError(
                "documents have no blocks, so no block-causal model can train on them; empty data.documents"
            )
        if tasks.answer.weight > 0 and not source.has_questions:
            raise ValueError("tasks.answer.weight is above 0 but the data has no questions; set it to 0 or add some")
        self.settings: tuple[TaskConfig, ...] = tuple(getattr(tasks, name) for name in TASKS)
        for name, settings in zip(TASKS, self.settings, strict=True):
            if settings.loss == "elbo" and settings.rates.mask_rate(torch.zeros(())) > 0:
                raise ValueError(f"tasks.{name}: loss elbo needs a rate that reaches 0; use uniform, cosine or beta")
        weights = torch.tensor([s.weight for s in self.settings], dtype=torch.float64)
        ids = source.vocabulary
        spans = [Span.masked_text(source.text_length, ids), Span.masked_image(source.grid, ids)]
        self._layout = TokenBatch.from_spans([spans])  # of every row
        self._edges = (weights / weights.sum()).cumsum(0)
        self._schedule = MixtureSchedule((1 - document_share, document_share), seed) if documents is not None else None

    def batch(self, first: int, count: int) -> TaskBatch:
        """The samples `first .. first + count - 1` as the model sees them, pairs before documents."""
        if self._schedule is None or self.documents is None:
            return self.ready(self.of(torch.arange(first, first + count)))
        places = [self._schedule.locate(i) for i in range(first, first + count)]
        pairs, documents = (torch.tensor([n for kind, n in places if kind == wanted]) for wanted in (0, 1))
        parts = [self.of(pairs)] if len(pairs) else []
        if len(documents):
            task = torch.full_like(documents, TASKS.index("generate"))
            # draws of their own: pairs count upwards
            parts.append(self._masked(-1 - documents, task, self.documents.fetch(documents)))
        return self.ready(TaskBatch.cat(parts))

    def ready(self, micro: TaskBatch) -> TaskBatch:
        """Rows of one sample each, doubled for a block-causal model or packed where the run packs."""
        if self.block_length:
            return double_rows(micro, self.block_length)
        return pack_tasks(micro, self.pack) if self.pack else micro

    def of(self, index: Tensor, task: int | None = None) -> TaskBatch:
        """The pairs `index` (int64 `[B]`), one per row; `task` overrides the drawn task (validation)."""
        draw = keyed_uniform(self.seed, index, _TASK_STREAM, 4)  # [B, 4]: task, dropout, crop?, crop where
        chosen = torch.searchsorted(self._edges, draw[:, 0].contiguous(), right=True).clamp_max(len(TASKS) - 1)
        if task is not None:
            chosen = torch.full_like(chosen, task)
        batch, uncond_mask = self._lay_out(self.source.fetch(index), chosen, draw)
        # a condition that is dropped becomes given [MASK]: seen by the model as hidden, never a target
        batch = batch.hide(uncond_mask, self.source.vocabulary).replace(given=batch.given | uncond_mask)
        return self._masked(index, chosen, batch)

    def _masked(self, index: Tensor, chosen: Tensor, batch: TokenBatch) -> TaskBatch:
        """Clean rows with what is hidden of them for the tasks `chosen`, by draws keyed by `index` (both int64 `[B]`)."""
        noise = keyed_uniform(self.seed, index, _MASK_STREAM, batch.shape[1])  # [B, L]
        is_image, weights = batch.modality == Modality.IMAGE, self.objective
        modality_weight = torch.where(is_image, weights.image_weight, weights.text_weight)  # [B, L]
        if self.block_length:
            noise, rate, weight = self._block_rates(index, chosen, batch, noise)  # [B, L] each
            weight = (weight * modality_weight).float()
            return TaskBatch(batch, chosen[:, None].expand_as(rate), rate, noise, weight)
        noise, total = rank_noise(noise, batch.targets)
        rate, row_weight = self._rates(self.times(index), chosen, total)  # [B], [B]
        return TaskBatch(batch, chosen, rate, noise, (row_weight[:, None] * modality_weight).float())

    def _block_rates(
        self, index: Tensor, task: Tensor, batch: TokenBatch, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noise ranked within each block, the block's rate, and its weight, at every position."""
        block = torch.div(batch.positions[..., 0], self.block_length, rounding_mode="floor")  # [B, L]
        count = int(block.max()) + 1
        members = F.one_hot(block, count).bool() & batch.targets[..., None]  # [B, L, K]
        per_block = noise[:, None].expand(-1, count, -1).flatten(0, 1)  # [B * K, L]
        ranked, total = rank_noise(per_block, members.transpose(1, 2).flatten(0, 1))
        noise = ranked.view(-1, count, block.shape[1]).gather(1, block[:, None])[:, 0]
        times = keyed_uniform(self.seed, index, _BLOCK_STREAM, count)  # [B, K]
        rate, weight = self._rates(times, task[:, None], total.view(-1, count).clamp_min(1))
        return noise, rate.gather(1, block), weight.gather(1, block)

    def times(self, index: Tensor) -> Tensor:
        """float64 `[B]`, a low-discrepancy sequence over the sample index: any run of samples covers (0, 1) evenly."""
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
        vocabulary, grid = self.source.vocabulary, self.source.grid
        together, to_image, caption, answer, text_only = (task == n for n in range(len(TASKS)))  # [B] each
        text, prefix = rows.captions, torch.full_like(task, self.source.text_prefix)
        if rows.questions is not None and rows.answer_start is not None:
            text = torch.where(answer[:, None], rows.questions, text)  # [B, T]
            prefix = torch.where(answer, rows.answer_start, prefix)
        count, length = text.shape
        place = torch.arange(length)
        given_text = (place < prefix[:, None]) | to_image[:, None]  # [B, T]
        given_image = (caption | answer | text_only)[:, None].expand(-1, grid[0] * grid[1])  # [B, h*w]
        ids = torch.cat([text + vocabulary.text[0], rows.codes.flatten(1) + vocabulary.image[0]], 1)  # [B, L]
        given = torch.cat([given_text, given_image], 1)

        # The condition is everything given except the task token, and a caption's always-given prefix.
        rates = torch.tensor([0.0, *(s.dropout for s in self.settings[1:4]), 1.0], dtype=torch.float64)
        dropped = draw[:, 1] < rates[task]  # [B]; text only = caption whose image is always hidden
        kept = place < self.source.text_prefix
        uncond_mask = torch.cat([given_text & ~kept, given_image], 1) & dropped[:, None] & ~together[:, None]

        valid = torch.ones_like(given)
        if self.crop_fill > 0:
            eos = vocabulary.specials["eos"] - vocabulary.text[0]
            valid[:, :length] = keep_fill(text, eos, draw[:, 2] < self.crop_fill, draw[:, 3])
        modality, positions = self._layout.modality.expand(count, -1), self._layout.positions.expand(count, -1, -1)
        batch = TokenBatch(ids, modality, given | ~valid, valid, positions, torch.where(valid, 0, -1))
        return batch, uncond_mask & valid


def rank_noise(noise: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Noise as its rank among a row's targets over their number N, so that `noise < r` holds ceil(r N) times: float64 `[B, L]`,
    with 1 outside the targets, and N, float64 `[B]`."""
    total = targets.sum(1).double()  # [B]
    order = noise.masked_fill(~targets, 2.0).argsort(1)  # [B, L]
    places = torch.arange(noise.shape[1], dtype=torch.float64, device=noise.device)
    rank = torch.empty_like(noise).scatter_(1, order, places.expand_as(noise))
    return torch.where(targets, rank / total[:, None].clamp_min(1), 1.0), total


def keep_fill(text: Tensor, eos: int, crop: Tensor, u: Tensor) -> Tensor:
    """bool `[B, T]`: False on the part of the trailing EOS fill that is cut; at least one EOS stays.

    Args:
        text: int64 `[B, T]`. eos: counted like it. crop: bool `[B]`, rows to cut. u: `[B]` in (0, 1), picks the new length.
    """
    length = text.shape[1]
    is_fill = (text == eos).flip(1).long().cumprod(1).flip(1)  # [B, T] trailing run of EOS
    fill = is_fill.sum(1)  # [B]
    keep = torch.where(crop, 1 + (u * fill).long().clamp_max((fill - 1).clamp_min(0)), fill)
    return torch.arange(length) < (length - fill + keep)[:, None]


def double_rows(micro: TaskBatch, block_length: int) -> TaskBatch:
    """`[B, L]` rows, with `rate` and `task` per token, as `[B, 2 L]`: the clean tokens, all given, then those to be masked.

    `block_length` is counted in each sample.
    """
    batch = micro.batch
    clean = batch.replace(given=torch.ones_like(batch.given))
    both = TokenBatch(**{name: torch.cat([value, getattr(batch, name)], 1) for name, value in clean.columns().items()})
    return TaskBatch(
        both,
        task=micro.task.repeat(1, 2),
        rate=micro.rate.repeat(1, 2),
        noise=torch.cat([torch.ones_like(micro.noise), micro.noise], 1),
        weight=torch.cat([torch.zeros_like(micro.weight), micro.weight], 1),
        visible=block_visibility(batch, block_length),
    )


def block_visibility(batch: TokenBatch, block_length: int) -> Visibility:
    """What the `[B, 2 L]` tokens of `double_rows` may see."""
    block = torch.div(batch.positions[..., 0], block_length, rounding_mode="floor")  # [B, L]
    sample = batch.sample_ids.masked_fill(~batch.valid, -1)
    clean = torch.zeros_like(batch.valid)
    return Visibility(sample.repeat(1, 2), block.repeat(1, 2), torch.cat([clean, ~clean], 1))


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sample numbers of each row, as few rows as best-fit decreasing finds: longest first, each where it leaves least room.

    Args:
        lengths: tokens of each sample. capacity: tokens of a row.

    Raises:
        ValueError: a sample without tokens, or one longer than a row.
    """
    for number, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {number} has {length} tokens; rows hold 1 to {capacity}, raise data.pack")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        place = bisect_left(room, (lengths[number], -1))
        free, row = room.pop(place) if place < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        insort(room, (free - lengths[number], row))
    return rows


def pack_tasks(micro: TaskBatch, capacity: int) -> TaskBatch:
    """The same samples in rows of `capacity` tokens; `task` and `rate` are then per token, `[rows, capacity]`."""
    batch, valid = micro.batch, micro.batch.valid
    lengths = valid.sum(1)  # [B]
    bins = pack_lengths(lengths.tolist(), capacity)
    start = torch.zeros_like(lengths)  # of each sample, in all rows one after the other
    for number, members in enumerate(bins):
        start[members] = number * capacity + lengths[members].cumsum(0) - lengths[members]
    place = (start[:, None] + valid.long().cumsum(1) - 1)[valid]  # [tokens]

    def packed(values: Tensor, fill: float | bool) -> Tensor:
        values = values[:, None].expand(batch.shape) if values.ndim == 1 else values
        out = values.new_full((len(bins) * capacity, *values.shape[2:]), fill)
        out[place] = values[valid]
        return out.view(len(bins), capacity, *values.shape[2:])

    # unique in any row, also where the samples' own rows held several
    rows = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    sample_ids = rows * (int(batch.sample_ids.max()) + 1) + batch.sample_ids
    fills = {"ids": 0, "modality": int(Modality.TEXT), "given": True, "valid": False, "positions": 0}
    tokens = {name: packed(getattr(batch, name), fill) for name, fill in fills.items()}
    tokens |= {name: packed(values, 0.0) for name, values in batch.continuous().items()}
    task, rate, noise = packed(micro.task, 0), packed(micro.rate, 0.0), packed(micro.noise, 1.0)
    return TaskBatch(
        TokenBatch(**tokens, sample_ids=packed(sample_ids, -1)), task, rate, noise, packed(micro.weight, 0.0)
    )
