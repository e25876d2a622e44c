"""The sampler draws from the law that the theory says, for every case of golden/toy_exact."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from golden import golden_folders
from torch import Tensor
from toy_model import TableModel

from unidiff.decoding import ModalityDecoding, Sampler, SamplerConfig
from unidiff.decoding.commit.ancestral import remdm_sigma, unmask_chance

ROWS = 40_000


def law_cases() -> list:
    cases = []
    for folder in golden_folders("toy_exact"):
        data = json.loads((folder / "toy_exact.json").read_text())
        for denoiser in data["denoisers"]:
            laws = data[denoiser].get("sampler_law", {})
            cases += [
                pytest.param(data["denoisers"][denoiser], data["V"], name, law, id=f"{folder.name}-{denoiser}-{name}")
                for name, law in laws.items()
            ]
    return cases or [pytest.param(None, 0, "", None, marks=pytest.mark.skip(reason="golden/toy_exact is absent"))]


def settings_of(name: str) -> ModalityDecoding:
    """`ancestral_K4`, `remdm_cap_1/5_K4` or `first_hitting...` as sampler settings."""
    if name.startswith("first_hitting"):
        return ModalityDecoding(rule="first_hitting")
    kind, *rest = name.split("_")
    steps = int(rest[-1].removeprefix("K"))
    if kind == "ancestral":
        return ModalityDecoding(rule="ancestral", schedule="linear", steps=steps)
    assert kind == "remdm" and rest[0] == "cap", f"the golden set names a sampler that this test does not know: {name}"
    cap = float(Fraction(rest[1]))
    return ModalityDecoding(rule="ancestral", schedule="linear", steps=steps, remask="remdm", remask_cap=cap)


def exact_law(model: TableModel, settings: ModalityDecoding) -> Tensor:
    """Output law by dynamic programming over all partly masked strings, from the sampler's own chances, float64."""
    size, length, mask = model.size, model.length, model.size
    states = list(itertools.product(range(size + 1), repeat=length))
    law = {state: float(all(s == mask for s in state)) for state in states}
    for step in range(settings.steps):
        k, n = torch.tensor([step]), torch.tensor([settings.steps])
        sigma = (
            remdm_sigma(settings.schedule, k, n, settings.remask_cap) if settings.remask == "remdm" else torch.zeros(1)
        )
        reveal, hide = unmask_chance(settings.schedule, k, n, sigma).item(), sigma.item()
        after = dict.fromkeys(states, 0.0)
        for index, state in enumerate(states):
            if law[state] == 0:
                continue
            options = []
            for place, symbol in enumerate(state):
                if symbol == mask:
                    p = model.log_table[index, place].exp().tolist()
                    options.append([(mask, 1 - reveal), *((token, reveal * p[token]) for token in range(size))])
                else:
                    options.append([(symbol, 1 - hide), (mask, hide)])
            for combination in itertools.product(*options):
                chance = math.prod(p for _, p in combination)
                after[tuple(s for s, _ in combination)] += law[state] * chance
        law = after
    return torch.tensor([law[s] for s in itertools.product(range(size), repeat=length)], dtype=torch.float64)


@pytest.mark.golden
@pytest.mark.parametrize(("denoiser", "size", "name", "expected"), law_cases())
def test_sampler_law(denoiser: dict, size: int, name: str, expected: dict) -> None:
    model = TableModel.from_denoiser(denoiser, size)
    settings = settings_of(name)
    law = torch.tensor(
        [float(Fraction(expected["law"].get("".join(map(str, s)), "0"))) for s in _strings(model)], dtype=torch.float64
    )
    if settings.rule == "ancestral":  # the chances the loop uses give exactly this law
        torch.testing.assert_close(exact_law(model, settings), law, atol=1e-10, rtol=0)

    config = SamplerConfig(text=settings)
    out = Sampler(model, model.vocabulary, config)(model.request(ROWS), torch.arange(ROWS))
    counts = torch.bincount(model.index_of(out.batch.ids), minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    counts, law = counts[law > 0], law[law > 0]
    chi_square = ((counts - ROWS * law).square() / (ROWS * law)).sum().item()
    freedom = len(law) - 1
    # Wilson-Hilferty: a standard normal; 4.5 is passed by chance in 3 of a million
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.5, f"chi-square {chi_square:.1f} at {freedom} degrees of freedom"
    if settings.rule == "first_hitting":
        assert out.nfe == model.length  # one network evaluation per token, whatever the steps


def _strings(model: TableModel) -> list[tuple[int, ...]]:
    return list(itertools.product(range(model.size), repeat=model.length))
