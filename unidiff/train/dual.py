"""Training of a dual model (D-DiT, arXiv 2501.00289): flow matching of image latents beside masked text.

It learns from the same token data as a masked model. A picture's latents are the vectors of its codes, scaled to unit variance
over the codebook; a text is read by an encoder with T5's layers, which is trained with the rest.

    picture    x_s = (1 - s) x0 + s e,   loss (x_s - s v - x0)^2 = s^2 (v - (e - x0))^2      (Dual Diffusion, eq. 6)
    text       -log p(x0_i | x_t) at hidden positions, weighed as for a masked model          (eq. 8)

s is logit-normal where the picture alone is drawn; where text is hidden too (`generate`) it is the share of what is hidden.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.decoding.flow import row_normals
from unidiff.diffusion.flow import TRAIN_STEPS, flow_error, logit_normal, noisy_latents
from unidiff.diffusion.noise import NoisyBatch, mask_tokens
from unidiff.diffusion.objective import head_parts, joint_elbo, parts_loss, parts_nll
from unidiff.diffusion.streamed_nll import HeadPart
from unidiff.models.dual_transformer import DualTransformer
from unidiff.models.trained_on import TASKS
from unidiff.schema import check_arguments
from unidiff.tokens import Modality, Vocabulary
from unidiff.tokens.batch import moved
from unidiff.tokens.image.vq import QuantizedAutoencoder, VQImageTokenizer
from unidiff.train.build import check_names
from unidiff.train.config import ObjectiveConfig, TaskConfig, TasksConfig, TrainConfig
from unidiff.train.data.source import TokenSource
from unidiff.train.data.tasks import TaskBatch, TaskMixer
from unidiff.train.run.distributed import Parallel
from unidiff.train.step import VALIDATION_SEED, TokenNLL


def scaled_vectors(images: VQImageTokenizer) -> tuple[Tensor, float]:
    """Vectors float32 `[K, d]` of all codes and their scale, which gives them unit variance; `ValueError` for a tokenizer
    that has none."""
    if not isinstance(images.model, QuantizedAutoencoder):
        kind = type(images.model).__name__
        raise ValueError(f"a dual model needs an image tokenizer with code vectors, which {kind} has not")
    codes = torch.arange(images.codebook_size)[:, None, None]
    vectors = images.model.lookup(codes)[:, :, 0, 0].float()
    scale = float(1 / vectors.std())
    return vectors * scale, scale


def build_dual(config: TrainConfig, source: TokenSource) -> DualTransformer:
    """The model of `config.model` for the data, drawn from `config.seed`; raises as `dual_arguments`."""
    arguments, vectors = dual_arguments(config, source.vocabulary, source.grid)
    torch.manual_seed(config.seed)
    model = DualTransformer(**arguments)
    model.code_vectors.copy_(vectors)
    return model.float().train()


def dual_arguments(config: TrainConfig, vocabulary: Vocabulary, grid: tuple[int, int]) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the `DualTransformer` of a run on data of these ids and rows and columns of codes, and its code vectors.

    Raises:
        ValueError: an unknown or ill-typed model setting, a setting of masked models that a dual one has not, an image
            tokenizer of other data or without code vectors.
        FileNotFoundError: no image tokenizer.
    """
    settings = list(inspect.signature(DualTransformer.__init__).parameters)[1:]
    check_names(config, settings, ("vocab_size", "codebook_size", "code_dim", "grid"))
    _check_settings(config)
    check_arguments(DualTransformer.__init__, config.model, "model.")
    if not config.tokenizer.image:
        raise ValueError("network = 'dual' needs tokenizer.image, the folder of the image tokenizer of the data")
    vectors, _ = scaled_vectors(VQImageTokenizer.from_pretrained(config.tokenizer.image))
    if len(vectors) != vocabulary.image_size:
        raise ValueError(
            f"the image tokenizer has {len(vectors)} codes, the data {vocabulary.image_size}; point tokenizer.image at "
            "its own"
        )
    if grid[0] != grid[1] or vocabulary.text[0] != 0:
        raise ValueError("a dual model learns from square pictures and data whose text ids start at 0")
    found = dict(zip(("codebook_size", "code_dim"), vectors.shape, strict=True))  # by name: see `register_to_config`
    return {"vocab_size": vocabulary.text_size + 1, "grid": grid[0], **found, **config.model}, vectors


def _check_settings(config: TrainConfig) -> None:
    checks = {
        "data.documents": bool(config.data.documents),
        "data.pack": config.data.pack > 0,
        "data.crop_fill": config.data.crop_fill > 0,
        "lora.rank": config.lora.rank > 0,
        "logging.sample_every": config.logging.sample_every > 0,
        "checkpoint.init_from": bool(config.checkpoint.init_from),
        "parallel.mode=fsdp": config.parallel.mode == "fsdp",
    }
    if found := next((name for name, is_set in checks.items() if is_set), None):
        raise ValueError(f"{found} does not go with network = 'dual'; leave it out, or set it to 0")


@dataclass(frozen=True)
class DualBatch:
    """A batch of mixed tasks as a step of a dual model takes it; made on the host, and then moved.

    Attributes:
        clean: before hiding. noisy: with text hidden; `masked` has the hidden text and all pictures that are targets.
        parts: hidden positions of the text, in rows `[B, T]`.
        present, absent: int64, rows with a picture (clean or noisy) and rows without.
        level: float32 `[B]`, s of the rows' pictures, 0 where these are given.
    """

    clean: TaskBatch
    noisy: NoisyBatch
    parts: tuple[HeadPart, ...]
    present: Tensor
    absent: Tensor
    level: Tensor


@dataclass(frozen=True)
class DualNLL(TokenNLL):
    """The loss of a dual model. In the results `[B, L]` a text position has its NLL in nats, an image position the squared
    error of its latent, (x_s - s v - x0)^2, mean over channels."""

    model: Any
    image_weight: float = 1.0

    def ready(self, micro: TaskBatch, device: torch.device) -> DualBatch:  # type: ignore[override]
        """See `TokenNLL.ready`."""
        batch, ids = micro.batch, self.vocabulary
        image, length = batch.modality[0] == Modality.IMAGE, int((batch.modality[0] == Modality.TEXT).sum())
        drawn = batch.targets & image  # [B, L]
        hidden = mask_tokens(batch, micro.rate, ids, micro.noise).masked & ~image
        absent = (batch.given & (batch.ids == ids.image_mask) & image).any(1)
        level = torch.where((batch.targets & ~image).any(1), micro.rate, logit_normal(micro.rate))
        level = torch.where(drawn.any(1), level, 0.0).float()
        words = batch.each(lambda x: x[:, :length])
        made = DualBatch(
            micro,
            NoisyBatch(batch.hide(hidden, ids), hidden | drawn),
            head_parts(hidden[:, :length], words, ids, self.chunk),
            (~absent).nonzero()[:, 0],
            absent.nonzero()[:, 0],
            level,
        )
        return moved(made, device)

    def __call__(self, batch: DualBatch, noise: Tensor | None = None) -> Tensor:  # type: ignore[override]
        with self._autocast(batch):  # type: ignore[arg-type]
            words, error = self.forward(batch, noise)
            nll = parts_nll(words, self.model, batch.parts)
        return torch.cat((nll, error.to(nll.dtype)), dim=1)

    def loss(  # type: ignore[override]
        self, batch: DualBatch, normalizer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `TokenNLL.loss`."""
        with self._autocast(batch):  # type: ignore[arg-type]
            words, error = self.forward(batch)
            weight = batch.clean.weight[:, : words.shape[1]] / normalizer
            loss, nll = parts_loss(words, self.model, batch.parts, weight)
        loss = loss + self.image_weight * error.sum() / normalizer
        return loss, torch.cat((nll, error.detach().to(nll.dtype)), dim=1), loss.new_zeros(0)

    def forward(self, batch: DualBatch, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of the text `[B, T, D]`, and squared errors `[B, N]` of latents, 0 where a picture is given.

        Args:
            noise: float `[P, C, h, w]`, e of the rows with a picture; None draws it from torch's global generator, which
                training seeds in every step.
        """
        model, noisy, side = self.model, batch.noisy.batch, self.model.config.grid
        ids = noisy.ids[:, : noisy.shape[1] - side * side]  # [B, T]
        error = batch.level.new_zeros(len(ids), side * side)
        parts, order = [], []
        if len(present := batch.present):
            codes = noisy.ids[present][:, ids.shape[1] :] - self.vocabulary.image[0]
            x0 = model.latents(codes.unflatten(1, (side, side)))  # [P, C, h, w]
            noise = torch.randn_like(x0) if noise is None else noise
            level = batch.level[present]
            x = noisy_latents(x0, noise, level)
            out = model.hidden(ids[present], x, TRAIN_STEPS * level)
            found = flow_error(out.image.float(), x, x0, level).mean(1).flatten(1)  # [P, N]; 0 at s = 0
            error = error.index_copy(0, present, found)
            parts, order = [out.text], [present]
        if len(batch.absent):
            zeros = torch.zeros_like(batch.level[batch.absent])
            parts.append(model.hidden(ids[batch.absent], None, zeros).text)
            order.append(batch.absent)
        words = torch.cat(parts)[torch.cat(order).argsort()]
        return words + 0 * model.network.null_image.sum(), error  # a part of the graph in every batch, for DDP


def dual_report_names(source: TokenSource, block_length: int = 0) -> set[str]:
    """Keys of the report of `validate_dual`."""
    tasks = ("caption", *(("answer",) if source.has_questions else ()))
    return {"flow_loss", "flow_loss_error"} | {f"{task}_nelbo{end}" for task in tasks for end in ("", "_error")}


@torch.no_grad()
def validate_dual(
    token_nll: DualNLL, source: TokenSource, rows: int, draws: int, batch_size: int, parallel: Parallel | None = None
) -> dict[str, float]:
    """On held-out rows with fixed masks and noise: `flow_loss`, the squared error of latents (mean per latent number) where
    pictures are drawn from captions; `caption_nelbo` and `answer_nelbo`, nats per row given the picture. `*_error`: standard
    error over rows. Arguments as `unidiff.train.step.validate`; every process computes all of it.
    """
    even = TaskConfig(weight=1.0, loss="elbo")
    tasks = TasksConfig(**dict.fromkeys(TASKS, even))
    mixer = TaskMixer(source, tasks, ObjectiveConfig(), VALIDATION_SEED)
    model, was_training = token_nll.model, token_nll.model.training
    device = next(model.parameters()).device
    model.eval()
    report: dict[str, float] = {}
    side, channels = model.config.grid, model.config.code_dim
    for task in ("text_to_image", "caption", *(("answer",) if source.has_questions else ())):
        values = []
        for first in range(0, rows * draws, batch_size):
            micro = mixer.of(torch.arange(first, min(first + batch_size, rows * draws)), TASKS.index(task))
            batch = token_nll.ready(micro, device)
            noise = row_normals(VALIDATION_SEED + first + torch.arange(len(micro.rate)), (channels, side, side)).to(
                device
            )
            scores = token_nll(batch, noise[batch.present]).float()
            if task == "text_to_image":
                values.append(scores[:, -side * side :].mean(1).cpu())
            else:
                terms = joint_elbo(scores, batch.clean.weight, batch.clean.batch)
                values.append(terms.row_text.float().cpu())
        name, found = "flow_loss" if task == "text_to_image" else f"{task}_nelbo", torch.cat(values).double()
        report[name] = float(found.mean())
        report[f"{name}_error"] = float(found.std() / math.sqrt(len(found))) if len(found) > 1 else math.inf
    model.train(was_training)
    return report
