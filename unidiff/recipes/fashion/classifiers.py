"""Two classifiers of the photographs, as yardsticks: a linear one, and a small convolutional one that also gives features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unidiff.errors import reading
from unidiff.files import replacing
from unidiff.recipes.fashion.photographs import CLASSES

FEATURES = 128
_BATCH = 128


class LinearClassifier(nn.Module):
    """Logits that are sums over pixels, white as 0: multinomial logistic regression.

    Args:
        shape: (rows, columns) of the pictures.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.head = nn.Linear(shape[0] * shape[1], len(CLASSES))

    def forward(self, pictures: Tensor) -> Tensor:
        """Grey pictures float32 `[B, H, W]` in [0, 1] to logits `[B, classes]`."""
        return self.head(1 - pictures.flatten(1))


class ConvClassifier(nn.Module):
    """Two convolutions of 3 x 3, each with a maximum over 2 x 2, and a layer of `FEATURES`, whose values are the features.

    Args:
        shape: (rows, columns) of the pictures.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.lift = nn.Linear(64 * (shape[0] // 4) * (shape[1] // 4), FEATURES)
        self.head = nn.Linear(FEATURES, len(CLASSES))

    def features(self, pictures: Tensor) -> Tensor:
        """Grey pictures float32 `[B, H, W]` in [0, 1] to `[B, FEATURES]`, none negative."""
        x = F.max_pool2d(F.relu(self.conv1(1 - pictures[:, None])), 2)  # the white ground is 0, as padding is
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.lift(x.flatten(1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Grey pictures `[B, H, W]` in [0, 1] to logits `[B, classes]`."""
        return self.head(self.features(pictures))


_RATES: dict[type, float] = {LinearClassifier: 3e-3, ConvClassifier: 1e-3}


def trained(
    kind: type[LinearClassifier] | type[ConvClassifier],
    pictures: Tensor,
    labels: Tensor,
    steps: int,
    seed: int = 0,
    folder: Path | None = None,
    tick: Callable[[int], None] = lambda more: None,
) -> LinearClassifier | ConvClassifier:
    """A classifier in evaluation mode after `steps` of AdamW on batches of 128 with a cosine schedule; no augmentation.

    Args:
        pictures: grey, float32 `[N, H, W]` in [0, 1]. labels: int64 `[N]`. seed: of the weights and the order.
        folder: where the weights are kept under a name that depends on all of this; those that are there are taken.
        tick: called with how many more steps are done.

    Raises:
        ValueError: no pictures, or a file of weights that is damaged.
    """
    if not len(pictures):
        raise ValueError("a classifier needs at least one picture to learn from")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind((int(pictures.shape[1]), int(pictures.shape[2])))
    path = None if folder is None else folder / f"{kind.__name__}-{_digest(pictures, labels, steps, seed)}.safetensors"
    if path is not None and path.exists():
        with reading(path, "the weights of a classifier"):
            network.load_state_dict(load_file(path))
        tick(steps)
        return network.eval()
    optimiser = torch.optim.AdamW(network.parameters(), _RATES[kind], weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < _BATCH:
            order = torch.cat([order, torch.randperm(len(pictures), generator=generator)])
        own, order = order[:_BATCH], order[_BATCH:]
        loss = F.cross_entropy(network(pictures[own]), labels[own])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        tick(1)
    if path is not None:
        with replacing(path) as temporary:
            save_file(network.state_dict(), temporary)
    return network.eval()


@torch.no_grad()
def in_parts(call: Callable[[Tensor], Tensor], pictures: Tensor, count: int = 500) -> Tensor:
    """`call` of so many pictures at a time."""
    return torch.cat([call(part) for part in pictures.split(count)])


def _digest(pictures: Tensor, labels: Tensor, *settings: int) -> str:
    digest = hashlib.sha256(repr((tuple(pictures.shape), *settings)).encode())
    digest.update(pictures.contiguous().numpy().tobytes())
    digest.update(labels.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
