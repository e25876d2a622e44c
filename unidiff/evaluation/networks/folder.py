"""Models of pictures from a local folder, as transformers saves them: encoders (CLIP, DINOv2, ViT) and classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from unidiff.errors import reading
from unidiff.evaluation.networks.base import FeatureNetwork


def load_from_folder(kind: Any, folder: Path, what: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a local folder: nothing is downloaded, no code of the folder is run.

    Args:
        what: it should be, for messages. options: of `from_pretrained`.

    Raises:
        FileNotFoundError: no such folder. ValueError: something else is in it, or weights that are not safetensors.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is no folder of {what} (no config.json); download one, give its place"
        )
    with reading(folder, what):
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def folder_network(folder: Path, device: str = "cpu") -> FeatureNetwork:
    """The pooled features of an encoder; for a classifier its logits as well. Its own processor resizes the pictures."""
    import transformers

    what = "a transformers model of pictures"
    config = load_from_folder(transformers.AutoConfig, folder, what)
    processor = load_from_folder(transformers.AutoImageProcessor, folder, what)
    classifies = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    kind = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    model = load_from_folder(kind, folder, what, use_safetensors=True).to(device).eval()

    def pixels(pictures: Tensor) -> Tensor:
        return processor(images=list(pictures), do_rescale=False, return_tensors="pt")["pixel_values"].to(device)

    def logits(pictures: Tensor) -> Tensor:
        return model(pixel_values=pixels(pictures)).logits

    encoder = model.base_model if classifies else model
    name = f"{config.model_type} ({folder.name})"
    return FeatureNetwork(name, lambda pictures: pooled(encoder, pixels(pictures)), logits if classifies else None)


def pooled(model: Any, pixels: Tensor) -> Tensor:
    """One vector `[B, D]` for each picture: the model's own pooling, else its first token."""
    if hasattr(model, "get_image_features"):
        out = model.get_image_features(pixel_values=pixels)
    else:
        out = model(pixel_values=pixels)
    if isinstance(out, Tensor):
        return out
    if getattr(out, "pooler_output", None) is not None:
        return out.pooler_output.flatten(1)
    return out.last_hidden_state[:, 0]
