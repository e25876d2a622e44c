"""What the exact reader sees, as features: distances between sets of emoji pictures without any weights."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.evaluation.networks.base import FeatureNetwork
from unidiff.worlds.emoji.oracle import Oracle, Reading
from unidiff.worlds.emoji.scenes import BACKGROUNDS, UNITS, Profile, get_profile

_RARE = 1e-3  # added to every count, so that probabilities have logarithms


class ReaderFeatures:
    """Features and logits of pictures of a profile, or of both profiles by their size."""

    def __init__(self, profiles: list[Profile]) -> None:
        self.readers = {profile.image_size: Oracle(profile) for profile in profiles}

    def features(self, pictures: Tensor) -> Tensor:
        """float32 `[B, 3, H, W]` in [0, 1] -> `[B, 8 + N + 4]`: background, objects of each of N names, how many of these,
        their mean row and column from 0 to 1, and regions that no sprite explains.

        Raises:
            ValueError: pictures of another size than the profiles'.
        """
        reader = self._reader(pictures)
        return torch.stack([self._row(reader, reading) for reading in reader.read(pictures)])

    def logits(self, pictures: Tensor) -> Tensor:
        """log of each name's share in the picture, `[B, N]`; all names alike where nothing can be read."""
        reader, first = self._reader(pictures), len(BACKGROUNDS)
        counts = self.features(pictures)[:, first : first + reader.profile.num_objects]
        return (counts + _RARE).log()

    def _reader(self, pictures: Tensor) -> Oracle:
        height, width = pictures.shape[2:]
        if height != width or height not in self.readers:
            sizes = " or ".join(f"{size} x {size}" for size in self.readers)
            raise ValueError(f"the network emoji reads pictures of {sizes}, and this one is {width} x {height}")
        return self.readers[height]

    @staticmethod
    def _row(reader: Oracle, reading: Reading) -> Tensor:
        profile, first = reader.profile, len(BACKGROUNDS)
        row = torch.zeros(first + profile.num_objects + 4)
        if reading.background is not None:
            row[list(BACKGROUNDS).index(reading.background)] = 1
        names = list(profile.names)
        for item in reading.objects:
            row[first + names.index(item.name)] += 1
            row[-3] += item.row / UNITS / len(reading.objects)
            row[-2] += item.col / UNITS / len(reading.objects)
        row[-4], row[-1] = len(reading.objects), reading.unreadable
        return row


def reader_network(*profiles: Profile) -> FeatureNetwork:
    """The reader of some profiles as a network of features and of classes (the names of objects)."""
    reader = ReaderFeatures(list(profiles))
    return FeatureNetwork("emoji", reader.features, reader.logits)


def load_reader(device: str = "cpu") -> FeatureNetwork:
    """The network that is named `emoji`, for pictures of both profiles; it runs on the CPU."""
    return reader_network(get_profile("cpu"), get_profile("gpu"))
