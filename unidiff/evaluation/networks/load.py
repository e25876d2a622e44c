"""How a network is named: an entry of `NETWORKS`, a file of weights, a folder, or any callable."""

from __future__ import annotations

import os
from pathlib import Path

from unidiff.evaluation.networks.base import NETWORKS, FeatureNetwork, NetworkSource
from unidiff.evaluation.networks.folder import folder_network
from unidiff.evaluation.networks.inception import inception_network


def feature_network(source: NetworkSource, device: str = "cpu") -> FeatureNetwork:
    """The network that `source` names.

    Args:
        source: a network or callable (`[B, 3, H, W]` in [0, 1] -> `[B, D]`, on its own device, which also serves for
            logits); a name of `NETWORKS`; the file of torch-fidelity's Inception weights; or a folder of a transformers
            model of pictures.
        device: of what is loaded.

    Raises:
        FileNotFoundError: a path where nothing is. ValueError: an unknown name, weights that do not fit, or a module in
            training mode.
    """
    if isinstance(source, FeatureNetwork):
        return source
    if not isinstance(source, str | os.PathLike):
        if getattr(source, "training", False):
            raise ValueError(f"the network {type(source).__name__} is in training mode; call its eval() first")
        name = getattr(source, "__name__", type(source).__name__)
        return FeatureNetwork(name, source, source)
    if str(source) in NETWORKS:
        return NETWORKS[str(source)].load(device)
    path = Path(source)
    if path.is_dir():
        return folder_network(path, device)
    if not path.exists():
        raise FileNotFoundError(
            f"the network {str(source)!r:.200} is no file, no folder and none of {', '.join(NETWORKS)}; download the "
            "weights of Inception that torch-fidelity publishes (weights-inception-2015-12-05-6726825d.pth), or a "
            "transformers model of pictures, and give its place"
        )
    return inception_network(path, device)
