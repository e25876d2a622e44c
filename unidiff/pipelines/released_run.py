"""One decode of a released family: the caller's options over the family's settings, seeds, cache, callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from unidiff.decoding import CacheConfig, RefreshPolicy, SamplerConfig
from unidiff.decoding.cache.auto import CacheChoice, choose_cache
from unidiff.families.checkpoint.load import Released
from unidiff.families.tasks import TaskRequest, TaskResult, run_task
from unidiff.pipelines.arguments import check_rows
from unidiff.pipelines.decode import StepCallback, StepWatcher
from unidiff.pipelines.holes import letters_note
from unidiff.pipelines.native_run import pictures
from unidiff.pipelines.output import UniDiffOutput
from unidiff.pipelines.seeds import RowGenerator, row_seeds
from unidiff.pipelines.settings import by_modality, with_overrides
from unidiff.schema import check_value
from unidiff.tokens.known_words import notes_on


@dataclass(frozen=True)
class ReleasedOptions:
    """Everyday knobs of one call; None keeps the family's default. They mean what they mean in `DecodeOptions`.

    Args:
        generator: None, an int, a torch generator, or a list with one of either per row.
        steps, guidance_scale, temperature: of the task's sampler settings.
        image_guidance_scale: strength of the second direction of an edit, away from what comes without the pictures.
        sampler: replaces the family's settings; the others still apply on top.
        cache: the name of a cache, a `CacheConfig`, or "auto". policy: a policy object of your own instead.
        block_length, threshold: one number, or one per modality as `{"text": ..., "image": ...}`. Thresholds are
            probabilities, also of Dream, which ranks by entropies without one.
        output_type: "pil", "pt", "np" or "codes".
        callback_on_step_end: `callback(pipe, step, t, {"ids", "open", "confidence"})` after each pass; returning False
            fills the rest in one last pass.
        record_trajectory: only False; the way of a decode is recorded for unidiff's own models.

    Raises:
        ValueError: `record_trajectory`.
    """

    generator: RowGenerator = None
    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    temperature: float | None = None
    sampler: SamplerConfig | None = None
    cache: str | CacheConfig | None = None
    policy: RefreshPolicy | None = None
    block_length: int | Mapping[str, int] | None = None
    threshold: float | Mapping[str, float] | None = None
    output_type: str = "pil"
    callback_on_step_end: StepCallback | None = None
    record_trajectory: bool = False

    def __post_init__(self) -> None:
        if self.record_trajectory:
            raise ValueError("record_trajectory is for unidiff's own models; use callback_on_step_end to look on")

    def config(self, request: TaskRequest, drawn: bool = False) -> SamplerConfig:
        """The sampler settings of a request with these options on top.

        Args:
            drawn: a single threshold is that of pictures, in tasks that decode nothing else; of text otherwise, whatever the
                rows hide.

        Raises:
            ValueError: a value outside its range, or a second direction of guidance where the task has none.
        """
        config = request.config if self.sampler is None else self.sampler
        drawn = drawn or not bool(request.words.any())  # no words to read: the task gave them all
        least = by_modality("threshold", self.threshold, ("image",) if drawn else ("text",))
        if "text" in least and config.text.confidence == "entropy":
            config = replace(config, text=replace(config.text, confidence="probability"))
        config = with_overrides(
            config,
            self.steps,
            self.guidance_scale,
            temperature=self.temperature,
            block_length=by_modality("block_length", self.block_length, ("text", "image")),
            threshold=least,
        )
        if self.image_guidance_scale is None:
            return config
        check_value(self.image_guidance_scale, float, "image_guidance_scale")
        if not config.guidance.further:
            raise ValueError(
                f"image_guidance_scale is {self.image_guidance_scale}, but only edit is guided in a second direction; "
                "leave it out"
            )
        return replace(config, guidance=replace(config.guidance, further=(self.image_guidance_scale,)))


@dataclass(frozen=True)
class ReleasedRun:
    """A finished decode, the seeds of its rows int64 `[B]`, and the cache it used."""

    result: TaskResult
    seeds: Tensor
    choice: CacheChoice


def decode_request(
    pipe: Any,
    released: Released,
    request: TaskRequest,
    options: ReleasedOptions,
    per_entry: int = 1,
    drawn: bool = False,
) -> ReleasedRun:
    """Decode the rows of a request.

    Args:
        pipe: shows the progress and is given to the callback.
        per_entry: rows per entry of the caller's list of seeds.
        drawn: the task decodes pictures alone.

    Raises:
        ValueError: nothing to decode, seeds that do not go with the rows, or an option out of range.
    """
    assert released.vocabulary is not None  # all families with a pipeline are denoisers
    request = replace(request, config=options.config(request, drawn))
    check_rows(len(request.batch.ids))
    seeds = row_seeds(options.generator, len(request.batch.ids), per_entry)
    choice = choose_cache(options.cache, options.policy, request.batch, request.config, released.model)
    targets, model = int(request.batch.targets.sum()), released.model
    pipe.interrupt = False
    with pipe.progress_bar(total=targets) as bar:
        watcher = StepWatcher(pipe, bar, targets, options.callback_on_step_end)
        done = run_task(cast(Any, model), released.vocabulary, request, seeds, choice.policy, watcher)
        watcher.finish()
    return ReleasedRun(done, seeds, choice)


def run_request(
    pipe: Any,
    request: TaskRequest,
    options: Mapping[str, Any],
    per_entry: int = 1,
    longest: int | None = None,
    said: Sequence[str] = (),
    noted: Sequence[str] = (),
    shown: Tensor | None = None,
    paste: tuple[Tensor, Tensor] | None = None,
    drawn: bool = False,
) -> UniDiffOutput:
    """Decode, and back to words and pixels.

    Args:
        pipe: a `ReleasedPipeline`. options: those of `ReleasedOptions` that the caller gave. per_entry: see `decode_request`.
        longest: most tokens of a returned text.
        said: the caller's texts, one for each row whose request leaves none to read.
        noted: the caller's words, which the model should know.
        shown: float `[B, 3, H, W]`, pictures to give back as they are.
        paste: pixels `[B, 3, H, W]` to put back outside a mask `[B, H, W]`.
        drawn: the task decodes pictures alone.
    """
    chosen = ReleasedOptions(**options)
    notes = [*notes_on(noted, pipe.texts), *letters_note(noted)]
    run = decode_request(pipe, pipe.released, request, chosen, per_entry, drawn)
    done = run.result
    words = [ids[:longest] for ids in done.texts]  # where no end-of-text came, its place holds one more word
    texts = [pipe.texts.decode([i for i in ids if i < pipe.texts.size]).strip() for ids in words]
    if said and not request.words.any():
        words, texts = [pipe.texts.encode(text) for text in said], list(said)
    codes, images = torch.zeros(len(words), 0, 0, dtype=torch.long), None
    if all(done.codes):
        codes = torch.stack([row[-1] for row in done.codes]).cpu()  # [B, h, w]
        images = pictures(pipe, codes, chosen.output_type, shown, paste)
    return UniDiffOutput(
        images=images,
        texts=texts,
        codes=codes,
        text_ids=words,
        ids=done.output.batch.ids.cpu(),
        confidences=done.output.confidence.cpu(),
        nfe=done.output.nfe,
        seconds=done.output.seconds,
        seeds=run.seeds,
        stats=done.output.stats,
        cache=run.choice.config,
        cache_note=run.choice.note,
        notes=notes,
    )
