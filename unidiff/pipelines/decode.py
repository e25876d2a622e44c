"""The one path of every task of every family: arguments to rows, through the sampler, and back to words and pixels."""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from unidiff.decoding import DecodeView, Sampler, SamplerConfig
from unidiff.decoding.cache.config import choose_cache, no_cache
from unidiff.decoding.commit.base import RuleMaker
from unidiff.diffusion.noise import keyed_bits
from unidiff.errors import warn
from unidiff.families.layout import PLACES, DecodeRequest, TaskInputs
from unidiff.models.denoiser import is_block_causal
from unidiff.pipelines.candidates import keep_best, ranker_of
from unidiff.pipelines.inputs import pasted
from unidiff.pipelines.options import (
    MOST_ROWS,
    OPTIONS,
    DecodeOptions,
    RowGenerator,
    check_keywords,
    kind_of,
    own_names,
    whole,
)
from unidiff.pipelines.output import UniDiffOutput, trajectory_of
from unidiff.schedulers.rule import scheduled_options, with_scheduler
from unidiff.tokens import Modality, TokenBatch
from unidiff.tokens.text import letters_note, notes_on, refuse_holes
from unidiff.weights.model import HOOKS, bring

P = ParamSpec("P")
_LARGEST = (1 << 62) - 1
_CANDIDATE_STREAM = 7


class UntrainedTask(UserWarning):
    """The model was never trained for what it is asked to do."""


@dataclass(frozen=True)
class TaskCall:
    """A task's arguments as plain values."""

    inputs: TaskInputs
    per_entry: int = 1  # rows for each entry of the caller's list
    said: list[str] = field(default_factory=list)  # the caller's words, which the model should know
    pictures: bool = True  # whether rows have any
    shown: Tensor | None = None  # float [B, 3, H, W], pictures to give back as they are, where none is drawn
    paste: tuple[Tensor, Tensor] | None = None  # pixels [B, 3, H, W] to put back outside a mask [B, H, W]


def task_method(
    method: Callable[Concatenate[Any, P], TaskCall],
) -> Callable[Concatenate[Any, P], UniDiffOutput]:
    """A task of the pipeline: the method makes plain values of its arguments, `decode` does the rest.

    Names of arguments are checked first, then whether the model can do the task at all.
    """

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> UniDiffOutput:
        named = own_names(kwargs)
        check_keywords(method, named, OPTIONS, type(self))
        options = DecodeOptions(**{name: named.pop(name) for name in OPTIONS if name in named})
        self.layout.need(method.__name__)
        try:
            out = self.decoder(self, method.__name__, method(self, *args, **named), options)
        finally:
            self.maybe_free_model_hooks()  # of `enable_model_cpu_offload`
        return out if options.return_dict else out.to_tuple()

    signature = inspect.signature(method)
    call.__signature__ = signature.replace(return_annotation="UniDiffOutput")  # type: ignore[attr-defined]
    return call


@torch.no_grad()
def decode(pipe: Any, task: str, call: TaskCall, options: DecodeOptions) -> UniDiffOutput:
    """Decode the rows of a task; `ValueError` for nothing to decode, and for what does not go with the task."""
    inputs, layout = call.inputs, pipe.layout
    # 1. rows of the task; its settings, the caller's on top, and then what the task itself needs
    request: DecodeRequest = getattr(layout, task)(inputs)
    if not bool(request.batch.targets.any(1).all()):
        raise ValueError(
            "nothing is left to decode: text and picture are known in full; hide words with <mask> or paint a mask"
        )
    config, rules = settings_of(pipe, request, options)
    if rules and options.threshold is not None:
        kind = type(pipe.scheduler).__name__
        raise ValueError(
            f"threshold is {kind}'s own: pipe.scheduler = {kind}.from_config(pipe.scheduler.config, threshold=...)"
        )
    # 2. a seed for each row, several candidates of each
    count = layout.candidates(task) if options.num_candidates is None else options.num_candidates
    if count > 1 and not call.pictures:
        raise ValueError(f"num_candidates is {count}, but {task} has no pictures to compare words with; leave it out")
    check_rows(inputs.count * count)
    if options.generator is None and hasattr(pipe.transformer, "mesh"):
        raise ValueError("the transformer is spread over processes, which must draw alike; give generator=")
    seeds = candidate_seeds(row_seeds(options.generator, inputs.count, call.per_entry), count)
    if HOOKS & vars(pipe.transformer).keys():
        bring(pipe.transformer)
    request = request.repeated(count, pipe._execution_device)  # [B * count, L]
    model, request, config, own_rules, drawn, own_policy = layout.prepared(pipe, request, config, seeds)
    # 3. what guidance leads away from, what is kept between passes, what a person should know
    condition, away = _guidance(task, request, inputs, config, options)
    policy = options.policy or (own_policy if options.cache is None else None)
    plain = options.cache is policy is None and not is_block_causal(model)
    choice = no_cache() if plain else choose_cache(options.cache, policy, request.batch, config, model)
    notes = notes_of(pipe, task, call)
    # 4. decode
    pipe.interrupt, device = False, request.batch.ids.device
    with pipe.progress_bar(total=int(request.batch.targets.sum())) as bar:
        watcher = StepWatcher(pipe, bar, options, request)
        run = Sampler(model, drawn or layout.vocabulary, config, choice.policy, {**own_rules, **rules}, options.graphs)
        out = run(request.batch, seeds.to(device), condition, watcher, options.record_trajectory, away)
        watcher.finish()
    # 5. of the candidates of a row, the one that agrees best with itself
    if count > 1:
        out, best = keep_best(out, model, layout.vocabulary, request.judged(), count, ranker_of(options.rank_by), seeds)
        seeds = seeds[best.cpu()]
    # 6. back to words and pixels
    done = request.finished(out.batch, count)
    codes = done.picture_ids(done.batch.ids) - layout.vocabulary.image[0]  # [B, h, w]
    text_ids, texts = done.read_words(pipe.texts, layout.vocabulary, inputs.texts, config.ends)
    return UniDiffOutput(
        images=pictures_of(pipe, call, codes, options.output_type, seeds),
        texts=texts,
        codes=codes,
        text_ids=text_ids,
        ids=done.batch.ids,
        confidences=out.confidence.cpu(),
        nfe=out.nfe,
        tokens_per_forward=out.tokens_per_forward.cpu(),
        seconds=out.seconds,
        seeds=seeds,
        trajectory=None if out.trajectory is None else trajectory_of(pipe, done, out.trajectory, config.ends, seeds),
        stats=out.stats,
        cache=choice.config,
        cache_note=choice.note,
        notes=notes,
    )


def settings_of(
    pipe: Any, request: DecodeRequest, options: DecodeOptions
) -> tuple[SamplerConfig, Mapping[Modality, RuleMaker]]:
    """The task's settings, those of the scheduler and of the caller on top, then what the task needs; and the scheduler's rules."""
    config = options.apply(request.config, request.drawn)
    rules: Mapping[Modality, RuleMaker] = {}
    if getattr(pipe.scheduler, "changes", True):
        config = scheduled_options(pipe.scheduler).apply(request.config, request.drawn)
        config, rules = with_scheduler(pipe.scheduler, options.apply(config, request.drawn))
    return request.needs.keep_in(config), rules


def notes_of(pipe: Any, task: str, call: TaskCall) -> list[str]:
    """What a person should know of a call; warns of a task that was never trained."""
    if note := pipe.layout.note(task):
        warn(note, UntrainedTask)
    return [*filter(None, [note]), *notes_on(call.said, pipe.texts), *letters_note(call.said)]


def row_seeds(generator: RowGenerator, rows: int, per_entry: int = 1) -> Tensor:
    """int64 `[rows]`, non-negative.

    Args:
        generator: None for fresh seeds from the system; an int, from which every row gets its own; a torch generator,
            which draws one seed per row; or a list of ints (used as they are) and generators, one per row or one per
            entry of the caller's list (`per_entry` rows).
    """
    if generator is None:
        return torch.tensor([secrets.randbelow(_LARGEST) for _ in range(rows)])
    several = isinstance(generator, list | tuple)
    entries: list[Any] = list(generator) if isinstance(generator, list | tuple) else [generator]
    if several and len(entries) not in (rows, rows // per_entry):
        raise ValueError(f"generator lists {len(entries)} seeds for {rows} rows; give one per row")
    repeats, seeds = rows // len(entries), list[int]()
    for entry in entries:
        if isinstance(entry, torch.Generator):
            seeds += [int(torch.randint(_LARGEST, (), generator=entry, device=entry.device)) for _ in range(repeats)]
        elif isinstance(entry, bool) or not isinstance(entry, int):
            expected = "ints and torch.Generators" if several else "an int, a torch.Generator or a list"
            raise ValueError(f"generator {'lists' if several else 'is'} {kind_of(entry)}; expected {expected}")
        elif not -(1 << 63) <= entry < 1 << 63:
            raise ValueError("the seed (generator) does not fit into 64 bits; choose a smaller one")
        elif several and repeats == 1:
            seeds.append(entry)
        else:  # hashes of (seed, i): rows of neighbouring seeds do not repeat each other
            seeds += (keyed_bits(entry, torch.arange(repeats), 0, 1)[:, 0] & _LARGEST).tolist()
    return torch.tensor(seeds)


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """int64 `[B * count]`: each row's own seed, then `count - 1` hashes of it."""
    numbers = torch.arange(1, count, device=seeds.device)
    more = keyed_bits(0, seeds[:, None] + numbers * 0x9E3779B97F4A7C1, _CANDIDATE_STREAM, 1)[..., 0] & _LARGEST
    return torch.cat([seeds[:, None], more], 1).flatten()


def _guidance(
    task: str, request: DecodeRequest, inputs: TaskInputs, config: SamplerConfig, options: DecodeOptions
) -> tuple[Tensor | None, tuple[TokenBatch, ...] | None]:
    """What the guidance stream does not see, or the rows of guidance streams."""
    guidance, hides, away = config.guidance, options.guidance_hides, request.unconditional
    if inputs.negative is not None:
        if hides is not None:
            raise ValueError(
                f"negative_prompt and guidance_hides={hides!r} both say what guidance leads away from; give one of them"
            )
        scale = guidance.scale if guidance.image_scale is None else guidance.image_scale
        if not away:
            raise ValueError(f"negative_prompt does not go with {task} of this family as it is asked; leave it out")
        if scale == 1 and any(text.strip() for text in inputs.negative):
            raise ValueError("negative_prompt changes nothing at guidance_scale 1; choose a larger one")
    elif hides is not None and away:
        if len(away) > 1:
            raise ValueError(
                f"guidance_hides={hides!r} does not suit {task}, which is guided in {len(away)} directions; leave it out"
            )
        away = ()
    return (None, away) if away else (request.condition(guidance.hide), None)


def pictures_of(pipe: Any, call: TaskCall, codes: Tensor, output_type: str, seeds: Tensor) -> Any:
    """Pictures of codes `[B, h, w]` as `output_type` says, their noise (if any) from `seeds` `[B]`; None for text alone."""
    if not call.pictures or output_type in ("codes", "latent"):
        return codes if call.pictures else None
    images = pipe.images.decode(codes, seeds).cpu() if call.shown is None else call.shown  # [B, 3, H, W]
    if call.paste is not None:
        images = pasted(images, *call.paste)
    if output_type == "pt":
        return images
    array = VaeImageProcessor.pt_to_numpy(images)  # [B, H, W, 3]
    return array if output_type == "np" else VaeImageProcessor.numpy_to_pil(array)


class StepWatcher:
    """The sampler's callback: moves the progress bar, calls the user's callback, carries an interruption over."""

    def __init__(self, pipe: Any, bar: Any, options: DecodeOptions, request: DecodeRequest) -> None:
        self.pipe, self.bar, self.places = pipe, bar, request.places
        self.callback, self.tensors = options.callback_on_step_end, options.callback_tensors
        self._done = 0

    def __call__(self, step: int, state: DecodeView) -> object:
        if self.callback is None and self.bar.disable:
            return not self.pipe.interrupt
        left = int(state.open.sum())
        self.bar.update(self.bar.total - left - self._done)
        self._done = self.bar.total - left
        answer = None
        if self.callback is not None:
            tensors = {
                name: self.places(name) if name in PLACES else getattr(state, name) for name in self.tensors
            }  # copies
            answer = self.callback(self.pipe, step, left / self.bar.total, tensors)
        return False if self.pipe.interrupt else answer

    def finish(self) -> None:
        """The bar is full, also where end-of-text fill ended rows early."""
        self.bar.update(self.bar.total - self._done)


def texts_of(value: Any, what: str, empty: bool = False, holes: bool = False) -> list[str]:
    """One text or several as a list of strings; else `ValueError`, which says which is none.

    Args:
        what: the argument, for the message. empty: whether a text without words is fine. holes: whether it may have holes.
    """
    several = isinstance(value, list | tuple)
    texts = list(value) if several else [value]
    if not texts:
        raise ValueError(f"the list of {what}s is empty; give at least one")
    for number, text in enumerate(texts):
        where = f" (number {number + 1} of {len(texts)})" if len(texts) > 1 else ""
        if not isinstance(text, str):
            expected = "a string" if several else "a string, or a list of them"
            raise ValueError(f"the {what} is {kind_of(text)}{where}; expected {expected}")
        if not text.strip() and not empty:
            raise ValueError(f"the {what} is empty{where}; write at least one word")
        if (bad := next((c for c in text if "\ud800" <= c <= "\udfff"), None)) is not None:
            raise ValueError(f"the {what} holds the lone surrogate {bad!r}{where}, which is no character; leave it out")
    if not holes:
        refuse_holes(texts, what, "generate, inpaint or infill fill <mask> holes, where the model can")
    return texts


def columns_of(count: int, **columns: Sequence[Any] | Tensor | None) -> dict[str, Any]:
    """Columns of one common length: a single entry goes with as many as the others have, tensors are stacked.

    Args:
        count: rows for each entry (`num_images_per_prompt`). columns: those that are None are left out.

    Raises:
        ValueError: lengths that do not agree, a count that is no whole number of at least 1, or more than `MOST_ROWS` rows.
    """
    given = {name: list(column) for name, column in columns.items() if column is not None}
    lengths = {name: len(column) for name, column in given.items()}
    longest = max(lengths.values())
    if bad := [name for name, n in lengths.items() if n not in (1, longest)]:
        other = max(lengths, key=lambda name: lengths[name])
        raise ValueError(f"{lengths[bad[0]]} {bad[0]}s do not go with {longest} {other}s; give one, or as many of each")
    check_rows(longest * whole(count, "num_images_per_prompt", 1, MOST_ROWS))
    rows = {}
    for name, column in given.items():
        entries = column * (longest if len(column) == 1 else 1)
        row = [entry for entry in entries for _ in range(count)]
        rows[name] = torch.stack(row) if isinstance(row[0], Tensor) else row
    return rows


def check_rows(rows: int) -> None:
    """Raise `ValueError` for more rows than `MOST_ROWS`."""
    if rows > MOST_ROWS:
        raise ValueError(
            f"this call would decode {rows} rows (num_images_per_prompt and num_candidates multiply); expected at most "
            f"{MOST_ROWS}, so make several calls"
        )
