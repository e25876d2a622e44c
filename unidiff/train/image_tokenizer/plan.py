"""What training an image tokenizer costs, before it is started: operations and memory, counted on one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from unidiff.data.collect import size_of
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.train.image_tokenizer.config import ImageTokenizerConfig, new_network
from unidiff.train.image_tokenizer.losses import vq_forward
from unidiff.world import WORLDS

_GIB = 2**30


@dataclass(frozen=True)
class TokenizerPlan:
    """A run of a tokenizer of so many weights, on pictures of so many pixels."""

    parameters: int
    size: tuple[int, int]  # (height, width)
    codes: int  # of a picture
    batch_size: int
    steps: int
    flops: float  # of a picture, forward and backward
    saved: int  # bytes of a picture that the backward pass needs

    @property
    def memory(self) -> int:
        """Bytes of weights, gradients and AdamW's state in float32, and of what a batch keeps. A tenth more is wise."""
        return 16 * self.parameters + self.batch_size * self.saved

    def lines(self, gpus: int, memory: float | None, tflops: float | None) -> Iterator[str]:
        """The plan for a person. memory: GiB of one GPU. tflops: TFLOP/s that one GPU keeps up."""
        height, width = self.size
        step = self.flops * self.batch_size
        yield f"parameters   {self.parameters / 1e6:.2f} M"
        yield f"pictures     {width} x {height}, {self.codes} codes each; {self.batch_size} a step, {self.steps} steps"
        yield f"operations   {self.flops / 1e9:.2f} GFLOP per picture, {step * self.steps / 1e15:.3g} PFLOP in all"
        yield f"memory       {self.memory / _GIB:.2f} GiB on one device: {self.saved / 2**20:.1f} MiB per picture"
        if memory is not None:
            most = int((memory * _GIB - 16 * self.parameters) // max(self.saved, 1))
            yield (
                f"fits         batch_size up to {most} in {memory:g} GiB"
                if most > 0
                else f"fits         not {memory:g} GiB"
            )
        if tflops is not None:
            hours = self.steps * step / (gpus * tflops * 1e12) / 3600
            yield f"time         {hours:.2f} hours on {gpus} GPUs at {tflops:g} TFLOP/s each"


def plan_tokenizer(config: ImageTokenizerConfig) -> TokenizerPlan:
    """Count a run. Raises ValueError for sides that the factor does not divide; shards need not exist where the config says the
    size of their pictures."""
    if config.data.world is not None:
        world = WORLDS.get_or_refuse(config.data.world, "data.world")
        picture = world.pictures(config.data.profile, config.data.kinds, 0)(0)
        height, width = picture.shape[1:]
    else:
        side = config.data.image_size
        height, width = (side, side) if side else size_of(config.data.shards)
    with torch.random.fork_rng(devices=()):
        model = new_network(config.model).train()
    factor = VQImageTokenizer(model).factor
    if height % factor or width % factor:
        raise ValueError(f"pictures of {width} x {height} pixels: factor {factor} must divide both sides")
    model.train()
    weights = {value.untyped_storage().data_ptr() for value in model.state_dict().values()}
    kept: dict[int, int] = {}  # bytes by where they are, alive until the backward pass

    def note(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        vq_forward(model, torch.zeros(1, 3, height, width), config.loss, False).loss.backward()
    saved = sum(size for place, size in kept.items() if place not in weights)
    parameters = sum(value.numel() for value in model.parameters())
    codes = (height // factor) * (width // factor)
    flops = float(counter.get_total_flops())
    return TokenizerPlan(parameters, (height, width), codes, config.batch_size, config.steps, flops, saved)
