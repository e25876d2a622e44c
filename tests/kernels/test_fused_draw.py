"""The fused draw against its torch twin: through Triton's interpreter on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fused_draw_cases import Case, cases

from unidiff.decoding import draw
from unidiff.decoding.config import ModalityDecoding
from unidiff.kernels.fused_draw import FusedDraw, fused_draw, fusible, usable

CASES = cases()
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def twin(case: Case) -> tuple[draw.Choice, torch.Tensor]:
    """The torch path, and which positions are finite."""
    logits = case.blend(case.values)
    is_real = torch.ones_like(case.u, dtype=torch.bool)
    return draw.choose(logits[None], is_real, case.settings, case.u, case.u), logits.amax(-1).isfinite()


def check(case: Case, found: FusedDraw) -> None:
    expected, is_finite = twin(case)
    assert torch.equal(found.is_finite, is_finite)
    assert torch.equal(found.token[is_finite], expected.token[is_finite])
    assert (found.token >= 0).all() and (found.token < case.values.shape[-1]).all()
    torch.testing.assert_close(found.probability[is_finite], expected.probability[is_finite], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.confidence[is_finite], expected.confidence[is_finite], rtol=1e-12, atol=1e-14)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the kernel draws in a process of its own: the interpreter is chosen before triton is imported."""
    path = tmp_path_factory.mktemp("fused") / "out.safetensors"
    program = Path(__file__).with_name("fused_draw_cases.py")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", program, path], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(path)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_draws_what_its_twin_draws(name: str, interpreted: dict[str, torch.Tensor]) -> None:
    keys = ("token", "probability", "confidence", "is_finite")
    check(CASES[name], FusedDraw(*(interpreted[f"{name}/{key}"] for key in keys)))


def test_cases_cover_what_they_are_for() -> None:
    choices = {name: twin(case) for name, case in CASES.items()}
    assert len(choices["plain"][0].token.unique()) > 2
    assert choices["rare"][0].token.flatten().tolist() == [3, 3, 3, 18, 18, 18]
    assert (~choices["unsound"][1]).sum() == 3
    tied = CASES["greedy"].values[0]
    assert ((tied == tied.amax(-1, keepdim=True)).sum(-1) > 1).any()
    best = CASES["tied margin"].values[0].topk(2).values
    assert (best[..., 0] == best[..., 1]).any()


def test_only_what_is_the_same_draw_is_fused() -> None:
    single, double = torch.float32, torch.float64
    assert fusible(single, 0.7, None, None) and fusible(double, 1.0, None, None) and fusible(single, 1.0, 128, None)
    assert fusible(single, 0.0, 500, 0.9)  # filters do not matter to the largest logit
    assert not fusible(single, 1.0, None, 0.9) and not fusible(single, 1.0, 129, None)
    assert not fusible(double, 1.0, 5, None) and not fusible(torch.bfloat16, 1.0, None, None)
    assert not usable(torch.zeros(1, 1, 1, 4), 1.0, None, None)  # on the CPU the torch path stays


def test_refuses_what_it_does_not_fuse() -> None:
    values, u = torch.zeros(2, 1, 1, 4), torch.full((1, 1), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="top_k 200"):
        fused_draw(values, u, top_k=200)
    with pytest.raises(ValueError, match=r"expected \(1, 1\)"):
        fused_draw(values, u)


def test_blending_is_mixing_then_banning() -> None:
    case = CASES["banned"]
    is_real = torch.ones_like(case.u, dtype=torch.bool)
    blended = draw.choose(case.values, is_real, case.settings, case.u, case.u, case.blend)
    plain, _ = twin(case)
    assert all(torch.equal(a, b) for a, b in zip(vars(blended).values(), vars(plain).values(), strict=True))
    assert not torch.isin(blended.token, case.blend.banned).any()


def test_importing_the_library_leaves_triton_alone() -> None:
    """Diffusers may reach triton through torch; the library does so only when it launches the kernel."""
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import unidiff.kernels.fused_draw;"
        "assert ('triton' in sys.modules) == before;"
        "import unidiff.decoding; assert 'unidiff.kernels.draw_kernel' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_gpu_draws_what_the_cpu_draws(name: str) -> None:
    """The whole path of the sampler: `choose` on CUDA goes through the kernel."""
    case, is_real = CASES[name], torch.ones_like(CASES[name].u, dtype=torch.bool)
    there = case.to("cuda")
    s = there.settings
    if fusible(case.values.dtype, s.temperature, s.top_k, s.top_p):
        assert usable(there.values, s.temperature, s.top_k, s.top_p)
    expected, is_finite = twin(case)
    got = draw.choose(there.values, is_real.cuda(), s, there.u, there.u, there.blend)
    assert torch.equal(got.token.cpu()[is_finite], expected.token[is_finite]) and bool(got.is_finite) == bool(
        expected.is_finite
    )
    torch.testing.assert_close(got.probability.cpu()[is_finite], expected.probability[is_finite], rtol=1e-10, atol=0)
    torch.testing.assert_close(got.confidence.cpu()[is_finite], expected.confidence[is_finite], rtol=1e-10, atol=1e-13)


@pytest.mark.gpu
@needs_triton
def test_gpu_draws_from_a_wide_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    values = 4 * torch.randn(2, 2, 8, 126_464, generator=generator)
    u = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    blend = draw.Blend(torch.tensor([1.5, 3.0]), banned=torch.tensor([126_336]))
    for settings in (ModalityDecoding(temperature=0.9, confidence="margin"), ModalityDecoding(top_k=50)):
        case = Case(values, u, settings, blend)
        expected, _ = twin(case)
        there = case.to("cuda")
        is_real = torch.ones_like(there.u, dtype=torch.bool)
        got = draw.choose(there.values, is_real, settings, there.u, there.u, there.blend)
        assert torch.equal(got.token.cpu(), expected.token)
        torch.testing.assert_close(got.confidence.cpu(), expected.confidence, rtol=1e-10, atol=1e-13)
