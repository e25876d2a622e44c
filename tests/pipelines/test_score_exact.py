"""`pipe.score` against exact values (golden set `toy_exact`): every kind of score, and what its intervals promise."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from golden import golden_root
from reference.enumeration import mask_moments
from table_pipeline import PairOfTables, TablePipeline
from toy_model import TableModel
from toy_table import ToyExample

from unidiff.diffusion.likelihood import model_scorer
from unidiff.families.layout import TaskInputs
from unidiff.tokens import Modality

pytestmark = pytest.mark.golden
N, SAMPLES = 2000, 48
EXAMPLES = sorted((golden_root() / "toy_exact").rglob("*.json"))
CASES = [
    pytest.param(path, name, id=f"{path.parent.name}-{name}") for path in EXAMPLES for name in ("exact", "imperfect")
]
KINDS = ("joint", "text", "image", "text alone", "image alone", "pmi of text", "pmi of image")

if not EXAMPLES:
    pytest.skip("golden set toy_exact is absent", allow_module_level=True)


class Case:
    """A toy, a pipeline of it, and two strings that make a row."""

    def __init__(self, path, denoiser) -> None:
        self.toy, self.denoiser = ToyExample.load(path), denoiser
        table = TableModel.from_denoiser(self.toy.data["denoisers"][denoiser], self.toy.data["V"])
        self.pipe = TablePipeline(PairOfTables(table))
        self.strings = [self.toy.data["imperfect"]["estimator_variance"]["x0"], self.toy.strings[1]]
        self.text, self.codes = self.pipe.split(self.strings)

    def nelbo(self, text: bool, image: bool, of: str, only: Modality | None = None, strings=None) -> float:
        """By visiting every mask. text, image: whether they are known; of: what is scored."""
        words, codes = self.pipe.split(strings or self.strings)
        known = TaskInputs(1, [words] if text else None, codes=codes[None] if image else None)
        request, vocabulary = self.pipe.layout.known(known), self.pipe.vocabulary
        targets = {"text": request.words, "image": request.picture, "both": request.words | request.picture}[of]
        score = model_scorer(self.pipe.transformer, vocabulary)
        part = lambda x_t, x0, w: score(x_t, x0, w) * (x0.modality == only)  # noqa: E731
        batch = request.batch.replace(given=~targets)
        return float(mask_moments(score if only is None else part, batch, vocabulary).nelbo())

    def exact(self, kind: str) -> float:
        """log p in nats."""
        of = "image" if "image" in kind else "text"
        blind = self.nelbo(of == "text", of == "image", of)
        if kind == "joint":
            return -self.nelbo(True, True, "both")
        if kind.endswith("alone"):
            return -blind
        beside = self.nelbo(True, True, of)
        return blind - beside if kind.startswith("pmi") else -beside

    def score(self, kind: str, samples: int = SAMPLES):
        of = {"joint": "both", "each": "each"}.get(kind, "image" if "image" in kind else "text")
        given = {"texts": self.text, "codes": self.codes[None]}
        if kind.endswith("alone"):
            del given["texts" if of == "image" else "codes"]
        rows = {name: [value] * N if name == "texts" else value.expand(N, -1, -1) for name, value in given.items()}
        how = {"of": of, "pmi": kind.startswith("pmi"), "samples": samples, "batch_size": N}
        return self.pipe.score(**rows, **how, generator=list(range(N)))

    def probability(self, text: bool = True, image: bool = True) -> float:
        """P of what is known of the two strings, from the toy's own joint."""
        known = [*(self.pipe.transformer.of_words if text else ()), *(self.pipe.transformer.of_codes if image else ())]
        length, total = self.toy.data["L"], 1.0
        for number, string in enumerate(self.strings):
            places = [place - number * length for place in known if place // length == number]
            same = [all(other[place] == string[place] for place in places) for other in self.toy.strings]
            total *= float(self.toy.probabilities[torch.tensor(same)].sum())
        return total


@cache
def case_of(path, denoiser) -> Case:
    return Case(path, denoiser)


def check_held(values, errors, exact: float) -> None:
    """95 % intervals hold the exact value in 92 to 98 % of the draws; all of them where no draw changes anything."""
    missed = (values - exact).abs()
    if float(errors.max()) < 1e-10:
        assert float(missed.max()) < 1e-10
    else:
        assert 0.92 <= float((missed <= errors).double().mean()) <= 0.98


@pytest.mark.parametrize(("path", "denoiser"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_the_exact_value(path, denoiser, kind):
    """Nats, nats per token and bits per token."""
    case = case_of(path, denoiser)
    exact, found = case.exact(kind), case.score(kind)
    length = 2 * case.toy.data["L"] if kind == "joint" else case.toy.data["L"]
    check_held(found.log_prob, found.error, exact)
    assert torch.equal(found.low <= exact, found.log_prob - found.error <= exact)
    check_held(found.per_token, found.per_token_error, exact / length)
    check_held(found.bits_per_token, found.bits_per_token_error, -exact / length / math.log(2))


@pytest.mark.parametrize(("path", "denoiser"), CASES)
def test_parts_and_differences(path, denoiser):
    """The parts of a joint score, and how much more one row scores than another by the same masks."""
    case = case_of(path, denoiser)
    each = case.score("each")
    check_held(each.log_prob, each.error, case.exact("text") + case.exact("image"))
    found = case.score("joint")
    check_held(found.text, found.text_error, -case.nelbo(True, True, "both", Modality.TEXT))
    check_held(found.image, found.image_error, -case.nelbo(True, True, "both", Modality.IMAGE))
    others = [case.toy.strings[2], case.strings[1]]
    words, codes = case.pipe.split(others)
    rows = {"texts": [case.text, words] * N, "codes": torch.stack([case.codes, codes]).repeat(N, 1, 1)}
    pairs = case.pipe.score(**rows, samples=SAMPLES, batch_size=N, generator=[n // 2 for n in range(2 * N)])
    gap = pairs.difference(range(0, 2 * N, 2), range(1, 2 * N, 2))
    exact = case.exact("joint") + case.nelbo(True, True, "both", strings=others)
    check_held(gap.value, gap.high - gap.value, exact)


@pytest.mark.parametrize(("path", "denoiser"), CASES)
def test_exact_values_are_those_of_the_set(path, denoiser):
    """The joint bound of two independent strings is the sum of theirs; an exact model's scores are probabilities."""
    case = case_of(path, denoiser)
    stored = case.toy.data[denoiser]["per_x0"]
    assert -case.exact("joint") == pytest.approx(sum(stored[s]["nelbo"] for s in case.strings), abs=1e-10)
    if denoiser == "exact":
        joint, text, image = case.probability(), case.probability(image=False), case.probability(text=False)
        expected = dict(zip(KINDS, (joint, joint / image, joint / text, text, image), strict=False))
        expected |= dict.fromkeys(KINDS[5:], joint / text / image)
        assert {kind: math.exp(case.exact(kind)) for kind in KINDS} == pytest.approx(expected, rel=1e-10)
