"""The one path of every task of every family: rows and options in, words and pixels out."""

from __future__ import annotations

import inspect
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol

import torch
from torch import Tensor

from unidiff.decoding import DecodeView, Sampler, SamplerConfig
from unidiff.decoding.cache.config import choose_cache, no_cache
from unidiff.decoding.state import declines
from unidiff.diffusion.noise import keyed_bits
from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.pipelines.candidates import keep_best
from unidiff.pipelines.inputs import ImageInputs, check_rows
from unidiff.pipelines.options import OPTIONS, DecodeOptions, RowGenerator, check_keywords, kind_of
from unidiff.pipelines.output import Trajectory, UniDiffOutput, to_frames
from unidiff.tokens import TokenBatch
from unidiff.tokens.text import letters_note, notes_on

P = ParamSpec("P")
_LARGEST = (1 << 62) - 1
_CANDIDATE_STREAM = 7


class UntrainedTask(UserWarning):
    """The model was never trained for what it is asked to do."""


@dataclass(frozen=True)
class TaskCall:
    """A task's arguments as plain values.

    Attributes:
        inputs: of the rows.
        per_entry: rows for each entry of the caller's list.
        said: the caller's words, which the model should know.
        images: of the size of the pictures; None for text alone.
        shown: float `[B, 3, H, W]`, pictures to give back as they are, where none is drawn.
        paste: pixels `[B, 3, H, W]` to put back outside a mask `[B, H, W]`.
    """

    inputs: TaskInputs
    per_entry: int = 1
    said: list[str] = field(default_factory=list)
    images: ImageInputs | None = None
    shown: Tensor | None = None
    paste: tuple[Tensor, Tensor] | None = None


def task_method(
    method: Callable[Concatenate[Any, P], TaskCall],
) -> Callable[Concatenate[Any, P], UniDiffOutput]:
    """A task of the pipeline: the method makes plain values of its arguments, `decode` does the rest.

    Names of arguments are checked first, then whether the model can do the task at all.
    """

    @wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> UniDiffOutput:
        check_keywords(method, kwargs, OPTIONS)
        given: dict[str, Any] = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        options = DecodeOptions(**given)
        self.layout.need(method.__name__)
        return decode(self, method.__name__, method(self, *args, **kwargs), options)

    signature = inspect.signature(method)
    call.__signature__ = signature.replace(return_annotation="UniDiffOutput")  # type: ignore[attr-defined]
    return call


@torch.no_grad()
def decode(pipe: Any, task: str, call: TaskCall, options: DecodeOptions) -> UniDiffOutput:
    """Decode the rows of a task.

    Raises:
        ValueError: nothing to decode, words that do not fit, seeds that do not go with the rows, or an option out of range.
    """
    inputs, layout = call.inputs, pipe.layout
    # 1. rows of the task; its settings, the caller's on top, and then what the task itself needs
    request: DecodeRequest = getattr(layout, task)(inputs)
    if not bool(request.batch.targets.any(1).all()):
        raise ValueError(
            "nothing is left to decode: text and picture are known in full; hide words with <mask> or paint a mask"
        )
    config = request.needs.keep_in(options.apply(request.config, request.drawn))
    # 2. a seed for each row, several candidates of each
    count = layout.candidates(task) if options.num_candidates is None else options.num_candidates
    if count > 1 and call.images is None:
        raise ValueError(f"num_candidates is {count}, but {task} has no pictures to compare words with; leave it out")
    check_rows(inputs.count * count)
    seeds = candidate_seeds(row_seeds(options.generator, inputs.count, call.per_entry), count)
    request = request.repeated(count, pipe._execution_device)  # [B * count, L]
    model, request, config, rules = layout.prepared(pipe, request, config, seeds)
    # 3. what guidance leads away from, what is kept between passes, what a person should know
    condition, away = _guidance(task, request, inputs, config, options)
    plain = options.cache is None and options.policy is None
    choice = no_cache() if plain else choose_cache(options.cache, options.policy, request.batch, config, model)
    notes = [*_untrained(layout.note(task)), *notes_on(call.said, pipe.texts), *letters_note(call.said)]
    # 4. decode
    pipe.interrupt = False
    with pipe.progress_bar(total=int(request.batch.targets.sum())) as bar:
        watcher = StepWatcher(pipe, bar, options.callback_on_step_end)
        run = Sampler(model, layout.vocabulary, config, choice.policy, rules, options.graphs)
        device = request.batch.ids.device
        out = run(request.batch, seeds.to(device), condition, watcher, options.record_trajectory, away)
        watcher.finish()
    # 5. of the candidates of a row, the one that agrees best with itself
    if count > 1:
        out, best = keep_best(out, model, layout.vocabulary, request.judged(), count)
        seeds = seeds[best.cpu()]
    # 6. back to words and pixels
    done = request.finished(out.batch, count)
    codes = done.picture_ids(done.batch.ids) - layout.vocabulary.image[0]  # [B, h, w]
    text_ids = done.text_ids(done.batch.ids, layout.vocabulary, config.ends)
    texts = [pipe.texts.decode([i for i in words if i < pipe.texts.size]).strip() for words in text_ids]
    if inputs.texts is not None:  # texts that were known come back as they were given
        written = (done.words & done.batch.targets).any(1).tolist()
        texts = [own if new else given.strip() for own, new, given in zip(texts, written, inputs.texts, strict=True)]
    trajectory = None if out.trajectory is None else _trajectory(pipe, done, out.trajectory, config)
    return UniDiffOutput(
        images=_pictures(pipe, call, codes, options.output_type),
        texts=texts,
        codes=codes,
        text_ids=text_ids,
        ids=done.batch.ids,
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


def row_seeds(generator: RowGenerator, rows: int, per_entry: int = 1) -> Tensor:
    """int64 `[rows]`, non-negative.

    Args:
        generator: None for fresh seeds from the system; an int, from which every row gets its own; a torch generator,
            which draws one seed per row; or a list of ints (used as they are) and generators, one per row or one per
            entry.
        rows: rows of the batch, `per_entry` of them for each entry of the caller's list.

    Raises:
        ValueError: a list of another length, or an entry of another kind.
    """
    if generator is None:
        return torch.tensor([secrets.randbelow(_LARGEST) for _ in range(rows)])
    if isinstance(generator, torch.Generator):
        return torch.tensor([_draw(generator) for _ in range(rows)])
    if isinstance(generator, int) and not isinstance(generator, bool):
        return derived_seeds(_checked(generator), rows)
    if not isinstance(generator, list | tuple):
        raise ValueError(f"generator is {kind_of(generator)}; expected an int, a torch.Generator or a list")
    if len(generator) not in (rows, rows // per_entry):
        raise ValueError(f"generator lists {len(generator)} seeds for {rows} rows; give one per row")
    repeats = rows // len(generator)
    seeds: list[int] = []
    for entry in generator:
        if isinstance(entry, torch.Generator):
            seeds += [_draw(entry) for _ in range(repeats)]
        elif isinstance(entry, int) and not isinstance(entry, bool):
            seeds += [_checked(entry)] if repeats == 1 else derived_seeds(_checked(entry), repeats).tolist()
        else:
            raise ValueError(f"generator lists {kind_of(entry)}; expected ints and torch.Generators")
    return torch.tensor(seeds)


def _checked(seed: int) -> int:
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError("the seed (generator) does not fit into 64 bits; choose a smaller one")
    return seed


def derived_seeds(seed: int, rows: int) -> Tensor:
    """Row i's seed as a hash of (seed, i): rows of neighbouring seeds do not repeat each other."""
    return keyed_bits(seed, torch.arange(rows), 0, 1)[:, 0] & _LARGEST


def candidate_seeds(seeds: Tensor, count: int) -> Tensor:
    """int64 `[B * count]`: each row's own seed, then `count - 1` hashes of it."""
    numbers = torch.arange(1, count, device=seeds.device)
    more = keyed_bits(0, seeds[:, None] + numbers * 0x9E3779B97F4A7C1, _CANDIDATE_STREAM, 1)[..., 0] & _LARGEST
    return torch.cat([seeds[:, None], more], 1).flatten()


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(_LARGEST, (), generator=generator, device=generator.device))


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


def _untrained(note: str) -> list[str]:
    """A note on the task for a result, also given as a warning, which shows once."""
    if note:
        warnings.warn(note, UntrainedTask, stacklevel=4)
    return [note] if note else []


def _pictures(pipe: Any, call: TaskCall, codes: Tensor, output_type: str) -> Any:
    """Pictures of codes `[B, h, w]` as `output_type` says; None for text alone."""
    if call.images is None or output_type == "codes":
        return None if call.images is None else codes
    images = pipe.images.decode(codes).cpu() if call.shown is None else call.shown  # [B, 3, H, W]
    if call.paste is not None:
        original, mask = call.paste
        images = torch.where(mask[:, None], images, original)
    return call.images.output(images, output_type)


def _trajectory(pipe: Any, done: DecodeRequest, states: Sequence[Tensor], config: SamplerConfig) -> Trajectory:
    """Pictures and words of every recorded state `[B, L]`."""
    vocabulary = pipe.layout.vocabulary
    ids = torch.stack(list(states)).cpu()  # [S, B, L]
    pictures = done.picture_ids(ids)  # [S, B, h, w]
    hidden, frames, seen = pictures == vocabulary.image_mask, [], None
    # Open cells show the final codes under their cover, so that the decoder does not bleed wrong colours around them.
    codes = torch.where(hidden, pictures[-1:], pictures) - vocabulary.image[0]
    for now, cover in zip(codes, hidden, strict=True) if codes.numel() else ():
        if seen is None or not torch.equal(now, seen[0]):
            seen = (now, pipe.images.decode(now).cpu())
        frames.append(to_frames(seen[1], cover))
    texts = [[_shown_words(pipe, row) for row in done.text_ids(s, vocabulary, config.ends)] for s in ids]
    return Trajectory(ids, torch.stack(frames) if frames else None, texts)


def _shown_words(pipe: Any, ids: Sequence[int]) -> str:
    """Words of an unfinished text, one ` _` per open token."""
    hidden, parts, run = pipe.layout.vocabulary.mask_id - pipe.layout.vocabulary.text[0], list[str](), list[int]()
    for i in ids:
        if i == hidden:
            parts += [pipe.texts.decode(run), " _"]
            run = []
        elif i < pipe.texts.size:
            run.append(i)
    return "".join([*parts, pipe.texts.decode(run)]).strip()


class ProgressBar(Protocol):
    """The part of tqdm that is used."""

    disable: bool
    total: int

    def update(self, n: int) -> Any: ...


class StepWatcher:
    """The sampler's callback: moves the progress bar, calls the user's callback, carries an interruption over."""

    def __init__(self, pipe: Any, bar: ProgressBar, callback: Callable[..., Any] | None) -> None:
        self.pipe, self.bar, self.callback = pipe, bar, callback
        self._done = 0

    def __call__(self, step: int, state: DecodeView) -> bool:
        if self.callback is None and self.bar.disable:
            return not self.pipe.interrupt
        left = int(state.open.sum())
        self.bar.update(self.bar.total - left - self._done)
        self._done = self.bar.total - left
        answer = None
        if self.callback is not None:
            tensors = {"ids": state.ids, "open": state.open, "confidence": state.confidence}  # copies
            answer = self.callback(self.pipe, step, left / self.bar.total, tensors)
        return not declines(answer) and not self.pipe.interrupt

    def finish(self) -> None:
        """The bar is full, also where end-of-text fill ended rows early."""
        self.bar.update(self.bar.total - self._done)
