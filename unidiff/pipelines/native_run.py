"""One decode of `UniDiffPipeline`: rows and options in, words and pixels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding import Sampler, SamplerConfig
from unidiff.decoding.cache.auto import choose_cache
from unidiff.pipelines.arguments import check_rows
from unidiff.pipelines.candidates import candidate_seeds, keep_best
from unidiff.pipelines.checks import check_negative, untrained_note
from unidiff.pipelines.decode import StepWatcher, guidance_condition, trajectory_of
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.rows import TextSlot
from unidiff.pipelines.seeds import row_seeds
from unidiff.pipelines.settings import by_modality, check_candidates, with_overrides
from unidiff.tokens import TokenBatch
from unidiff.tokens.known_words import notes_on


@dataclass(frozen=True)
class TaskRows:
    """The B rows of one call.

    Args:
        task: one of `TASKS`.
        slots: the text of each row.
        codes: int64 `[B, h, w]`; None for pictures that are hidden entirely.
        hidden: bool `[B, h, w]`, codes to decode again; None for none of them.
        said: texts of the caller, whose words the model should know.
        per_entry: rows for each entry of the caller's list.
        negative: text slots that guidance leads away from.
        shown: float `[B, 3, H, W]`, pictures to give back as they are, where none is drawn.
        paste: pixels `[B, 3, H, W]` to put back outside a mask `[B, H, W]`.
    """

    task: str
    slots: Sequence[TextSlot]
    codes: Tensor | None = None
    hidden: Tensor | None = None
    said: Sequence[str] = ()
    per_entry: int = 1
    negative: Sequence[TextSlot] | None = None
    shown: Tensor | None = None
    paste: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def decode_rows(pipe: Any, rows: TaskRows, options: Mapping[str, Any]) -> UniDiffOutput:
    """The one path of all tasks.

    Args:
        pipe: a `UniDiffPipeline`. options: those of `DecodeOptions` that the caller gave.

    Raises:
        ValueError: nothing to decode, seeds that do not go with the rows, or an option out of range.
    """
    settings, slots = pipe.settings, rows.slots
    # 1. settings of the decode
    config = _config(pipe, rows, options)
    candidates = options.get("num_candidates")
    candidates = settings.num_candidates.get(rows.task, 1) if candidates is None else candidates
    check_candidates(candidates)
    check_rows(len(slots) * candidates)
    seeds = candidate_seeds(row_seeds(options.get("generator"), len(slots), rows.per_entry), candidates)
    # 2. rows: text span, image span, what is known
    tries = torch.arange(len(slots)).repeat_interleave(candidates)

    def laid(texts: Sequence[TextSlot]) -> TokenBatch:
        return pipe._rows(texts, rows.codes, rows.hidden).rows(tries)  # [B * candidates, L]

    batch, away = laid(slots), None
    if rows.negative is not None:
        worded = any(slot != pipe.text_slots.unsaid() for slot in rows.negative)
        check_negative(config.guidance, options.get("guidance_hides"), worded)
        away = laid(rows.negative)
    condition = guidance_condition(batch, config.guidance.hide) if away is None else None
    choice = choose_cache(options.get("cache"), options.get("policy"), batch, config, pipe.transformer)
    notes = untrained_note(rows.task, settings) + notes_on(rows.said, pipe.texts)
    # 3. decode
    pipe._interrupt, targets = False, int(batch.targets.sum())
    with pipe.progress_bar(total=targets) as bar:
        watcher = StepWatcher(pipe, bar, targets, options.get("callback_on_step_end"))
        graphs, record = options.get("graphs", False), bool(options.get("record_trajectory", False))
        run = Sampler(pipe.transformer, settings.vocabulary, config, choice.policy, graphs=graphs)
        out = run(batch, seeds.to(batch.ids.device), condition, watcher, record, away)
        watcher.finish()
    if candidates > 1:
        out, best = keep_best(out, pipe.transformer, settings.vocabulary, candidates)
        seeds = seeds[best.cpu()]
    # 4. back to words and pixels
    ids = out.batch.ids.cpu()
    text_ids = [pipe.text_slots.words(row, slot) for row, slot in zip(ids, slots, strict=True)]
    codes = ids[:, settings.text_length :].unflatten(1, settings.grid) - settings.vocabulary.image[0]  # [B, h, w]
    trajectory = None
    if out.trajectory is not None:
        trajectory = trajectory_of(out.trajectory, slots, pipe.text_slots, settings, pipe.images.decode)
    return UniDiffOutput(
        images=pictures(pipe, codes, options.get("output_type", "pil"), rows.shown, rows.paste),
        texts=[pipe.texts.decode(words).strip() for words in text_ids],
        codes=codes,
        text_ids=text_ids,
        ids=ids,
        confidences=out.confidence.cpu(),
        nfe=out.nfe,
        seconds=out.seconds,
        seeds=seeds,
        trajectory=trajectory,
        stats=out.stats,
        cache=choice.config,
        cache_note=choice.note,
        notes=notes,
    )


def pictures(
    pipe: Any, codes: Tensor, output_type: str, shown: Tensor | None, paste: tuple[Tensor, Tensor] | None
) -> Any:
    """Pictures of codes `[B, h, w]` as `output_type` says, for any pipeline; `shown` and `paste` as in `TaskRows`."""
    if output_type == "codes":
        return codes
    images = pipe.images.decode(codes).cpu() if shown is None else shown  # [B, 3, H, W]
    if paste is not None:
        original, mask = paste
        images = torch.where(mask[:, None], images, original)
    return pipe.image_inputs.output(images, output_type)


def _config(pipe: Any, rows: TaskRows, options: Mapping[str, Any]) -> SamplerConfig:
    """The task's sampler settings with the caller's options on top."""
    never = pipe.text_slots.never(closed=all(slot.closed for slot in rows.slots))
    drawn = rows.task == "text_to_image"
    own = options.get("sampler")
    return with_overrides(
        pipe.settings.sampler(rows.task) if own is None else own,
        options.get("steps"),
        options.get("guidance_scale"),
        options.get("guidance_hides"),
        options.get("temperature"),
        never,
        by_modality("block_length", options.get("block_length"), ("text", "image")),
        by_modality("threshold", options.get("threshold"), ("image",) if drawn else ("text",)),
    )
