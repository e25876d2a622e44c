"""The image tokenizer's training run: data, schedule, spike guard, best weights, report and picture sheet."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.data.emoji_scenes import SceneGenerator, get_profile, render
from unidiff.files import replacing, replacing_folder
from unidiff.tokens.cell_vq import CellVQModel
from unidiff.tokens.image_vq import VQImageTokenizer
from unidiff.train.cell_codes import CellCodes, emoji_cells, train_cell_codes
from unidiff.train.vq import CodebookAverage, VQLossWeights, VQModelConfig, psnr, vq_forward


@dataclass(frozen=True)
class ImageData:
    """Where pictures come from: the scene generator (`emoji_profile`), or webdataset shards (`shards`).

    `emoji_kinds` are the relative frequencies of single, count, pair and group scenes (many sprites per picture).
    """

    emoji_profile: str | None = None
    emoji_kinds: tuple[float, float, float, float] = (0.15, 0.25, 0.4, 0.2)
    shards: list[str] = field(default_factory=list)
    image_size: int = 256
    validation_images: int = 256


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """One tokenizer run; see `configs/emoji_tokenizer.yaml`. `steps` counts optimiser steps of `batch_size` images.

    `decoder_only` (with `init_from`) sharpens the decoder of a `CellVQModel` and leaves its codes as they are, so that
    a transformer trained on these codes stays valid. With `cells.steps` the encoder learns first, alone, to give the
    objects' cells the same codes on every background (`train_cell_codes`), and then the decoder with these codes.
    """

    out: str = "runs/image_tokenizer"
    init_from: str | None = None
    decoder_only: bool = False
    cells: CellCodes = field(default_factory=CellCodes)
    data: ImageData = field(default_factory=ImageData)
    model: VQModelConfig = field(default_factory=VQModelConfig)
    loss: VQLossWeights = field(default_factory=VQLossWeights)
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    revive_until: float = 0.6
    bf16: bool = True
    log_every: int = 50
    validate_every: int = 500
    seed: int = 0


def train_image_tokenizer(config: ImageTokenizerConfig) -> dict:
    """Run the training and return the report that is also written to `<out>/report.json`.

    Raises:
        ValueError: a setting that cannot work, or no usable picture.
        FileNotFoundError: `init_from` or a shard does not exist.
    """
    torch.manual_seed(config.seed)  # initial weights
    generator = torch.Generator().manual_seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    model, average = _build(config)
    found = {}
    if config.cells.steps:
        found = _learn_codes(model, config, generator, out / "log.jsonl")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    batches, validation = _batches(config)
    best, guard, start = -math.inf, SpikeGuard(), time.monotonic()
    for step in range(config.steps):
        # 1. reconstruct a batch, and the gradient of the loss
        images = next(batches)
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config.warmup_steps, config.steps)
        result, latents = vq_forward(model, images, config.loss, config.bf16)
        optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        if not guard.accepts(float(result.mse), step):
            continue
        # 2. weights, then the codebook
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        revived = 0
        if average is not None and latents is not None:
            revive = step % 10 == 0 and step < config.revive_until * config.steps
            revived = average.update(result.codes, latents, generator, revive)
        # 3. report, and keep the best weights
        last, seconds = step == config.steps - 1, round(time.monotonic() - start, 1)
        if step % config.log_every == 0 or last:
            line = {"step": step, "loss": round(result.loss.item(), 5), "psnr": round(psnr(guard.level), 2),
                    "codes": int(result.codes.unique().numel()), "revived": revived, "seconds": seconds}  # fmt: skip
            _say(line, out / "log.jsonl")
        if (step + 1) % config.validate_every == 0 or last:
            report = measure(model, validation)
            _say({"validation": report, "step": step + 1}, out / "log.jsonl")
            if report["psnr"] > best:
                best = report["psnr"]
                report |= found | {"step": step + 1, "skipped_steps": guard.skipped, "seconds": seconds}
                _save(model, out, report, validation)
            model.train()
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


class SpikeGuard:
    """Leaves out steps whose error jumps or is not a number: one such step once threw a run from 20 dB to 0.5."""

    def __init__(self, allowed: int = 50) -> None:
        self.allowed, self.skipped = allowed, 0
        self.level: float = math.inf  # moving average of the mean squared error

    def accepts(self, mse: float, step: int) -> bool:
        """Whether to take a step with this error. Raises ValueError after too many refusals."""
        if not math.isfinite(mse) or mse > 8 * self.level + 0.02:
            self.skipped += 1
            if self.skipped > self.allowed:
                raise ValueError(
                    f"more than {self.allowed} steps diverged, the last at step {step}; lower learning_rate"
                )
            return False
        self.level = mse if math.isinf(self.level) else 0.98 * self.level + 0.02 * mse
        return True


def _build(config: ImageTokenizerConfig) -> tuple[Any, CodebookAverage | None]:
    """The model to train, and the moving averages of its codebook where it learns one that way."""
    loaded = VQImageTokenizer.from_pretrained(config.init_from).model if config.init_from else None
    model: Any = (loaded or config.model.build()).float().train().to(memory_format=torch.channels_last)
    cell = isinstance(model, CellVQModel)
    if config.loss.cycle and not cell:
        raise ValueError(f"loss.cycle {config.loss.cycle} needs a CellVQModel; set it to 0 or model.kind to 'cell'")
    if config.decoder_only:
        if not (cell and config.init_from):
            raise ValueError("decoder_only needs init_from with a CellVQModel; set init_from or turn decoder_only off")
        model.encoder.requires_grad_(False)
    if config.cells.steps and not (cell and config.data.emoji_profile and not config.decoder_only):
        raise ValueError("cells.steps needs model.kind cell, data.emoji_profile and decoder_only off; or set it to 0")
    frozen = config.decoder_only or config.cells.steps > 0
    average = CodebookAverage(model) if cell and not frozen else None
    if average is not None and config.init_from:
        average.started = True
    return model, average


def _learn_codes(model: CellVQModel, config: ImageTokenizerConfig, generator: torch.Generator, log: Path) -> dict:
    """Encoder and codebook, which then stay as they are."""
    assert config.data.emoji_profile is not None
    cells, flat = emoji_cells(config.data.emoji_profile, int(model.config.factor))
    report = train_cell_codes(model, cells, flat, config.cells, config.bf16, generator, lambda line: _say(line, log))
    model.encoder.requires_grad_(False)
    return report


def _say(line: dict, log: Path) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


@torch.no_grad()
def measure(model, validation: Tensor) -> dict:
    """PSNR (dB), SSIM (7 x 7 uniform window), the share of codes used, and the share of codes that stay the same when a
    reconstruction is encoded again, on `validation` `[N, 3, H, W]`."""
    tokenizer = VQImageTokenizer(model)
    codes, outputs, kept = [], [], []
    for chunk in validation.split(64):
        codes.append(tokenizer.encode(chunk))
        outputs.append(tokenizer.decode(codes[-1]))
        kept.append((tokenizer.encode(outputs[-1]) == codes[-1]).float())
    output, used = torch.cat(outputs), torch.cat(codes).unique().numel()
    return {
        "codes_kept": round(float(torch.cat(kept).mean()), 4),
        "psnr": round(psnr(float((output - validation).square().mean())), 3),
        "ssim": round(float(ssim(output, validation)), 4),
        "codes_used": used,
        "code_usage": round(used / tokenizer.codebook_size, 4),
    }


def ssim(x: Tensor, y: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity (Wang et al. 2004, eq. 13) of images `[N, 3, H, W]` in [0, 1], uniform window."""

    def mean(v: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(v, window, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def emoji_images(
    profile_name: str, seed: int, start: int, count: int, kinds: tuple[float, ...] = ImageData.emoji_kinds
) -> Tensor:
    """Rendered training scenes `start .. start + count`: float `[count, 3, H, W]` in [0, 1]."""
    profile = get_profile(profile_name, kinds=kinds)
    scenes = SceneGenerator(profile, seed, split="all")
    pixels = np.stack([render(scenes.scene(start + i), profile) for i in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def _batches(config: ImageTokenizerConfig) -> tuple[Iterator[Tensor], Tensor]:
    """An endless iterator of training batches and one held-back validation tensor."""
    data = config.data
    if (data.emoji_profile is None) == (not data.shards):
        raise ValueError("data needs exactly one of emoji_profile (a profile name) and shards (a list of tar files)")
    if data.emoji_profile is None:
        return _shard_batches(config)
    profile, size = data.emoji_profile, config.batch_size

    def endless() -> Iterator[Tensor]:
        index = 0
        while True:
            yield emoji_images(profile, config.seed, index, size, data.emoji_kinds).contiguous(
                memory_format=torch.channels_last
            )
            index += size

    return endless(), emoji_images(profile, config.seed + 1, 0, data.validation_images)


def _schedule(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then cosine to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _save(model, out: Path, report: dict, validation: Tensor) -> None:
    """Replace `<out>/model` as a whole, then the report and the sheet."""
    with replacing_folder(out / "model") as temporary:
        model.save_pretrained(temporary)
    tokenizer = VQImageTokenizer(model)
    shown = validation[:12]
    pair = torch.cat([shown, tokenizer.decode(tokenizer.encode(shown))], 2)  # pictures above, reconstructions below
    sheet = torch.cat(list(pair), 2).permute(1, 2, 0).mul(255).round().byte().numpy()
    picture = Image.fromarray(sheet)
    scale = max(1, 128 // shown.shape[-1])
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    with replacing(out / "reconstructions.png") as temporary:
        picture.save(temporary, format="PNG")
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _shard_batches(config: ImageTokenizerConfig) -> tuple[Iterator[Tensor], Tensor]:
    """Batches from webdataset shards; the first pictures are held back for validation."""
    from unidiff.data.shards import image_batches

    size, data = config.data.image_size, config.data
    batches = image_batches(data.shards, size, config.batch_size, seed=config.seed)
    held: list[Tensor] = []
    while sum(len(b) for b in held) < data.validation_images:
        held.append(next(batches))
    return batches, torch.cat(held)[: data.validation_images]
