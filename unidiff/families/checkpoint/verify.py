"""What a checkpoint is and needs, whether it is the published one, and whether it computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from unidiff.families.checkpoint.config_keys import section
from unidiff.families.checkpoint.load import IMAGE_PLACES, PIPELINE_PARTS, find_part, load_released
from unidiff.families.family import Config, Family, Release, Released
from unidiff.families.llada_v.network import VisionLanguageTransformer
from unidiff.hub import HUB_OPTIONS
from unidiff.models.dual_mmdit import DualMMDiT
from unidiff.models.experts import idle_weights
from unidiff.models.mmdit import MMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary
from unidiff.tokens.batch import Span, TokenBatch
from unidiff.tokens.image.protocols import StoredPart
from unidiff.tokens.image.vq import VQImageTokenizer, coder_of
from unidiff.weights.files import build_on_meta

DEFAULT_TOKENS = 1024
LONGEST_TOKENS = 2**24  # lengths above it are a config's way of saying "no limit"
TEXT_TOKENS, SIDE = 12, 4
_IDS = ("size", "text", "image", "mask_id", "image_mask_id", "others")


@dataclass(frozen=True)
class Description:
    """What `info` prints.

    Attributes:
        family: name. image_tokenizer: family of the codes that it reads. settings: of our model.
        dtypes: number of parameters by dtype. active: how many of them a token passes; all without experts.
        weight_bytes: of weights and buffers, as stored or in the dtype asked for.
        tokens: length of the row that `pass_bytes` is for; None for an image tokenizer.
        carried: number of the weights of parts that no task runs, by part.
        pass_bytes: estimate of what one pass at batch 1 adds: the widest layer, and the logits of every token.
        beside: bytes of weights that are read when they are first needed, by name.
        images: of the image tokenizer that lies beside the weights of a denoiser, which a pipeline reads in float32.
    """

    family: str
    image_tokenizer: str | None
    dtypes: Mapping[str, int]
    active: int
    weight_bytes: int
    tokens: int | None
    pass_bytes: int
    vocabulary: Vocabulary | None
    settings: Mapping[str, Any]
    beside: Mapping[str, int] = field(default_factory=dict)
    images: Description | None = None
    carried: Mapping[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(self.dtypes.values())

    def lines(self) -> dict[str, str]:
        """For people: names and values."""
        kinds = ", ".join(f"{name} {count / self.parameters:.0%}" for name, count in self.dtypes.items())
        out = {
            "family": self.family,
            "parameters": f"{self.parameters:,}"
            + (f", {self.active:,} active" if self.active < self.parameters else ""),
            "dtype": kinds if len(self.dtypes) > 1 else next(iter(self.dtypes), "none"),
            "memory": f"{gigabytes(self.weight_bytes)} of weights",
        }
        if self.tokens is not None:
            out["memory"] += f" + about {gigabytes(self.pass_bytes)} for a pass over {self.tokens} tokens at batch 1"
        out |= {
            name: f"{gigabytes(size)} of weights, read when it is first needed" for name, size in self.beside.items()
        }
        if (v := self.vocabulary) is not None:
            images = f", image codes {v.image[0]}-{v.image[1] - 1}" if v.image_size else ", no images"
            masks = f"{v.mask_id}" if v.image_mask == v.mask_id else f"{v.mask_id} and {v.image_mask}"
            out["vocabulary"] = f"{v.size} ids: text {v.text[0]}-{v.text[1] - 1}{images}, [MASK] {masks}"
            more = [f"ids {start}-{stop - 1} of {name}" for name, (start, stop) in v.others.items()]
            more += [f"{count} weights of {part}" for part, count in self.carried.items()]
            if more:
                out["in no task"] = ", ".join(more)
        if self.images is not None:
            held = {
                "image tokenizer": f"{self.images.family}, {gigabytes(self.images.weight_bytes)} of weights in float32"
            }
            return out | held | {n: v for n, v in self.images.lines().items() if n in self.images.beside}
        return out | ({"image tokenizer": self.image_tokenizer} if self.image_tokenizer else {})


def describe(name: str | Path, **options: Any) -> Description:
    """Family, size, vocabulary and memory of a released or converted checkpoint.

    Args:
        name, options: as in `load_released`; `dtype` changes the memory.

    Raises:
        FileNotFoundError, ValueError: as `load_released`; names and shapes are checked, values are not.
    """
    released = load_released(name, device="meta", **options)
    dtypes: Counter[str] = Counter()
    for parameter in released.model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    tokens = None if released.vocabulary is None else _row_length(released.config)
    return Description(
        released.family.name,
        released.family.image_tokenizer,
        dtypes=dict(dtypes.most_common()),
        active=sum(dtypes.values()) - idle_weights(released.model),
        weight_bytes=sum(value.nbytes for value in released.model.state_dict().values()),
        tokens=tokens,
        pass_bytes=0 if tokens is None else pass_bytes(released.model, tokens),
        vocabulary=released.vocabulary,
        settings=plain_settings(released.model),
        beside={name: part.weight_bytes() for name, part in _parts_beside(released).items()},
        images=_images_beside(released, name, options),
        carried=Counter(name.partition(".")[0] for name in released.carried),
    )


def _images_beside(released: Released, name: str | Path, options: Mapping[str, Any]) -> Description | None:
    """That of the image tokenizer beside a denoiser; None without one that can be read, which loading a pipeline tells more of."""
    if released.family.image_tokenizer is None:
        return None
    hub = {option: value for option, value in options.items() if option in HUB_OPTIONS}
    folder = find_part(name, options.get("subfolder"), **hub)
    root = folder.parent if folder.is_file() or folder.name == PIPELINE_PARTS[0] else folder
    try:
        return next((describe(root / p, dtype=torch.float32) for p in IMAGE_PLACES if (root / p).exists()), None)
    except (ValueError, FileNotFoundError):
        return None


def _parts_beside(released: Released) -> Mapping[str, StoredPart]:
    """What an image tokenizer reads later."""
    return {} if released.vocabulary is not None else coder_of(released.model).parts_beside()


def plain_settings(model: Any) -> dict[str, Any]:
    """The constructor arguments of a model; sequences as lists, as a saved config has them."""
    settings = ((name, value) for name, value in dict(model.config).items() if not name.startswith("_"))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings}


def _row_length(config: Config) -> int:
    """Tokens of the longest row that a config speaks of; `DEFAULT_TOKENS` where it does not."""
    outer = section(config, "config") or config
    for key in ("max_sequence_length", "length", "max_position_embeddings"):
        for value in (outer.get(key), section(outer, "model").get(key)):
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LONGEST_TOKENS:
                return value
    return DEFAULT_TOKENS


def pass_bytes(model: nn.Module, tokens: int) -> int:
    """Rough memory of one forward pass at batch 1: residual, queries, keys, values, the inner layer, and all logits."""
    width = next(model.parameters()).element_size()
    if isinstance(model, MaskedTransformer):
        c = model.settings
        inner = c.inner_size * (2 if c.activation == "swiglu" else 1)
        if any(
            map(c.has_experts, range(c.num_layers))
        ):  # every token once per expert that it passes: input, inner layer, output
            routed = c.experts_per_token * (2 * c.hidden_size + 2 * (c.expert_size or 0)) + 2 * c.shared_expert_size
            inner = max(inner, routed)
        return tokens * (width * (6 * c.hidden_size + 2 * inner) + 4 * c.vocab_size)
    assert isinstance(model, (MMDiT, DualMMDiT))
    own = model.config
    dual = isinstance(model, DualMMDiT)
    logits = own.vocab_size if dual else max(own.codebook_size, own.text_vocab_size or 0)
    return tokens * (width * 16 * own.num_heads * own.head_dim + 4 * logits)


def gigabytes(count: int) -> str:
    """`1.41 GB`, or MB below a tenth of that."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class Check(NamedTuple):
    """One finding: what was looked at, whether it holds, and the details."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


class Verification(NamedTuple):
    """What `verify` found; `release` is the closest published model, None where nothing of the family is published."""

    family: str
    release: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


class OtherSetting(NamedTuple):
    """A setting that is not the published one."""

    name: str
    published: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.name} is {self.found!r}, published {self.published!r}"


def verify(
    name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **options: Any
) -> Verification:
    """Load a checkpoint completely, compare it with its family's published values, and let it compute.

    1. Every weight is there, in shape and finite (loading raises otherwise).
    2. Its settings and id layout are those of the closest published model, and the stated number of parameters.
    3. The family's arithmetic on this machine gives the recorded numbers of a tiny model (`Family.tiny`).
    4. One small pass of the checkpoint itself is finite and not constant.
    5. What is read later (pixel decoders of an image tokenizer) can be read, and what lies beside the weights is as it should be.

    Arguments and errors are those of `load_released`.
    """
    released = load_released(name, dtype, device, **options)
    family = released.family
    count = sum(p.numel() for p in released.model.parameters())
    checks = [Check("weights", True, f"{count:,} parameters, all there and finite")]
    closest = closest_release(family, plain_settings(released.model), released.vocabulary)
    if closest is not None:
        release, others = closest
        shown = "; ".join(map(str, others[:5])) + ("; ..." if len(others) > 5 else "")
        alike = " or ".join(other.name for other in family.releases if other.config == release.config)
        detail = f"{len(others)} differ from {release.name}: {shown}" if others else f"as {alike}"
        checks.append(Check("published settings", not others, detail))
        if release.parameters is not None:
            off = abs(count - release.parameters) / release.parameters
            detail = f"{count:,} here, {release.parameters:,} stated"
            checks.append(Check("number of parameters", off <= release.tolerance, detail))
    expected, found = family.tiny.answer, known_answer(family)
    detail = "a tiny model answers as recorded"
    if not agrees(found, expected):
        detail = f"a tiny model answers {found}, recorded {expected}; the arithmetic here differs"
    checks.append(Check("known answer", agrees(found, expected), detail))
    values = answer(released.model if released.images is None else released.images, released.vocabulary)
    alive = bool(torch.isfinite(values).all()) and float(values.std()) > 0
    detail = f"{values.numel()} values, mean {float(values.mean()):.4g}, deviation {float(values.std()):.4g}"
    checks.append(Check("a pass of this checkpoint", alive, detail))
    for beside, stored in _parts_beside(released).items():
        size = sum(p.numel() for p in stored.load().parameters())
        checks.append(Check(beside, True, f"{size:,} parameters, all there and finite"))
    if family.examine is not None and released.vocabulary is not None:
        part = find_part(name, options.get("subfolder"))
        found_beside = family.examine(part if part.is_dir() else part.parent, released.vocabulary)
        checks += [Check(what, *result) for what, result in found_beside.items()]
    return Verification(family.name, None if closest is None else closest[0].name, tuple(checks))


def closest_release(
    family: Family, settings: Mapping[str, Any], vocabulary: Vocabulary | None = None
) -> tuple[Release, list[OtherSetting]] | None:
    """The published model of a family that differs least, and how; None where nothing of the family is published."""
    found = [(release, differences(family, release, settings, vocabulary)) for release in family.releases]
    return min(found, key=lambda pair: len(pair[1])) if found else None


def differences(
    family: Family, release: Release, settings: Mapping[str, Any], vocabulary: Vocabulary | None = None
) -> list[OtherSetting]:
    """Where the settings and the vocabulary of a model differ from a published one; a setting that is not named differs."""
    published = family.settings(release.config)
    pairs = [(name, value, settings.get(name)) for name, value in published.items() if name not in family.unstated]
    if vocabulary is not None and family.vocabulary is not None:
        ids = family.vocabulary(release.config)
        pairs += [(f"vocabulary.{name}", getattr(ids, name), getattr(vocabulary, name)) for name in _IDS]
        pairs += [(f"vocabulary.{name}", i, vocabulary.specials.get(name)) for name, i in ids.specials.items()]
    plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    return [OtherSetting(name, value, found) for name, value, found in pairs if plain(found) != plain(value)]


@torch.no_grad()
def answer(model: Any, vocabulary: Vocabulary | None) -> Tensor:
    """What a `MaskedTransformer`, `MMDiT`, `DualMMDiT` or image tokenizer (without a vocabulary) says to a small fixed question:
    logits of hidden tokens, or pixels (of one whose decoder draws noise, latents of a picture); float32, flat, on the CPU.
    """
    if isinstance(model, VQImageTokenizer) and model.draws:
        side = SIDE * model.factor
        waves = torch.sin(torch.arange(3 * side * side).float()).reshape(1, 3, side, side) * 0.5 + 0.5
        return model.model.latents(waves.to(model.device)).float().cpu().flatten()
    if isinstance(model, VQImageTokenizer):
        codes = torch.arange(SIDE * SIDE).reshape(1, SIDE, SIDE) * 7 % model.codebook_size
        return model.decode(codes).float().cpu().flatten()
    assert vocabulary is not None
    if isinstance(model, MMDiT):
        return _mmdit(model).float().cpu().flatten()
    if isinstance(model, DualMMDiT):
        return _dual(model).float().cpu().flatten()
    assert isinstance(model, MaskedTransformer)
    seen = _seen(model) if isinstance(model, VisionLanguageTransformer) else []
    batch = _question(vocabulary, seen).to(model.device)
    c = model.config
    time = torch.full((1,), 0.5, device=model.device) if c.time_conditioning and c.constant_time is None else None
    rows = batch.ids, batch.modality, batch.positions, batch.attention_mask()
    hidden = model.hidden(*rows, time, **batch.continuous())
    logits = model.head(hidden[batch.targets], *vocabulary.text)  # [targets, text ids]
    return logits.float().cpu().flatten()


def _seen(model: VisionLanguageTransformer) -> list[Span]:
    """A picture of one tile, which no resizing changes."""
    side = model.settings.tile_side
    place = torch.arange(side)
    pixels = (7 * place[:, None, None] + 3 * place[:, None] + 50 * torch.arange(3)) % 256  # [side, side, 3]
    return model.spans(Image.fromarray(pixels.to(torch.uint8).numpy()))


def _question(vocabulary: Vocabulary, seen: Sequence[Span] = ()) -> TokenBatch:
    """A row of text, every third token hidden, and where there are codes an image with every other one hidden; behind what is
    `seen`."""
    start, stop = vocabulary.text
    ids = start + torch.arange(TEXT_TOKENS) * 5 % (stop - start)
    hidden = torch.arange(TEXT_TOKENS) % 3 == 2
    spans = [Span.text(torch.where(hidden, vocabulary.mask_id, ids), ~hidden)]
    if vocabulary.image_size:
        places = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE)
        codes, holes = vocabulary.image[0] + places * 3 % vocabulary.image_size, places % 2 == 1
        spans.append(Span.image(torch.where(holes, vocabulary.image_mask, codes), ~holes))
    return TokenBatch.from_spans([(*seen, *spans)])


def _mmdit(model: MMDiT) -> Tensor:
    c, device = model.config, model.device
    codes = torch.arange(SIDE * SIDE, device=device).reshape(1, SIDE, SIDE) * 3 % c.codebook_size
    codes[:, :, 1::2] = c.vocab_size - 1
    width = c.text_dim if c.adapter_dim is None else c.adapter_dim
    text = torch.sin(torch.arange(TEXT_TOKENS * width, device=device).float()).reshape(1, TEXT_TOKENS, width)
    pooled = torch.sin(torch.arange(c.pooled_dim, device=device).float())[None]
    micro = torch.tensor([[512.0, 512.0, 0.0, 0.0, 6.0]], device=device)
    out = model(codes, text.to(model.dtype), pooled.to(model.dtype), micro, torch.tensor([0.5], device=device))
    return out.image if out.text is None else torch.cat((out.image.flatten().float(), out.text.flatten().float()))


def _dual(model: DualMMDiT) -> Tensor:
    c, device, side = model.config, model.device, SIDE * model.config.patch_size
    wave = lambda *shape: torch.sin(torch.arange(math.prod(shape), device=device).float()).reshape(1, *shape)  # noqa: E731
    latents, text = wave(c.in_channels, side, side), wave(TEXT_TOKENS, c.text_dim)
    out = model(latents.to(model.dtype), text.to(model.dtype), torch.tensor([500.0], device=device))
    return torch.cat((out.image.flatten().float(), model.text_head(out.text).flatten()))


def formula_weights(family: Family) -> dict[str, Tensor]:
    """Weights of the tiny model under released names: 0.3 sin(...), and around 1 for vectors."""
    settings = {**family.settings(family.tiny.config), **family.tiny.measured}
    state = family.export(build_on_meta(family.network, settings))
    return {n: v if n in family.constants else _wave(tuple(v.shape), sum(n.encode())) for n, v in state.items()}


def known_answer(family: Family) -> tuple[float, float, float, float]:
    """What the tiny model answers here, through the family's own loader; compare with `family.tiny.answer`."""
    model, vocabulary = family.load(formula_weights(family), family.tiny.config, vocabulary=family.tiny.vocabulary)
    values = answer(model, vocabulary).double()
    return float(values.mean()), float(values.std()), float(values[0]), float(values[-1])


def agrees(found: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    """Within the rounding of float32 on another machine."""
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) for a, b in zip(found, expected, strict=True))


def _wave(shape: tuple[int, ...], phase: int) -> Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(0.7 * index + 0.013 * phase).float().reshape(shape)
    return 0.3 * values if len(shape) > 1 else 1 + 0.2 * values
