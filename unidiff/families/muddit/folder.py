"""A released Muddit or Meissonic folder (diffusers layout) as one object with its tasks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.errors import read_json
from unidiff.families.checkpoint.load import load_released
from unidiff.families.muddit.scheduler import Draws, RowDraws
from unidiff.families.muddit.tasks import MudditSettings, generate_image, hide_codes, write_text
from unidiff.families.muddit.text import CLIP_TYPES, ClipText, TextFeatures, question_rows, upstream_wording
from unidiff.models.mmdit import MMDiT
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.tokens.text import TextTokenizer
from unidiff.tokens.vocabulary import Vocabulary
from unidiff.weights.checks import check_dtype, check_finite
from unidiff.weights.files import check_tensor, load_torch
from unidiff.weights.model import load_checked

WEIGHTS = "diffusion_pytorch_model.safetensors"
MASK_EMBEDDING = "mask_token_embedding.pth"
TIME_OF = {"muddit": "fraction", "meissonic": "index"}


@dataclass(frozen=True)
class Muddit:
    """Everything that a released folder holds.

    Attributes:
        model, vocabulary: network and id space.
        encoder: CLIP, with a row for [MASK] where the folder has one.
        images: the VQ model, in float32.
        tokenizer: transformers' CLIP tokenizer.
        settings: defaults of the family.
    """

    model: MMDiT
    vocabulary: Vocabulary
    encoder: ClipText
    images: VQImageTokenizer
    tokenizer: Any
    settings: MudditSettings = field(default_factory=MudditSettings)

    @classmethod
    def from_folder(
        cls, folder: str | Path, mask_embedding: str | Path | None = None, dtype: torch.dtype | None = None
    ) -> Muddit:
        """Read `transformer`, `text_encoder`, `tokenizer`, `vqvae` and `scheduler` below `folder`.

        Args:
            mask_embedding: the file of text [MASK]'s row; None looks for `mask_token_embedding.pth` in the folder and
                beside it. Without one, images can be drawn but no text written.
            dtype: of network and text encoder; None keeps the checkpoint's.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: a part of another family, or weights that do not fit.
        """
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        folder = Path(folder)
        if absent := [n for n in ("transformer", "text_encoder", "tokenizer", "vqvae") if not (folder / n).is_dir()]:
            raise FileNotFoundError(f"{folder} has no {', '.join(absent)}; name a Muddit or Meissonic folder")
        released = load_released(folder / "transformer", dtype)
        model, vocabulary = released.model, released.vocabulary
        if not isinstance(model, MMDiT) or vocabulary is None:
            raise ValueError(f"{folder} holds {released.family.name}; name a Muddit or Meissonic folder")
        encoder, _ = load_checked(
            CLIPTextModelWithProjection.from_pretrained,
            "CLIPTextModelWithProjection",
            str(folder / "text_encoder"),
            types=CLIP_TYPES,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",  # a config may name a kernel on the hub, which is code of others
        )
        found = [mask_embedding] if mask_embedding else [folder / MASK_EMBEDDING, folder.parent / MASK_EMBEDDING]
        row = next((_read_row(Path(p)) for p in found if mask_embedding or os.path.lexists(p)), None)
        schedule = folder / "scheduler" / "scheduler_config.json"
        masking = "cosine"
        if os.path.lexists(schedule):
            masking = read_json(schedule, "a scheduler's config").get("masking_schedule", masking)
        try:
            text, settings = ClipText(encoder, row), MudditSettings(masking=masking, time=TIME_OF[released.family.name])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        read_words = partial(CLIPTokenizer.from_pretrained, str(folder / "tokenizer"), local_files_only=True)
        words = TextTokenizer.read(folder / "tokenizer", read_words).tokenizer
        if words.pad_token is None:
            raise ValueError(
                f"{folder / 'tokenizer'} names no pad_token, which CLIP's texts are filled up with; name one"
            )
        images = VQImageTokenizer.from_pretrained(folder / "vqvae")
        return cls(model, vocabulary, text, images, words, settings)

    def text_to_image(
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        height: int = 512,
        width: int = 512,
        negative_prompt: str = "",
        codes: Tensor | None = None,
        settings: MudditSettings | None = None,
        draws: Draws | None = None,
        first_step: int = 0,
    ) -> Tensor:
        """Images of prompts, float `[B, 3, height, width]` in [0, 1].

        Args:
            prompts: one per row.
            seeds: int64 `[B]`; a row's image does not depend on its neighbours. Ignored with `draws`.
            codes: int64 `[B, height / factor, width / factor]` to fill where they are the image [MASK]; all if None.
            settings: None for the family's.
            first_step: see `generate_image`.

        Raises:
            ValueError: a size that does not fit, or a prompt with more tokens than the encoder has positions.
        """
        settings, factor = settings or self.settings, self.images.factor
        side = factor * (2 if self.model.config.downsample else 1)
        if height % side or width % side or min(height, width) < side:
            raise ValueError(f"image size {height}x{width} must be a positive multiple of {side}")
        shape = (len(prompts), height // factor, width // factor)
        mask_id = self.model.config.vocab_size - 1
        device = self.model.device
        tokens = torch.full(shape, mask_id, device=device) if codes is None else codes.to(device)
        if tuple(tokens.shape) != shape:
            raise ValueError(f"codes have shape {tuple(tokens.shape)}; expected {shape}")
        negative = self._features([negative_prompt], settings) if settings.guidance_scale > 1 else None
        draws = draws or RowDraws(seeds.to(device), shape[1] * shape[2])
        text = self._features(prompts, settings)
        done = generate_image(self.model, text, tokens, settings, draws, factor, negative, first_step=first_step)
        return self.images.decode(done)

    def redraw(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Tensor,
        strength: float = 0.5,
        mask: Tensor | None = None,
        negative_prompt: str = "",
        settings: MudditSettings | None = None,
    ) -> Tensor:
        """Images changed towards prompts: all over with some strength, or a region (with strength 1: inpainting).

        Args:
            images: float `[B, 3, H, W]` in [0, 1].
            prompts, seeds, negative_prompt, settings: as in `text_to_image`.
            strength: share of the steps to run, in (0, 1]; see `hide_codes`.
            mask: `[B, H, W]`, bool or in [0, 1]: a code may change where any pixel of its cell is above 0.5.

        Raises:
            ValueError: as `text_to_image`; a strength that runs no step, or a mask of another size.
        """
        settings, device, region = settings or self.settings, self.model.device, None
        if len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts for {len(images)} images; give one per image")
        if mask is not None:
            if mask.shape != (len(images), *images.shape[2:]):
                raise ValueError(
                    f"the mask has shape {tuple(mask.shape)}; expected {(len(images), *images.shape[2:])}, the images' size"
                )
            region = F.max_pool2d(mask.to(device).float()[:, None], self.images.factor)[:, 0] > 0.5
        codes, seeds = self.images.encode(images).to(device), seeds.to(device)
        tokens, first = hide_codes(codes, self.model.config.vocab_size - 1, settings, strength, seeds, region)
        height, width = images.shape[2:]
        return self.text_to_image(prompts, seeds, height, width, negative_prompt, tokens, settings, first_step=first)

    def answer(
        self,
        images: Tensor,
        seeds: Tensor,
        questions: Sequence[str] | None = None,
        settings: MudditSettings | None = None,
        draws: Draws | None = None,
    ) -> list[str]:
        """Answers to questions about images, or captions without questions.

        Args:
            images: float `[B, 3, H, W]` in [0, 1].
            seeds: int64 `[B]`, as in `text_to_image`.
            questions: one per image.

        Raises:
            ValueError: no mask embedding, no text head, a question too long for an answer, or counts that do not fit.
        """
        settings, device = settings or self.settings, self.model.device
        if questions is not None and len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions for {len(images)} images; give one per image")
        prefixes = [[]] * len(images) if questions is None else [self.tokenizer(q).input_ids[:-1] for q in questions]
        rows = question_rows(prefixes, self.encoder.length, self.encoder.mask_id).to(device)
        codes = self.images.encode(images).to(device)
        draws = draws or RowDraws(seeds.to(device), rows.shape[1])
        result = write_text(self.model, self.encoder, codes, rows, settings, draws, self.images.factor)
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in result.answers]
        return [upstream_wording(t) for t in texts] if settings.compat else [t.strip() for t in texts]

    def with_settings(self, **changes: Any) -> Muddit:
        """The same parts with other defaults, for instance `steps=64`."""
        return replace(self, settings=replace(self.settings, **changes))

    def _features(self, prompts: Sequence[str], settings: MudditSettings) -> TextFeatures:
        """Prompts padded to the encoder's length; the reference cuts long ones silently, which compat keeps."""
        length = self.encoder.length
        if not settings.compat:
            for prompt in prompts:
                if (count := len(self.tokenizer(prompt).input_ids)) > length:
                    raise ValueError(
                        f"a prompt has {count} tokens, start and end included; the encoder reads {length}; shorten it"
                    )
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length).input_ids
        features = self.encoder(torch.tensor(ids))
        return TextFeatures(*(part.to(self.model.device) for part in features))


def _read_row(path: Path) -> Tensor:
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} does not exist; name the file of the mask embedding")
    row = load_torch(path)
    if not isinstance(row, Tensor):
        raise ValueError(f"{path} holds a {type(row).__name__}; expected one tensor")
    check_tensor(path, "the mask embedding", row)
    check_dtype(f"the mask embedding of {path}", row)
    check_finite({"the mask embedding": row}, str(path))
    return row
