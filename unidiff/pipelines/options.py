"""`DecodeOptions`: what a caller may say about a decode, its names elsewhere, its place on the command line, its effect; checks.

No torch is imported, so that the command line can list its options at once.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict

from unidiff.schema import short_value

if TYPE_CHECKING:
    import torch

    from unidiff.decoding import CacheConfig, ModalityDecoding, RefreshPolicy, SamplerConfig
    from unidiff.decoding.graphs import Record
    from unidiff.pipelines.candidates import Ranker

RowGenerator: TypeAlias = "int | torch.Generator | Sequence[int | torch.Generator] | None"
OUTPUT_TYPES = ("pil", "pt", "np", "codes", "latent")
USUAL_TENSORS = ("ids", "open", "confidence")
CALLBACK_TENSORS = (*USUAL_TENSORS, "recomputed", "targets", "words", "picture")
MOST_ROWS = 10_000  # of one call: results are kept in memory, so more than that is more likely a slip of the hand


@dataclass(frozen=True)
class Flag:
    """An option on the command line: its name with its dashes, and kind and bounds of its value."""

    name: str
    kind: Any
    help: str
    default: Any = None
    least: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class DecodeOptions:
    """Keyword arguments that every task of every family takes, as far as its weights allow; None keeps the model's own.

    Args:
        steps: passes per modality; those of a block at most where the family's own settings count these (LLaDA2).
        guidance_scale: classifier-free guidance, 1 is off.
        guidance_hides: what the unconditional pass does not see: `given` tokens, the `other` modality, or given `text` or
            `image`.
        image_guidance_scale: strength of the second direction of an edit, away from what comes without the pictures.
        temperature: of token draws, 0 takes the best token.
        sampler: a whole `SamplerConfig` in place of the task's default; the other arguments still apply on top, and then
            what the task itself needs (ids that are never written, ends of texts).
        cache: what is kept between passes: "auto", "none", "prefix", "dual", "vicinity", "interval", "adaptive", "max-logit",
            "modality", "sprint", "block-causal", or a `CacheConfig`, which says what each costs and gains. "auto" takes what suits the
            task and none where rows are too short to gain (`choose_cache`); results say what was used. Every cache but
            "block-causal" trades some quality for speed. Left out: "block-causal" for block-causal weights, for which it is
            exact, and none for others.
        policy: a cache policy object of your own, in place of `cache`.
        block_length: tokens per block, for both modalities or as `{"text": 16, "image": 64}`.
        threshold: commit every token of at least this probability, at least one per pass: of text, in tasks that decode
            pictures alone of the image, or as `{"text": 0.9, "image": 0.5}`.
        num_candidates: decodes of each row, of which the best is kept, at that many times the time and memory.
        rank_by: the best by "agreement" of words and picture, by `score` of "text", "image", "both" or "each", or a `Ranker`.
        graphs: record the passes as CUDA graphs and replay them, see `unidiff.decoding.graphs`; without CUDA nothing
            changes. A `Record` in place of True records by other means.
        generator: None, an int, a torch.Generator, or a list with one of either per row.
        output_type: "pil", "pt" (float `[B, 3, H, W]`), "np" (float `[B, H, W, 3]`), "codes" or "latent" (int64 `[B, h, w]`).
        return_dict: False for the results as a tuple, as `UniDiffOutput.to_tuple`.
        callback_on_step_end: `callback(pipe, step, t, tensors)` after each pass, with t the share still open. Returning False,
            or setting `pipe.interrupt`, fills the rest in one last pass; `{"ids": ids}` puts other tokens at what is decoded,
            or [MASK] to decode it again (`open` and `confidence` follow).
        callback_on_step_end_tensor_inputs: which of `CALLBACK_TENSORS` it gets; `USUAL_TENSORS` where it does not say so
            itself. All are of rows `[B, L]`, a row for each candidate: "ids" int64, "open" (still masked), "confidence",
            "recomputed" (what the cache computed anew in this pass), "targets" (what is decoded at all), "words" (what the
            text is read from); but "picture", int64 `[B, h, w]`: the places of the picture's codes in the row.
        record_trajectory: keep what the rows looked like after each pass.

    Raises:
        ValueError: a value of a kind or size that nobody can mean; `apply` refuses numbers out of range.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    guidance_hides: str | None = None
    image_guidance_scale: float | None = None
    temperature: float | None = None
    sampler: SamplerConfig | None = None
    cache: str | CacheConfig | None = None
    policy: RefreshPolicy | None = None
    block_length: int | Mapping[str, int] | None = None
    threshold: float | Mapping[str, float] | None = None
    num_candidates: int | None = None
    rank_by: str | Ranker = "agreement"
    graphs: bool | Record = False
    generator: RowGenerator = None
    output_type: str = "pil"
    return_dict: bool = True
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] | None = None
    record_trajectory: bool = False

    def __post_init__(self) -> None:
        from unidiff.decoding import CacheConfig, SamplerConfig
        from unidiff.decoding.cache.config import CACHES

        for name in ("steps", "num_candidates"):
            if getattr(self, name) is not None:
                whole(getattr(self, name), name, 1, MOST_ROWS)
        flag(self.return_dict, "return_dict")
        flag(self.record_trajectory, "record_trajectory")
        policy = lambda value: not isinstance(value, type) and callable(getattr(value, "start", None))  # noqa: E731
        for name, fits, expected in (
            ("sampler", lambda value: isinstance(value, SamplerConfig), "a SamplerConfig"),
            ("policy", policy, "a cache policy object, for instance DualCache()"),
            ("callback_on_step_end", callable, "a function of (pipe, step, t, tensors)"),
            ("graphs", lambda value: isinstance(value, bool) or callable(value), "True, False or a Record"),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} is {short(value)}; expected {expected}")
        if isinstance(self.cache, str) or not isinstance(self.cache, CacheConfig | Mapping | None):
            more = " or a CacheConfig (for a policy object of your own there is policy=)"
            one_of(self.cache, "cache", ("auto", *CACHES), more)
        if self.rank_by != "agreement":
            from unidiff.pipelines.candidates import ranker_of

            ranker_of(self.rank_by)
        one_of(self.output_type, "output_type", OUTPUT_TYPES)
        wanted = self.callback_on_step_end_tensor_inputs
        names = tuple(map(repr, CALLBACK_TENSORS))
        if not isinstance(wanted, list | tuple | None) or not set(map(repr, wanted or ())) <= set(names):
            shown = list(wanted) if isinstance(wanted, list | tuple) else short(wanted)
            expected = f"a list of some of {', '.join(CALLBACK_TENSORS)}"
            raise ValueError(f"callback_on_step_end_tensor_inputs is {shown!s:.80}; expected {expected}")

    @property
    def callback_tensors(self) -> Sequence[str]:
        """Names of what the callback gets; one of diffusers' names them itself."""
        own = getattr(self.callback_on_step_end, "tensor_inputs", None)
        asked = own if isinstance(own, list | tuple) else self.callback_on_step_end_tensor_inputs
        return USUAL_TENSORS if asked is None else asked

    def apply(self, config: SamplerConfig, drawn: bool = False) -> SamplerConfig:
        """Sampler settings with these options on top.

        `steps`: a rule that ends by itself (threshold, factor) becomes a quota of that many, and its blocks that are in
        flight together become one. `threshold`: a rule without a threshold becomes one, and compares probabilities.

        Args:
            config: of the task; `sampler` takes its place. drawn: the task decodes pictures alone.

        Raises:
            ValueError: a value outside its range, or a second direction of guidance where there is none.
        """
        from unidiff.decoding.config import RULES

        further = config.guidance.further
        config = config if self.sampler is None else self.sampler
        guided: dict[str, Any] = {}
        changed: dict[str, ModalityDecoding] = {"text": config.text, "image": config.image}
        if further and not config.guidance.further:  # the task has a stream for each
            guided["further"] = further
        if self.steps is not None:
            for name, schedule in (("text", "linear"), ("image", config.image.schedule)):
                changed[name] = RULES[changed[name].rule].in_steps(changed[name], self.steps, schedule)
        if self.temperature is not None:
            changed = {name: replace(own, temperature=self.temperature) for name, own in changed.items()}
        if self.guidance_scale is not None:
            guided |= {"scale": self.guidance_scale, "text_scale": None, "image_scale": None}
        if self.guidance_hides is not None:
            guided["hide"] = self.guidance_hides
        if self.image_guidance_scale is not None:
            if not further:
                raise ValueError(
                    f"image_guidance_scale is {short(self.image_guidance_scale)}, but only edit is guided in a second "
                    "direction; leave it out"
                )
            guided["further"] = (self.image_guidance_scale, *further[1:])
        for name, length in _by_modality("block_length", self.block_length, ("text", "image")).items():
            changed[name] = replace(changed[name], block_length=length)
        for name, least in _by_modality("threshold", self.threshold, ("image",) if drawn else ("text",)).items():
            own = changed[name]
            rule = own.rule if RULES[own.rule].has_threshold else "threshold"
            confidence = "probability" if own.confidence == "entropy" else own.confidence
            changed[name] = replace(own, rule=rule, confidence=confidence, threshold=least, flight_threshold=least)
        guidance = replace(config.guidance, **guided) if guided else config.guidance
        if guidance is config.guidance and changed == {"text": config.text, "image": config.image}:
            return config
        return replace(config, text=changed["text"], image=changed["image"], guidance=guidance)


OPTIONS = tuple(f.name for f in fields(DecodeOptions))


class DecodeInputs(TypedDict, total=False):
    """`DecodeKeywords` without `return_dict`, by which the type of a result goes."""

    steps: int | None
    guidance_scale: float | None
    guidance_hides: str | None
    image_guidance_scale: float | None
    temperature: float | None
    sampler: SamplerConfig | None
    cache: str | CacheConfig | None
    policy: RefreshPolicy | None
    block_length: int | Mapping[str, int] | None
    threshold: float | Mapping[str, float] | None
    num_candidates: int | None
    rank_by: str | Ranker
    graphs: bool | Record
    generator: RowGenerator
    output_type: str
    callback_on_step_end: Callable[..., Any] | None
    callback_on_step_end_tensor_inputs: Sequence[str] | None
    record_trajectory: bool
    num_inference_steps: int | None
    max_new_tokens: int | None
    gen_length: int | None
    cfg_scale: float | None
    guidance_convention: str


class DecodeKeywords(DecodeInputs, total=False):
    """`DecodeOptions` as keyword arguments, and what other libraries call them (`ALIASES`), for type checkers."""

    return_dict: bool


class CallInputs(DecodeInputs, total=False):
    """What `pipe(...)` takes besides: the arguments of all tasks."""

    messages: Any
    image: Any
    mask_image: Any
    question: str | Sequence[str] | None
    text: str | Sequence[str] | None
    reference: Any
    negative_prompt: str | Sequence[str] | None
    height: int | None
    width: int | None
    num_images_per_prompt: int
    strength: float | None
    max_text_tokens: int | None
    resize: bool
    paste_back: bool


class CallKeywords(CallInputs, total=False):
    """All of `pipe(...)`."""

    return_dict: bool


class Alias(NamedTuple):
    """What an argument of another library is here: a name, and what is added to its value."""

    name: str
    added: int = 0


ALIASES = {
    "num_inference_steps": Alias("steps"),  # diffusers
    "max_new_tokens": Alias("max_text_tokens"),  # transformers, Dream, dLLM
    "gen_length": Alias("max_text_tokens"),  # LLaDA, diffusers
    "cfg_scale": Alias(
        "guidance_scale", 1
    ),  # LLaDA, dLLM, Lumina-DiMOO: the weight of what is added to the conditional logits
}
GUIDANCE_CONVENTIONS = {  # what is added to a paper's guidance scale: s of uncond + s (cond - uncond) is ours
    **dict.fromkeys(("diffusers", "unidiff", "amused", "meissonic", "muddit", "llada2-uni"), 0),
    **dict.fromkeys(("llada", "mmada", "dynin-omni", "unidisc", "lumina-dimoo"), 1),
}
_SCALES: Mapping[str, Mapping[str, int]] = {"guidance_scale": {}, "image_guidance_scale": {"llada2-uni": 1}}


def own_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments under our names and by our convention of guidance; `ValueError` where two spellings are given."""
    given, named, spelt = dict(given), dict[str, Any](), dict[str, str]()
    if (convention := given.pop("guidance_convention", None)) is not None:
        one_of(convention, "guidance_convention", tuple(GUIDANCE_CONVENTIONS))
        added = GUIDANCE_CONVENTIONS[convention]
        given |= {n: _plus(given[n], own.get(convention, added)) for n, own in _SCALES.items() if n in given}
    for name, value in given.items():
        own, added = ALIASES.get(name, Alias(name))
        if own in spelt and value is not None and named[own] is not None:
            raise ValueError(f"{spelt[own]} and {name} mean the same; give one of them")
        if named.get(own) is None:
            named[own], spelt[own] = _plus(value, added), name
    return named


def _plus(value: Any, added: int) -> Any:
    """The sum where there is something to add, and it can be: what is no number is refused by its own check."""
    return value + added if added and isinstance(value, int | float) and not isinstance(value, bool) else value


FLAGS = {
    "steps": Flag("--steps", int, "Passes of the model; default: the model's own."),
    "guidance_scale": Flag(
        "--guidance", float, "How strictly to follow the input; 1 is off. Default: the model's own."
    ),
    "temperature": Flag("--temperature", float, "Randomness of the draws; 0 takes the best token."),
    "cache": Flag("--cache", str, "Cache between passes: auto, none or a policy such as dual; a wrong name lists all."),
    "block_length": Flag("--block-length", int, "Tokens per block, decoded one after the other."),
    "threshold": Flag("--threshold", float, "Commit every token of at least this probability."),
    "num_candidates": Flag(
        "--candidates",
        int,
        "Decodes of each result; the one whose words and picture agree best is kept. Default: the model's own.",
        least=1,
        most=MOST_ROWS,
    ),
    "rank_by": Flag("--rank-by", str, "Which candidate is best: agreement, text, image, both or each likelihood."),
    "generator": Flag("--seed", int, "The same seed gives the same result.", default=0),
}


def _by_modality(name: str, value: Any, default: Sequence[str]) -> dict[str, Any]:
    """A setting per modality from one number, which goes to the modalities in `default`, or from a mapping."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        return dict.fromkeys(default, value)
    if unknown := sorted(str(key) for key in set(value) - {"text", "image"}):
        raise ValueError(f"{name} names {unknown}; expected some of ['image', 'text']")
    return dict(value)


def check_keywords(
    method: Callable[..., Any], given: Iterable[str], options: Iterable[str] = (), owner: type | None = None
) -> None:
    """`TypeError`, as of Python's but with the nearest name, for keyword arguments that a public method does not have.

    Args:
        method: its own arguments count, besides `options`, which it takes as `**options`.
        owner: the class whose method it is, where it is inherited.
    """
    known = [*own_arguments(method), *options]
    for name in given:
        if name not in known:
            near = [other for other in _ELSEWHERE.get(name, ()) if other in known]
            near = near or difflib.get_close_matches(name, known, 1, 0.5)
            near = near or [other for other in known if name.lower() in other.lower()]
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            called = f"{owner.__name__}.{method.__name__}" if owner else method.__qualname__
            raise TypeError(f"{called}() has no argument {name!r}; {hint}")


_ELSEWHERE = {  # as other programs call them
    **dict.fromkeys(("seed", "seeds"), ("generator",)),
    **dict.fromkeys(("num_steps", "max_denoising_steps"), ("steps",)),
    "cfg": ("guidance_scale",),
    "callback": ("callback_on_step_end",),
    "mask": ("mask_image",),
    "prompt": ("text", "messages", "question"),
    "text": ("prompt", "messages", "question"),
    "question": ("prompt", "messages"),
    "torch_dtype": ("dtype",),
}


def own_arguments(method: Callable[..., Any]) -> list[str]:
    """Names of a method's arguments, without `self` and `**options`."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(method).parameters.items() if p.kind in kinds and name != "self"]


def whole(value: Any, name: str, least: int, most: int, note: str = "") -> int:
    """`value` where it is a whole number from `least` to `most`; else `ValueError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {short(value)}; expected a whole number from {least} to {most}{note}")
    return value


def flag(value: Any, name: str) -> bool:
    """`value` where it is True or False; else `ValueError`."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's is one
        raise ValueError(f"{name} is {short(value)}; expected True or False")
    return bool(value)


def one_of(value: Any, name: str, allowed: Sequence[str], other: str = "") -> None:
    """Raise `ValueError` unless `value` is one of the names; `other` says what else may stand there."""
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{name} is {short(value)}; expected one of {', '.join(allowed)}{hint or other}")


def kind_of(value: Any) -> str:
    """What a value is, for messages: `an int`, `None`."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def short(value: Any) -> str:
    """A value for a message: what it is where it is long or no plain value."""
    return short_value(value) if isinstance(value, str | int | float | complex | None) else kind_of(value)
