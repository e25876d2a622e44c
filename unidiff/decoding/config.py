"""What a decode is asked for: settings, one set per modality, and checks of what a sampler is made and called with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

import torch
from torch import Tensor

from unidiff.diffusion.schedules import SCHEDULES
from unidiff.models.denoiser import PartialDenoiser, takes_features
from unidiff.registry import Registry
from unidiff.schema import Between, Index, check_fields, from_data
from unidiff.tokens import Modality, TokenBatch, Vocabulary
from unidiff.tokens.batch import CONTINUOUS

RULES: Registry[Any] = Registry(
    "commit_rules", "unidiff.decoding.commit", lambda found: (hasattr(found, "early") and found.name) or None
)
"""Commit rules by name, see `unidiff.decoding.commit.base.NamedRule`."""
CONFIDENCES = ("probability", "margin", "entropy", "random")
BLOCK_ORDERS = ("sequence", "aligned", "checkerboard", "coarse", "halton")
REMASKING = ("none", "confidence", "remdm")
GUIDANCE_MODES = ("constant", "ramp", "window")
HIDES = ("given", "other", "text", "image")
ORDERS = ("together", "text_first", "image_first", "level")
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_KINDS = (torch.int64, torch.int64, torch.bool, torch.bool, torch.int64, torch.int64)  # of a batch's fields
# Bounds that no decode has a use to pass: work that never ends, or numbers that overflow float32
_Passes = Annotated[int, Between(1, 100_000)]
_Count = Annotated[int, Between(1)]
_Share = Annotated[float, Between(0, 1)]
_Strength = Annotated[float, Between(0, 1e6)]
_Size = Annotated[float, Between(0, 1e30)]


@dataclass(frozen=True)
class ModalityDecoding:
    """How one modality is decoded. Nothing here is shared between text and image.

    Args:
        steps: passes for the whole modality (`quota` and `ancestral`; the other rules end by themselves). Blocks share them in
            proportion to their sizes, at least one each; `quota` takes no more than one per token. Tokens that are masked
            again may add one each. What is done sooner (end of text, blocks in flight) leaves passes out.
        rule: which tokens a pass commits, at least one. `quota`: as many as `schedule` says. `threshold`: every position whose
            confidence reaches `threshold`. `factor`: the longest prefix of the sorted confidences with
            c_r >= 1 - factor / (r + 1). `hierarchical`: as `threshold`, and the best position of every run of masked
            neighbours where it reaches `low_threshold`. `credit`: as `threshold`, after adding to the logits what a token has
            earned by being the best in earlier passes, see `Credit`. `at_least`: a quota, or all above `threshold` where these
            are more, see `AtLeast`. `first_hitting`: one uniformly random position, the
            exact law of the model. `ancestral`: each position by its own coin, the reverse process on a grid of times.
        schedule: share still masked after a share u of the steps, one of `unidiff.diffusion.schedules`: `linear` 1-u,
            `cosine` cos(pi u/2), `square` 1-u^2, `root` 1-sqrt(u), `arccos` acos(u) 2/pi, ...; `fixed` commits n // steps,
            plus one in the first n % steps passes.
        confidence: what ranks positions: `probability` of the chosen token, `margin` between the best two, `entropy`
            (negative), or `random`. Always from the guided logits before temperature and filters.
        temperature: of the token draw; 0 takes the best token.
        choice_temperature: scale of the Gumbel noise on the ranking, multiplied by the remaining time.
        top_k, top_p: keep only the k best tokens, and the smallest set that reaches probability p.
        threshold, factor, low_threshold, credit_decay, credit_power, credit_weight, least_tokens, block_steps: see `rule`.
        block_length: tokens per block, decoded block after block; None for the whole span at once.
        block_order: which tokens form a block: `sequence`, `aligned` (runs of positions counted from the first of the sample, as
            block-causal attention counts them, so that the first and the last may be shorter), or for images `checkerboard`, `coarse` (coarse to fine) and
            `halton` (each block spread evenly over the picture, Besnier et al. 2025).
        blocks_in_flight: blocks that may be decoded at once. A block joins when `flight_share` of the one before it
            is decoded; until its turn comes, only tokens whose confidence reaches `flight_threshold` are committed in it.
        remask: `confidence`: tokens committed in earlier passes with a probability below `remask_threshold` are masked
            again, the least sure first, at most `remask_budget` times per row. `remdm`: ReMDM's law-preserving form
            for the `ancestral` rule, sigma_t = min(`remask_cap`, (1 - alpha_s) / alpha_t).
        edit_threshold: tokens of the block that is decoded are replaced by what the model would say now, where its probability
            is above this (token editing, LLaDA2.1); None for never. A block ends when a pass that began without masks changes
            nothing, or after `edit_passes` of these.
        forbid: vocabulary ids that may never be emitted, besides [MASK] and the other modality's.

    Raises:
        ValueError: a value outside its range; the message names it.
    """

    steps: _Passes = 16
    rule: str = "quota"
    schedule: str = "cosine"
    confidence: str = "probability"
    temperature: Annotated[float, Between(0, float("inf"))] = 1.0
    choice_temperature: _Size = 0.0
    top_k: _Count | None = None
    top_p: _Share | None = None
    threshold: float = 0.9
    factor: Annotated[float, Between(0, float("inf"))] = 1.0
    low_threshold: float = 0.5
    credit_decay: _Share = 0.8
    credit_power: _Size = 0.2
    credit_weight: _Strength = 0.7
    least_tokens: _Count = 1
    block_steps: _Passes | None = None
    block_length: _Count | None = None
    block_order: str = "sequence"
    blocks_in_flight: _Count = 1
    flight_share: _Share = 0.5
    flight_threshold: float = 0.9
    remask: str = "none"
    remask_threshold: _Share = 0.0
    remask_budget: Annotated[int, Between(0, 100_000)] = 0
    remask_cap: _Share = 0.0
    edit_threshold: _Share | None = None
    edit_passes: Annotated[int, Between(0, 100_000)] = 16
    forbid: tuple[Index, ...] = ()

    def __post_init__(self) -> None:
        _tuples(self, "forbid")
        check_fields(self, "")
        if self.schedule not in SCHEDULES:
            _one_of("schedule", self.schedule, ("fixed", *SCHEDULES))
        _one_of("confidence", self.confidence, CONFIDENCES)
        _one_of("block_order", self.block_order, BLOCK_ORDERS)
        _one_of("remask", self.remask, REMASKING)
        if self.top_p == 0:
            raise ValueError("top_p is 0; expected a number in (0, 1], or None to keep every token")
        rule = RULES[self.rule] if self.rule in RULES else RULES.get_or_refuse(self.rule, "rule")
        rule.check(self)
        if self.blocks_in_flight > 1 and self.block_length is None:
            raise ValueError(f"blocks_in_flight is {self.blocks_in_flight}, but there is one block; set block_length")
        if self.edit_threshold is not None:
            clashes = {"remask": self.remask != "none", "blocks_in_flight": self.blocks_in_flight > 1}
            clashes |= {"rule": not rule.looks(self) or rule.adjusts is not None}
            if clash := next((name for name, found in clashes.items() if found), None):
                raise ValueError(
                    f"edit_threshold does not go with {clash} = {getattr(self, clash)!r}; leave one of them out"
                )


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = uncond + s (cond - uncond); s = 1 is off and costs nothing.

    Args:
        scale: s at full strength. UniDisc's weight w and LLaDA's `cfg_scale` are s - 1.
        mode: `constant`; `ramp`: s(t) = 1 + (scale - 1)(1 - t), weak while all is masked (UniDisc);
            `window`: full strength while the progress 1 - t is inside `window`, off outside.
        window: start and stop of the window, shares of the decode.
        hide: what the unconditional pass does not see: all `given` tokens, every token of the `other` modality (given
            or generated; for joint generation), or the given `text` or `image`. A `condition` passed to the sampler wins.
        text_scale, image_scale: s for one modality where it differs.
        further: s of the second, third, ... unconditional rows, where the sampler is given several: every one adds
            (s - 1) (cond - uncond). Constant over time.
    """

    scale: _Strength = 1.0
    mode: str = "constant"
    window: tuple[_Share, _Share] = (0.0, 1.0)
    hide: str = "given"
    text_scale: _Strength | None = None
    image_scale: _Strength | None = None
    further: tuple[_Strength, ...] = ()

    def __post_init__(self) -> None:
        _tuples(self, "window", "further")
        check_fields(self, "guidance")
        _one_of("guidance mode", self.mode, GUIDANCE_MODES)
        _one_of("guidance hide", self.hide, HIDES)
        object.__setattr__(self, "further", tuple(float(s) for s in self.further))
        object.__setattr__(self, "window", tuple(float(w) for w in self.window))
        if self.window[0] > self.window[1]:
            raise ValueError(f"guidance window is {self.window}; expected (start, stop) with 0 <= start <= stop <= 1")

    def full_scale(self, modality: Modality) -> float:
        """s of a modality at full strength; 1 means that it is never guided."""
        own = self.text_scale if modality == Modality.TEXT else self.image_scale
        return self.scale if own is None else own

    def scale_at(self, modality: Modality, time: Tensor) -> Tensor:
        """s `[B]` at diffusion time t `[B]` (1 = all masked); 1 means off."""
        full = self.full_scale(modality)
        if self.mode == "ramp":
            return 1 + (full - 1) * (1 - time)
        if self.mode == "window":
            start, stop = self.window
            inside = (1 - time >= start) & (1 - time <= stop)
            return torch.where(inside, full, torch.ones_like(time))
        return torch.full_like(time, full)

    def uncond_mask(self, modality: Modality, batch: TokenBatch, condition: Tensor | None) -> Tensor:
        """bool `[B, L]`: what the unconditional pass for targets of `modality` does not see."""
        known = batch.given & batch.valid
        if condition is not None:
            return condition & known
        if self.hide == "given":
            return known
        if self.hide == "other":
            return batch.valid & (batch.modality != modality)
        return known & (batch.modality == (Modality.TEXT if self.hide == "text" else Modality.IMAGE))


@dataclass(frozen=True)
class SamplerConfig:
    """All settings of a decode.

    Args:
        text, image: per modality.
        guidance: classifier-free guidance.
        order: row by row, `together`: both modalities in every pass, each at its own pace; `text_first`, `image_first`:
            one after the other; `level`: by progress, the modality with the greater decoded share waits for the other.
        stop_at_eos: a text row ends when every position before its first generated end-of-text is known;
            what follows is filled with end-of-text.
        whole_blocks: an end of text counts when its block is complete and, with `edit_threshold`, no longer changed.
        ends: further ids that end a text, besides the vocabulary's `eos` (an end of turn, for instance).
        fill: what follows an end, where it is not end-of-text (UniDisc: padding).
    """

    text: ModalityDecoding = field(default_factory=lambda: ModalityDecoding(rule="threshold", temperature=0.0))
    image: ModalityDecoding = field(default_factory=lambda: ModalityDecoding(rule="quota", schedule="cosine"))
    guidance: Guidance = field(default_factory=Guidance)
    order: str = "together"
    stop_at_eos: bool = True
    whole_blocks: bool = False
    ends: tuple[Index, ...] = ()
    fill: Index | None = None

    def __post_init__(self) -> None:
        _tuples(self, "ends")
        check_fields(self, "sampler")
        _one_of("order", self.order, ORDERS)

    def of(self, modality: Modality) -> ModalityDecoding:
        """The settings of one modality."""
        return self.text if modality == Modality.TEXT else self.image

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplerConfig:
        """Inverse of `to_dict`. Keys left out keep their defaults; an unknown key is an error."""
        return from_data(cls, data, "sampler")


def _tuples(settings: object, *names: str) -> None:
    """Lists become tuples, as plain data has them."""
    for name in names:
        if isinstance(value := getattr(settings, name), list):
            object.__setattr__(settings, name, tuple(value))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r:.80}; expected one of {', '.join(allowed)}")


def _check_is(name: str, value: object, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {_name(value)}; expected {expected}")


def check_sampler(model: Any, vocabulary: Any, config: Any, policy: Any, rules: Any, graphs: Any) -> None:
    """Raise `ValueError` unless a `Sampler` can be made of these."""
    _check_methods("model", model, ("hidden", "head"), "see `Denoiser`")
    _check_is("vocabulary", vocabulary, Vocabulary, "a Vocabulary")
    _check_is("config", config, SamplerConfig, "a SamplerConfig (SamplerConfig.from_dict reads plain data)")
    if policy is not None:
        _check_methods("policy", policy, ("start", "plan"), "see `RefreshPolicy`; CacheConfig(name).build() makes one")
    _check_is("rules", rules, Mapping | None, "a mapping or nothing (null)")
    for modality, rule in (rules or {}).items():
        if not callable(rule) and not hasattr(rule, "start"):
            raise ValueError(f"rules has {rule!r} as a rule; expected a function, see `CommitRule`")
        if not isinstance(modality, Modality):
            raise ValueError(f"rules has the key {modality!r}; expected Modality.TEXT or Modality.IMAGE")
    if not isinstance(graphs, bool) and not callable(graphs):
        raise ValueError(f"graphs is {_name(graphs)}; expected true or false, or a `Record`")
    if isinstance(model, PartialDenoiser) and model.traits.ids < vocabulary.size:
        raise ValueError(
            f"the model has {model.traits.ids} ids, the vocabulary {vocabulary.size}; give the vocabulary that the "
            "model was made for"
        )
    _check_ids("ends", config.ends, vocabulary)
    (start, stop), masks = vocabulary.text, (vocabulary.mask_id, vocabulary.image_mask)
    if config.fill is not None and (not start <= config.fill < stop or config.fill in masks):
        raise ValueError(f"fill is id {config.fill}; expected a text id from {start} to {stop - 1} that is not [MASK]")


def banned_offsets(vocabulary: Vocabulary, modality: Modality, forbid: tuple[int, ...]) -> Tensor:
    """Offsets in the modality's slice that may not be emitted, int64."""
    _check_ids("forbid", forbid, vocabulary)
    start, stop = vocabulary.range_of(modality)
    offsets = {i - start for i in forbid if start <= i < stop} | set(vocabulary.forbidden(modality))
    if stop > start and len(offsets) == stop - start:
        raise ValueError(f"every {modality.name.lower()} id is forbidden; leave at least one to emit")
    return torch.tensor(sorted(offsets), dtype=torch.long)


def check_request(
    model: Any,
    vocabulary: Vocabulary,
    config: SamplerConfig,
    batch: Any,
    seeds: Any,
    condition: Any,
    callback: Any,
    record: Any,
    unconditional: Any,
) -> tuple[TokenBatch, tuple[TokenBatch, ...]]:
    """Raise `ValueError` unless a `Sampler` can be called with these; returns the batch on the CPU, and the unconditional ones."""
    host = _check_batch("batch", batch, vocabulary)
    rows, length = batch.shape
    _check_tensor("seeds", seeds, _INTEGERS, (rows,), f"an int64 tensor [{rows}], one per row", plural=True)
    if condition is not None:
        _check_tensor("condition", condition, (torch.bool,), (rows, length), f"a bool tensor {batch.shape}")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {_name(callback)}; expected a function of (step, state)")
    _check_is("record", record, bool, "true or false")
    several = isinstance(unconditional, Sequence) and not isinstance(unconditional, str)
    others = tuple(unconditional) if several else () if unconditional is None else (unconditional,)
    on_host = [_check_batch("unconditional", other, vocabulary) for other in others]
    if others and condition is not None:
        raise ValueError("condition and unconditional both say what the unconditional stream sees; give one of them")
    if max(1, len(others)) != 1 + len(config.guidance.further):
        raise ValueError(
            f"guidance has {1 + len(config.guidance.further)} scales for {len(others)} unconditional batches; "
            "`Guidance.further` takes a scale for each after the first"
        )
    for other in on_host:
        if other.shape != batch.shape:
            raise ValueError(f"unconditional has shape {other.shape}; expected {batch.shape}, that of the batch")
        if not torch.equal(other.targets, host.targets):
            raise ValueError(
                "unconditional has other targets than the batch; align the rows, for instance by left padding"
            )
    if any(rows.features is not None for rows in (host, *on_host)) and not takes_features(model):
        raise ValueError(
            f"the batch has continuous features, but {type(model).__name__} reads ids alone; its hidden needs an argument "
            "`features`, see `Denoiser`"
        )
    return host, others


def _check_batch(name: str, batch: Any, vocabulary: Vocabulary) -> TokenBatch:
    """The batch on the CPU, brought in one go."""
    if not isinstance(batch, TokenBatch):
        raise ValueError(f"{name} is {_name(batch)}; expected a TokenBatch")
    shape = tuple(getattr(batch.ids, "shape", ())[:2])
    for f, kind in zip(fields(TokenBatch), _KINDS, strict=False):
        value, own = getattr(batch, f.name), (*shape, 3) if f.name == "positions" else shape
        expected = f"{kind} {list(own)}"
        _check_tensor(f"{name} {f.name}", value, (kind,), own, expected, plural=True)
        if value.device != batch.ids.device:
            raise ValueError(f"{name} {f.name} are on {value.device}; expected {batch.ids.device}, that of the ids")
    if len(shape) != 2 or not batch.ids.numel():
        raise ValueError(f"{name} has shape {shape}; expected at least one row of at least one token")
    if (features := batch.features) is not None:
        width = features.shape[-1:] if isinstance(features, Tensor) else ()
        floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        _check_tensor(f"{name} features", features, floats, (*shape, *width), f"floats {[*shape, 'D']}", plural=True)
        if features.device != batch.ids.device:
            raise ValueError(f"{name} features are on {features.device}; expected {batch.ids.device}, that of the ids")
    host = batch.to("cpu")
    known = host.valid & host.given if features is None else host.valid & host.given & (host.ids != CONTINUOUS)
    low, high = map(int, torch.where(known, host.ids, 0).aminmax())
    first, last = map(int, torch.where(host.valid, host.modality, 0).aminmax())
    if not 0 <= low <= high < vocabulary.size:
        raise ValueError(
            f"{name} gives ids from {low} to {high}, but the vocabulary has ids 0 to {vocabulary.size - 1}"
        )
    if not 0 <= first <= last < len(Modality):
        raise ValueError(f"{name} has modalities from {first} to {last}; expected 0 (text) and 1 (image)")
    return host


def _check_tensor(
    name: str, value: Any, kinds: Sequence[torch.dtype], shape: tuple[int, ...], expected: str, plural: bool = False
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} {'are' if plural else 'is'} {_name(value)}; expected {expected}")
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        kind = "on the meta device, without values" if value.is_meta else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a tensor {kind}; expected a plain one (`.to_dense()`, or real values)")
    if value.dtype not in kinds or value.shape != shape:
        found = f"shape {tuple(value.shape)} and dtype {value.dtype}"
        raise ValueError(f"{name} {'have' if plural else 'has'} {found}; expected {expected}")


def _check_ids(name: str, ids: Sequence[int], vocabulary: Vocabulary) -> None:
    if outside := [i for i in ids if not 0 <= i < vocabulary.size]:
        raise ValueError(f"{name} names id {outside[0]}, but the vocabulary has ids 0 to {vocabulary.size - 1}")


def _check_methods(name: str, value: object, methods: Sequence[str], hint: str) -> None:
    if missing := [m for m in methods if not hasattr(value, m)]:
        raise ValueError(f"{name} is {_name(value)} without {' and '.join(missing)}; {hint}")


def _name(value: object) -> str:
    shown = repr(value) if isinstance(value, bool | int | float | str | type(None)) else f"a {type(value).__name__}"
    return shown if len(shown) < 80 else f"{shown[:77]}..."
