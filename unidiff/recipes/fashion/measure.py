"""`unidiff fashion measure`: a model of the photographs in numbers, each with its interval, and sheets to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unidiff.data.rows import caption_row
from unidiff.diffusion.likelihood import model_scorer
from unidiff.evaluation.kept import KeptRows
from unidiff.evaluation.metrics.fidelity import frechet_distance
from unidiff.evaluation.metrics.likelihood import RowLikelihood, captioned_rows
from unidiff.evaluation.report import Estimate, EvaluationReport, Measure
from unidiff.evaluation.results.base import finished_rows
from unidiff.evaluation.results.pictures import PictureSet
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import Cell, draw_sheet, save_image
from unidiff.recipes.fashion.attributes import Thresholds
from unidiff.recipes.fashion.captions import Statement, understood
from unidiff.recipes.fashion.classifiers import ConvClassifier, LinearClassifier, in_parts, trained
from unidiff.recipes.fashion.folder import captions_of
from unidiff.recipes.fashion.neighbours import nearest
from unidiff.recipes.fashion.photographs import CLASSES, load
from unidiff.tokens import Modality
from unidiff.train.image_tokenizer.losses import psnr, ssim

Numbers = Mapping[str, Estimate | float]
SHEET, NEIGHBOURS = "drawn.png", "neighbours.png"
_SHOWN = 8  # pictures of each class


@dataclass
class FashionMeasures:
    """What is measured, one method for each part of the report; all of them take the whole test split, or its first `limit`.

    Args:
        pipe: a pipeline trained on the photographs. source: folder of the IDX files.
        drawn: folder of `unidiff generate --prompts prompts.txt`. said: likewise of `pictures.jsonl`.
        samples: masks for each row of a likelihood. classifier_steps: of each classifier.
        folder: where classifiers are kept. tick: called with how many more are done, of how many, and what they are.
    """

    pipe: UniDiffPipeline
    source: Path
    drawn: Path | None = None
    said: Path | None = None
    limit: int | None = None
    samples: int = 2
    classifier_steps: int = 1500
    batch_size: int = 64
    seed: int = 0
    folder: Path | None = None
    tick: Callable[..., None] = lambda more, total=None, what="": None
    sheets: dict[str, Image.Image] = field(default_factory=dict, init=False)

    @cached_property
    def training(self) -> Any:
        return load(self.source, "train")

    @cached_property
    def test(self) -> Any:
        """The test photographs, the first `limit` of them. Raises `ValueError`: another size than the model's."""
        found = load(self.source, "test")
        if found.pixels.shape[1:] != self.pipe.image_size:
            sides = [f"{width} x {height}" for height, width in (found.pixels.shape[1:], self.pipe.image_size)]
            raise ValueError(f"the photographs are {sides[0]} and the model draws {sides[1]}; name one trained on them")
        return type(found)(found.pixels[: self.limit], found.labels[: self.limit])

    @cached_property
    def thresholds(self) -> Thresholds:
        return Thresholds.of(self.training)

    @cached_property
    def reconstructed(self) -> Tensor:
        """Grey test pictures `[N, H, W]` through the image tokenizer and back."""
        parts = self.test.tensor().split(self.batch_size)
        self.tick(0, len(parts), "tokenizer")
        return torch.cat([self._through(part) for part in parts])

    def _through(self, part: Tensor) -> Tensor:
        self.tick(1)
        return self.pipe.images.decode(self.pipe.images.encode(part)).cpu().mean(1)

    @cached_property
    def made(self) -> tuple[Tensor, list[Statement | None], list[str]]:
        """Grey drawn pictures `[N, H, W]`, what each prompt says, and the prompts."""
        rows = _rows(self.drawn, "image", "prompts.txt")
        pictures = PictureSet.of([row["folder"] / row["image"] for row in rows], "drawn pictures")
        prompts = [row["arguments"]["prompt"] for row in rows]
        grey = torch.cat(list(pictures.batches(500))).mean(1)
        return grey, [understood(words) for words in prompts], prompts

    @cached_property
    def conv(self) -> ConvClassifier:
        return self._classifier(ConvClassifier)

    def _classifier(self, kind: Any, pictures: Tensor | None = None, labels: Tensor | None = None) -> Any:
        """Trained on these pictures, by default on the whole training split."""
        if pictures is None or labels is None:
            pictures, labels = _grey(self.training.pixels), torch.from_numpy(self.training.labels)
        self.tick(0, self.classifier_steps, kind.__name__)
        return trained(kind, pictures, labels, self.classifier_steps, self.seed, self.folder, self.tick)

    def classifiers(self) -> Numbers:
        """The share of the test photographs whose class the yardsticks see."""
        real, labels = _grey(self.test.pixels), torch.from_numpy(self.test.labels)
        return {
            "linear": _right(self._classifier(LinearClassifier), real, labels),
            "convolutional": _right(self.conv, real, labels),
        }

    def tokenizer(self) -> Numbers:
        """What a picture costs in codes, and what is left of it: PSNR of the mean squared error, mean SSIM."""
        real, made, images = _grey(self.test.pixels), self.reconstructed, self.pipe.images
        codes = real[0].numel() // images.factor**2
        error = Estimate.mean((made - real).square().mean((1, 2)).numpy())
        alike = [float(ssim(*pair)) for pair in zip(made[:, None, None], real[:, None, None], strict=True)]
        return {
            "codes": float(codes),
            "bits_per_pixel": codes * math.log2(images.codebook_size) / real[0].numel(),
            "psnr": Estimate(psnr(error.value), psnr(error.high), psnr(error.low), error.n),
            "ssim": Estimate.mean(alike),
            "right": _right(self.conv, made, torch.from_numpy(self.test.labels)),
            "fid": frechet_distance(self._features(made), self._features(real), seed=self.seed),
        }

    def likelihood(self) -> Numbers:
        """NELBOs in nats of the test rows, each with its first caption; of codes also in bits per pixel."""
        pipe, settings, texts = self.pipe, self.pipe.settings, self.pipe.texts
        captions = [own[0] for own in captions_of(self.test, self.thresholds, "test", 1, self.seed)]
        codes = torch.cat([pipe.images.encode(part).cpu() for part in self.test.tensor().split(self.batch_size)])

        def encode(caption: str) -> list[int]:
            row = caption_row(texts, caption, settings.text_length)
            if row.cut:
                raise ValueError(f"caption {caption!r} has more tokens than this model's {settings.text_length}")
            return row.ids

        rows = captioned_rows(captions, codes, encode, settings.vocabulary)
        self.tick(0, 3 * len(captions), "likelihood")
        network = pipe.transformer
        judge = RowLikelihood(
            model_scorer(network, settings.vocabulary), settings.vocabulary, self.seed, self.samples, self.batch_size,
            next(network.parameters()).device, self.tick,
        )  # fmt: skip
        image = rows.modality == Modality.IMAGE
        joint = judge.nelbo(rows, 4)
        parts = {
            "joint_nelbo": joint.total,
            "joint_nelbo_text": joint.text,
            "joint_nelbo_image": joint.image,
            "caption_nelbo": judge.nelbo(rows.replace(given=rows.given | image), 1).total,
            "image_nelbo": judge.nelbo(rows.replace(given=rows.given | ~image), 3).total,
        }
        bits = parts["image_nelbo"] / math.log(2) / self.test.pixels[0].size
        return {key: Estimate.mean(value.numpy()) for key, value in (*parts.items(), ("image_bits_per_pixel", bits))}

    def captions(self) -> Numbers:
        """What the model says of the test photographs: the class, and each word about an attribute."""
        rows = _rows(self.said, "words", "pictures.jsonl")
        places = [int(Path(row["arguments"]["image"]).stem) for row in rows]
        if max(places) >= len(self.test):
            raise ValueError(f"{str(self.said)!r} has captions of picture {max(places)}; there are {len(self.test)}")
        labels = self.test.labels[places]
        levels = self.thresholds.levels(self.test.pixels[places] / 255, labels)
        said = [understood(row["words"]) for row in rows]
        found: dict[str, Estimate | float] = {
            "class": Estimate.share(
                own is not None and own.label == label for own, label in zip(said, labels, strict=True)
            ),
            "understood": Estimate.share(own is not None for own in said),
        }
        found |= _words(said, levels)
        for label, name in enumerate(CLASSES):
            if own := [
                s is not None and s.label == label for s, true in zip(said, labels, strict=True) if true == label
            ]:
                found[f"classes.{name}"] = Estimate.share(own)
        return found

    def pictures(self) -> Numbers:
        """What the model draws: the class that the classifiers see, attributes by the rules, FID, and that of training pictures."""
        own, labels, said, prompts = self._told()
        real, first = _grey(self.test.pixels), _grey(self.training.pixels[: len(own)])
        self.sheets[SHEET] = _by_class(own, labels.tolist(), prompts)
        return {
            "right": _right(self.conv, own, labels),
            "right_linear": _right(self._classifier(LinearClassifier), own, labels),
            **_words(said, self.thresholds.levels(own.double().numpy(), labels.numpy())),
            "fid": frechet_distance(self._features(own), self._features(real), seed=self.seed),
            "fid_of_training": frechet_distance(self._features(first), self._features(real), seed=self.seed),
        }

    def learnt(self) -> Numbers:
        """What classifiers of drawn pictures alone see on the test photographs, and those of as many training photographs."""
        own, labels, _, _ = self._told()
        real, true = _grey(self.test.pixels), torch.from_numpy(self.test.labels)
        first = _grey(self.training.pixels[: len(own)]), torch.from_numpy(self.training.labels[: len(own)])
        return {
            "from_drawn": _right(self._classifier(ConvClassifier, own, labels), real, true),
            "from_as_many_real": _right(self._classifier(ConvClassifier, *first), real, true),
        }

    def _told(self) -> tuple[Tensor, Tensor, list[Statement], list[str]]:
        """Drawn pictures whose prompts name a class, the classes, what the prompts say, and the prompts."""
        made, said, prompts = self.made
        known = [(place, own) for place, own in enumerate(said) if own is not None]
        if not known:
            raise ValueError(f"no prompt of {str(self.drawn)!r} names a class; draw those of prompts.txt")
        places, labels = [place for place, _ in known], torch.tensor([own.label for _, own in known])
        return made[places], labels, [own for _, own in known], [prompts[place] for place in places]

    def copies(self) -> Numbers:
        """Distances (root mean square over pixels) to the nearest training photograph, of drawn pictures and of test ones.

        Reconstructions of test photographs are what drawn pictures can be at best: as blurred, and no copies.
        """
        made, _, _ = self.made
        training, total = _grey(self.training.pixels), len(made) + 2 * len(self.test)
        self.tick(0, total, "neighbours")
        sets = {"drawn": made, "test": _grey(self.test.pixels), "reconstructed": self.reconstructed}
        found = {name: nearest(pictures, training, self.tick) for name, pictures in sets.items()}
        numbers: dict[str, Estimate | float] = {
            f"{name}.mean": Estimate.mean(f.distance.numpy()) for name, f in found.items()
        }
        for name, own in found.items():
            numbers[f"{name}.nearest"] = float(own.distance.min())
            numbers[f"{name}.first_percent"] = float(own.distance.quantile(0.01))
        limit = float(found["reconstructed"].distance.quantile(0.01))
        numbers["drawn.below_first_percent"] = Estimate.share((found["drawn"].distance < limit).tolist())
        self.sheets[NEIGHBOURS] = _pairs(made, training, found["drawn"].place, found["drawn"].distance)
        return numbers

    def _features(self, pictures: Tensor) -> Tensor:
        return in_parts(self.conv.features, pictures).double()


PARTS: Mapping[str, Callable[[FashionMeasures], Numbers]] = {
    "classifiers": FashionMeasures.classifiers,
    "tokenizer": FashionMeasures.tokenizer,
    "likelihood": FashionMeasures.likelihood,
    "captions": FashionMeasures.captions,
    "pictures": FashionMeasures.pictures,
    "learnt": FashionMeasures.learnt,
    "copies": FashionMeasures.copies,
}


def measured(found: FashionMeasures, parts: Sequence[str] = (), kept: KeptRows | None = None) -> EvaluationReport:
    """A report of some parts (all by default); `kept` holds those that need not be measured again."""
    if unknown := [name for name in parts if name not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    report, kept = EvaluationReport(), kept or KeptRows()
    for name in parts or PARTS:
        for key, value in kept.numbers(name, lambda name=name: PARTS[name](found)).items():  # type: ignore[misc]
            report.add(f"{name}.{key}", value)
            report.measures[f"{name}.{key}"] = Measure(name, key.replace("_", " "), better="")
    report.about |= {"seed": found.seed, "samples": found.samples, "classifier_steps": found.classifier_steps}
    report.about["parameters"] = sum(p.numel() for p in found.pipe.transformer.parameters())
    return report


def save_sheets(found: FashionMeasures, out: Path) -> list[Path]:
    """Write what was drawn as sheets; their paths."""
    for name, sheet in found.sheets.items():
        save_image(sheet, out / name)
    return [out / name for name in found.sheets]


def _rows(folder: Path | None, member: str, prompts: str) -> list[dict[str, Any]]:
    rows = None if folder is None else finished_rows(folder)
    if rows is None or any(member not in row for row in rows):
        raise ValueError(
            f"{str(folder)!r} is no folder of `unidiff generate --prompts {prompts}`; make it first, and name it"
        )
    return rows


def _grey(pixels: np.ndarray) -> Tensor:
    """uint8 `[N, H, W]` to float32 in [0, 1]."""
    return torch.from_numpy(pixels.copy()).float() / 255


def _right(network: Any, pictures: Tensor, labels: Tensor) -> Estimate:
    return Estimate.share((in_parts(network, pictures).argmax(1) == labels).tolist())


def _words(said: Sequence[Statement | None], levels: np.ndarray) -> Numbers:
    """The share of the words about attributes that are true, by the rules that captions are made by."""
    pairs = zip(said, levels.tolist(), strict=True)
    right = [word == level for own, true in pairs if own for word, level in zip(own.levels, true, strict=True) if word]
    return {"attributes": Estimate.share(right)} if right else {}


def _picture(grey: Tensor) -> Image.Image:
    return Image.fromarray((grey.clamp(0, 1) * 255).round().byte().numpy()).convert("RGB")


def _by_class(made: Tensor, labels: Sequence[int], prompts: Sequence[str]) -> Image.Image:
    """The first pictures of every class with their prompts."""
    rows = []
    for label in range(len(CLASSES)):
        own = [place for place, other in enumerate(labels) if other == label][:_SHOWN]
        rows.append([Cell((_picture(made[place]),), prompts[place]) for place in own])
    return draw_sheet([row for row in rows if row], 84, font_size=11)


def _pairs(made: Tensor, training: Tensor, place: Tensor, distance: Tensor) -> Image.Image:
    """The drawn pictures that are nearest to a training photograph, and first ones, each beside that photograph."""
    order = distance.argsort()[: 2 * _SHOWN].tolist()
    shown = [*order, *range(min(2 * _SHOWN, len(made)))]
    cells = [Cell((_picture(made[n]), _picture(training[int(place[n])])), f"{float(distance[n]):.3f}") for n in shown]
    return draw_sheet([cells[n : n + _SHOWN] for n in range(0, len(cells), _SHOWN)], 56, font_size=11)
