"""The Inception network of published FID, KID and IS, from a local file of torch-fidelity's weights."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from unidiff.errors import import_extra, reading
from unidiff.evaluation.networks.base import FeatureNetwork
from unidiff.weights.files import load_torch

_WEIGHTS = "weights of Inception as torch-fidelity publishes them (weights-inception-2015-12-05-6726825d.pth)"


def inception_network(path: Path, device: str = "cpu") -> FeatureNetwork:
    """Features `[B, 2048]` after the last pooling, and logits `[B, 1008]` without the bias, as in published scores.

    Pictures are rounded to 8 bits and resized inside, as TensorFlow 1 did.

    Raises:
        FileNotFoundError: no such file. ValueError: other weights, or torch-fidelity is not installed.
    """
    place = "torch_fidelity.feature_extractor_inceptionv3"
    library = import_extra(place, "Inception needs torch-fidelity; install unidiff[eval], or give another network")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with reading(path, _WEIGHTS):
            weights = load_file(path)
    else:
        weights = load_torch(path)
    content = io.BytesIO()  # the library reads files with pickle; this one was made here, of tensors alone
    torch.save(weights, content)
    content.seek(0)
    with reading(path, _WEIGHTS, "download that file, or give another network"):
        network = library.FeatureExtractorInceptionV3(
            "inception-v3", ["2048", "logits_unbiased"], feature_extractor_weights_path=content
        ).to(device)

    def part(number: int, pictures: Tensor) -> Tensor:
        eight_bits = (pictures * 255).round().to(torch.uint8)
        return network(eight_bits.to(device))[number]

    return FeatureNetwork("inception-v3", lambda pictures: part(0, pictures), lambda pictures: part(1, pictures))
