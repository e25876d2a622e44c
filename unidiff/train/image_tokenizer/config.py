"""Settings of an image tokenizer's run: frozen dataclasses filled from one YAML file, see `configs/emoji_tokenizer.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Annotated, Any

from unidiff.schema import Between, check_arguments, check_fields
from unidiff.train.config import TrackerName

Steps = Annotated[int, Between(1, 2**40)]
Weight = Annotated[float, Between(0, 1e9)]
Rate = Annotated[float, Between(1e-30, 1e3)]


@dataclass(frozen=True)
class ImageData:
    """Where pictures come from: the scenes of a world (`world`), or webdataset shards (`shards`)."""

    world: str | None = None
    profile: str = "cpu"  # which scenes of the world
    # relative frequencies of its kinds of scenes; those of emoji are single, count, pair and group
    kinds: tuple[float, float, float, float] = (0.15, 0.25, 0.4, 0.2)
    shards: list[str] = field(default_factory=list)  # see `unidiff.data.sources.expand_shards`
    # side of the square pictures of shards, in pixels; 0: the size that `unidiff shards` gave them, else 256
    image_size: Annotated[int, Between(0, 2**14)] = 0
    validation_images: Annotated[int, Between(0, 2**20)] = 0  # never trained on; 0: 256, or 1 in 8 of fewer than 2,048

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if min(self.kinds) < 0 or sum(self.kinds) <= 0:
            raise ValueError(f"data.kinds is {self.kinds}; expected shares, none negative and not all 0")


@dataclass(frozen=True)
class VQLossWeights:
    """Weights of the reconstruction terms; `edge_focus` multiplies errors near strong gradients of the target.

    `cycle` asks that an encoded reconstruction gets the codes it was decoded from (`CellVQModel` only): pictures that a
    transformer draws are then read back as the tokens it drew.
    """

    l1: Weight = 1.0
    l2: Weight = 2.0
    gradient: Weight = 0.5
    commitment: Weight = 0.25
    edge_focus: Weight = 4.0
    cycle: Weight = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "loss.")


@dataclass(frozen=True)
class CellCodes:
    """How the encoder learns its codes, alone; see `unidiff.train.image_tokenizer.losses`."""

    steps: Annotated[int, Between(0, 2**40)] = 0  # 0 leaves encoder and codebook to the training of the whole tokenizer
    batch: Annotated[int, Between(1, 2**20)] = 900  # cells per step, each on all backgrounds
    learning_rate: Rate = 2e-3  # highest, of AdamW; falls as a cosine
    temperature: Annotated[float, Between(1e-6, 1e6)] = 0.05  # of the softmax over cosines

    def __post_init__(self) -> None:
        check_fields(self, "cells.")


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """One tokenizer run. `steps` counts optimiser steps of `batch_size` images.

    `decoder_only` (with `init_from`) sharpens the decoder of a `CellVQModel` and leaves its codes as they are, so that
    a transformer trained on these codes stays valid. With `cells.steps` the encoder learns first, alone, to give the
    objects' cells the same codes on every background, and then the decoder with these codes.

    `model` holds `kind` (`cell` for a `CellVQModel`, `vqmodel` for diffusers' `VQModel`, or another of `IMAGE_TOKENIZERS` that
    can be trained) and the settings of that network; those left out are its defaults.

    `device` is auto, cpu or cuda, `threads` those of the CPU (0: all). A checkpoint is written every `checkpoint_every`
    steps, at the end, and on SIGTERM or Ctrl-C; `fallback` goes on from the one before where the newest is damaged.
    """

    out: str = "runs/image_tokenizer"
    init_from: str | None = None
    decoder_only: bool = False
    cells: CellCodes = field(default_factory=CellCodes)
    data: ImageData = field(default_factory=ImageData)
    model: dict[str, Any] = field(default_factory=dict)
    loss: VQLossWeights = field(default_factory=VQLossWeights)
    steps: Steps = 4000
    batch_size: Steps = 64
    learning_rate: Rate = 2e-3
    warmup_steps: Annotated[int, Between(0, 2**40)] = 100
    revive_until: Annotated[float, Between(0, 1)] = 0.6
    bf16: bool = True
    log_every: Steps = 50
    validate_every: Steps = 500
    checkpoint_every: Steps = 500
    fallback: bool = False
    trackers: list[TrackerName] = field(default_factory=list)  # where numbers and sheets go besides `metrics.jsonl`
    project: str = "unidiff"  # in W&B and trackio
    device: str = "auto"
    threads: Annotated[int, Between(0, 1024)] = 0
    seed: Annotated[int, Between(0, 2**62)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "")
        if not self.out.strip():
            raise ValueError("out is empty; name a folder")
        object.__setattr__(self, "model", network_settings(self.model))


def network_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a network to train: `kind`, and what that kind's `maker` takes; `ValueError` for others."""
    kind = given.get("kind", "cell")
    maker = _maker(kind)
    known = {name: p.default for name, p in signature(maker).parameters.items() if name != "self"}
    if unknown := sorted(given.keys() - known.keys() - {"kind"}):
        raise ValueError(f"model has settings that {kind!r} does not know: {unknown}; expected some of {sorted(known)}")
    check_arguments(maker, given, "model.")
    return {"kind": kind, **known, **given}


def new_network(settings: Mapping[str, Any]) -> Any:
    """A freshly initialised network (torch's global generator) of `network_settings`."""
    return _maker(settings["kind"])(**{name: value for name, value in settings.items() if name != "kind"})


def _maker(kind: Any) -> Callable[..., Any]:
    from unidiff.tokens.image.protocols import TrainableTokenizer
    from unidiff.tokens.image.vq import IMAGE_TOKENIZERS

    found = [cls for cls in IMAGE_TOKENIZERS.values() if issubclass(cls, TrainableTokenizer) and cls.kind]
    makers = {cls.kind: cls.maker() for cls in found}
    if not isinstance(kind, str) or kind not in makers:
        raise ValueError(f"model.kind is {kind!r:.80}; expected one of {', '.join(sorted(makers))}")
    return makers[kind]
