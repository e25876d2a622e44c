"""The checks of an accelerator, in the order in which they are made."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import torch
from torch import nn

from unidiff.decoding import ModalityDecoding, SamplerOutput, draw
from unidiff.errors import few
from unidiff.evaluation.benchmark.gpu_check import DeviceCheck, Found, NotRun, Place
from unidiff.evaluation.benchmark.measure import copy_bandwidth, matmul_peak, measure_mixture, measure_steps, seconds_of
from unidiff.evaluation.benchmark.random_weights import (
    SUITES,
    RandomDecode,
    ShapeSuite,
    cache_named,
    decode_once,
    random_model,
    request,
)
from unidiff.models.config import TransformerConfig
from unidiff.models.experts import MixtureOfExperts
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.process import timed
from unidiff.tokens import Modality, Span, TokenBatch
from unidiff.train.config import read_config
from unidiff.train.cost.benchmark import TrainingLoad, fit_to_memory, free_bytes, measure_step
from unidiff.train.cost.plan import declared_vocabulary

BATCHES = (1, 8)
PROMPTS = ("a fox on a green background", "two frogs on a green background", "a rocket above a house on black")
TRAINED = {"unidisc-small": 64, "unidisc-1.4b-stage1": 16}
"""Configs of training, with rows per step."""
_TINY = ["model={hidden_size: 64, num_layers: 2, num_heads: 2}", "objective.chunk=32"]
_TINY += ["data.vocabulary=unidisc-magvit", "data.text_length=16", "data.grid=4"]
DRAWS = {
    "best": ModalityDecoding(temperature=0.0),
    "plain": ModalityDecoding(temperature=1.0),
    "warm, margin": ModalityDecoding(temperature=0.9, confidence="margin"),
    "top 50": ModalityDecoding(temperature=1.0, top_k=50),
}


def gpu_tests(place: Place) -> Found:
    """All tests that are marked `gpu`, by pytest in a process of its own."""
    marked = [p for p in sorted((place.root / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", *map(str, marked)]
        limit = place.seconds - 3  # so that pytest ends before its parent is ended
        try:
            done = subprocess.run(
                [sys.executable, *words], cwd=place.root, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return Found([], f"The tests marked gpu took more than {limit:.0f} s.")
        if not report.is_file():
            return Found(
                [], f"pytest wrote no report (status {done.returncode}): {(done.stdout + done.stderr)[-200:]!r}."
            )
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts: dict[str, Counter[str]] = {}
    failed = []
    for case in cases:
        ended = {child.tag for child in case} & {"failure", "error", "skipped"}
        kind = "skipped" if ended == {"skipped"} else "failed" if ended else "passed"
        counts.setdefault(case.get("classname", ""), Counter())[kind] += 1
        failed += [case.get("name", "")] if kind == "failed" else []
    rows = [{"file": name, **{k: count[k] for k in ("passed", "failed", "skipped")}} for name, count in counts.items()]
    if failed or not cases or done.returncode:
        return Found(
            rows, f"{len(failed)} of {len(cases)} tests failed (pytest ended with {done.returncode}): {few(failed)}."
        )
    return Found(rows)


def rates(place: Place) -> Found:
    """The roofline of the machine: matrix products and copies."""
    suite = _suite("gpu-8b", place)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        rate = matmul_peak(suite.peak_size, dtype, place.device) / 1e12
        rows.append({"what": f"{suite.peak_size}^2 matrices, {_name(dtype)}", "rate": rate, "unit": "TFLOP/s"})
    bandwidth = copy_bandwidth(suite.copy_bytes, place.device) / 1e9
    return Found([*rows, {"what": f"copy of {suite.copy_bytes >> 20} MiB", "rate": bandwidth, "unit": "GB/s"}])


def mixture(place: Place) -> Found:
    """A mixture of experts beside dense products of as many operations; and its answers by one product and by many."""
    width, experts = (64, 8) if place.tiny else (1024, 64)
    rows: list[dict[str, Any]] = []
    for inner in (width // 2, width):
        shape = {"hidden_size": width, "num_heads": width // 64, "num_experts": experts, "expert_size": inner}
        config = TransformerConfig(1, **shape, experts_per_token=min(8, experts // 2))  # type: ignore[arg-type]
        for tokens in (64,) if place.tiny else (64, 1024, 16384):
            found = measure_mixture(config, tokens, torch.bfloat16, place.device)
            named = {
                "experts": f"{config.experts_per_token} of {experts}",
                "width": f"{width} x {inner}",
                "tokens": tokens,
            }
            rates = {"mixture": found.mixture / 1e12, "dense": found.dense / 1e12, "unit": "TFLOP/s"}
            rows.append({**named, **rates, "share %": 100 * found.share})
    with torch.device(place.device):
        layer = MixtureOfExperts(config).to(torch.bfloat16)
    layer.reset_experts(silent=False)
    x = torch.randn(256, width, device=place.device).bfloat16()
    with torch.no_grad():
        one, many = (layer.experts(x, layer.router(x), grouped).float() for grouped in (True, False))
    error = float((one - many).norm() / many.norm())
    return Found(rows, "" if error < 0.02 else f"One product for all experts differs by {error:.2g} from many.")


def fused_draw(place: Place) -> Found:
    """The fused kernel beside the torch path: same tokens, and its speed."""
    width, positions, rows = (1000, 4, []) if place.tiny else (126_464, 64, list[dict[str, Any]]())
    differing = []
    for batch in BATCHES:
        generator = torch.Generator(place.device).manual_seed(batch)
        values = 4 * torch.randn(1, batch, positions, width, device=place.device, generator=generator)
        u = torch.rand(batch, positions, device=place.device, dtype=torch.float64, generator=generator)
        is_real = torch.ones_like(u, dtype=torch.bool)
        for name, settings in DRAWS.items():
            if not draw.fuses(values, settings):
                raise NotRun("The kernel is not used here: triton or a C compiler is missing.")
            work = partial(draw.choose, values, is_real, settings, u, u)
            fused, fused_seconds = work(), seconds_of(work, place.device)
            with patch.object(draw, "fuses", lambda *_: False):
                plain, seconds = work(), seconds_of(work, place.device)
            same = float((fused.token == plain.token).float().mean())
            differing += [name] if same < 1 else []
            speed = {"kernel ms": fused_seconds * 1e3, "torch ms": seconds * 1e3, "speed-up": seconds / fused_seconds}
            rows.append({"rows": batch, "draw": name, **speed, "same tokens %": 100 * same})
    return Found(rows, f"Kernel and torch draw different tokens: {few(differing)}." if differing else "")


def graphs(place: Place) -> Found:
    """One block of a decode with and without CUDA graphs, in turn: same tokens, and what they gain."""
    suite, rows, differing = _suite("gpu-1.4b", place), list[dict[str, Any]](), []
    model = _random(suite, place, torch.bfloat16)
    for batch in BATCHES:
        workload = _decode(place, "bfloat16", batch)
        schedule = workload.schedule(suite.vocabulary, 1)
        for policy in ("none", "dual"):
            cache, seconds = cache_named(policy).build(), {False: list[float](), True: list[float]()}
            outputs: dict[bool, SamplerOutput] = {}
            for run in range(4):
                for on in seconds:
                    decode = partial(decode_once, model, suite.vocabulary, workload, on, cache, schedule, 0)
                    outputs[on], spent = timed(decode, place.device)
                    seconds[on] += [spent] if run else []  # the first one warms up
            name = f"{policy}, {batch}"
            differing += [] if torch.equal(*(outputs[on].batch.ids for on in seconds)) else [name]
            off, with_graphs = median(seconds[False]), median(seconds[True])
            speed = {"off ms": off * 1e3, "on ms": with_graphs * 1e3, "speed-up": off / with_graphs}
            rows.append({"rows": batch, "cache": policy, "passes": outputs[True].nfe, **speed})
    return Found(rows, f"Graphs change the tokens: {few(differing)}." if differing else "")


def steps(name: str, place: Place) -> Found:
    """Full and cached passes beside the roofline of the same minute."""
    suite, rows = _suite(name, place), list[dict[str, Any]]()
    model = _random(suite, place, torch.bfloat16)
    peak = matmul_peak(suite.peak_size, model.dtype, place.device)
    bandwidth = copy_bandwidth(suite.copy_bytes, place.device)
    for batch in BATCHES:
        workload = _decode(place, "bfloat16", batch)
        schedule = workload.schedule(suite.vocabulary)
        tokens = request(schedule, workload.grid, suite.vocabulary, batch, 0).to(place.device)
        measured = measure_steps(model, tokens.hide_targets(suite.vocabulary), schedule, peak, bandwidth)
        for kind, step in measured.items():
            times = {"ms": step["seconds"] * 1e3, "roofline ms": step["roofline"] * 1e3}
            rows.append({"rows": batch, "pass": kind, **times, "of the roofline %": 100 * step["share"]})
    return Found(rows)


def training(place: Place) -> Found:
    """Steps of training, with the share of the matmul peak that did useful work."""
    rows = []
    for name, batch in TRAINED.items():
        path = None if place.tiny else place.root / "configs" / f"{name}.yaml"
        config = read_config(path, [*(_TINY if path is None else []), f"batch_size={4 if place.tiny else batch}"])
        load = TrainingLoad(config, declared_vocabulary(config), place.device.type)
        fit = fit_to_memory(load, free_bytes(place.device.type))
        step = measure_step(fit.step, steps=3)
        speed = {"s": step.seconds, "tokens/s": step.tokens_per_second, "TFLOP": step.flops_per_step / 1e12}
        peak = {"peak TFLOP/s": step.peak_flops / 1e12, "MFU %": 100 * step.mfu, "GiB": step.memory_mib / 1024}
        shape = {"model": name, "million weights": round(step.parameters / 1e6), "rows": fit.step.config.batch_size}
        rows.append({**shape, **speed, **peak})
        if place.tiny:
            break
    return Found(rows)


def packing(place: Place) -> Found:
    """Packed rows by FlexAttention and by a dense mask: the same, and what it saves. Backward passes on CUDA only."""
    length, samples, rows = (64, 4, 2) if place.tiny else (4096, 8, 2)
    suite = _suite("gpu-1.4b", place)
    sizes = {"hidden_size": suite.model["hidden_size"], "num_heads": suite.model["num_heads"], "num_layers": 2}
    model = _random(ShapeSuite("", sizes, suite.text_ids, suite.image_ids, ()), place, torch.bfloat16).train()
    trains = place.device.type == "cuda"
    model.requires_grad_(trains)
    ids = torch.arange(length // samples) % suite.text_ids
    batch = TokenBatch.from_packed([[[Span.text(ids)] for _ in range(samples)] for _ in range(rows)], length)
    batch = batch.to(place.device)
    visible = batch.visibility()
    assert visible is not None  # rows hold several samples
    found, hidden, times = list[dict[str, Any]](), [], []
    for name, mask in (("dense mask", visible.dense()), ("FlexAttention", visible.flex())):

        def work() -> torch.Tensor:
            out = model.hidden(batch.ids, batch.modality, batch.positions, mask)  # noqa: B023
            if trains:
                out.square().mean().backward()
            return out.detach()

        hidden.append(work().float())
        times.append(seconds_of(work, place.device, 3))
        passes = "forward, backward" if trains else "forward"
        found.append({"rows": rows, "tokens": length, "by": name, "passes": passes, "ms": times[-1] * 1e3})
    error = float((hidden[0] - hidden[1]).norm() / hidden[0].norm())
    found[1] |= {"speed-up": times[0] / times[1], "relative difference": error}
    return Found(found, "" if error < 0.03 else f"FlexAttention differs from the dense mask by {error:.3g}.")


def dtypes(place: Place) -> Found:
    """Whether bf16 takes the tokens of float32: in one pass of a large model, and in whole decodes of the embedded one;
    and whether float32 takes those of the CPU."""
    suite, rows = _suite("gpu-1.4b", place), list[dict[str, Any]]()
    workload, best = _decode(place, "float32", 1), []
    tokens = request(workload.schedule(suite.vocabulary), workload.grid, suite.vocabulary, 1, 0).to(place.device)
    tokens = tokens.hide_targets(suite.vocabulary)
    for dtype in (torch.float32, torch.bfloat16):
        model = _random(suite, place, dtype)
        with torch.no_grad():
            logits = model(tokens, torch.ones(1, device=place.device))
        best.append([logits[..., slice(*suite.vocabulary.range_of(m))].argmax(-1) for m in Modality])
    agree = [float((a == b).float().mean()) for a, b in zip(*best, strict=True)]
    rows.append({"what": f"best token, {suite.about}", "of": "bfloat16 and float32", "same %": 100 * sum(agree) / 2})

    def drawn(where: torch.device, dtype: str) -> torch.Tensor:
        pipe = UniDiffPipeline.from_pretrained("emoji", dtype=dtype).to(where)
        pipe.set_progress_bar_config(disable=True)
        prompts, each = (PROMPTS[0], 1) if place.tiny else (list(PROMPTS), 4)
        return pipe.text_to_image(prompts, num_images_per_prompt=each, generator=0, output_type="codes").codes

    expected = there = drawn(torch.device("cpu"), "float32")
    if place.device.type != "cpu":
        there = drawn(place.device, "float32")
    low, same = drawn(place.device, "bfloat16"), 100 * float((there == expected).float().mean())
    name = "codes of pictures, embedded model"
    rows.append({"what": name, "of": "bfloat16 and float32", "same %": 100 * float((low == there).float().mean())})
    if place.device.type != "cpu":
        rows.append({"what": name, "of": "float32 and the CPU", "same %": same})
    return Found(rows, "" if same > 90 else f"In float32 only {same:.0f} % of the codes are those of the CPU.")


CHECKS: Sequence[DeviceCheck] = (
    DeviceCheck("rates", "Rates of matrix products and of copies.", 15, rates),
    DeviceCheck("tests", "All tests marked gpu.", 110, gpu_tests, "the tests marked gpu need one"),
    DeviceCheck("draw", "The fused draw beside the torch path.", 25, fused_draw, "the kernel is of CUDA"),
    DeviceCheck(
        "graphs", "A block of 1.4B decoded with and without CUDA graphs.", 45, graphs, "nothing is recorded elsewhere"
    ),
    DeviceCheck("steps-1.4b", "Full and cached passes of the 1.4B shape.", 30, partial(steps, "gpu-1.4b")),
    DeviceCheck("steps-8b", "Full and cached passes of the 8B shape.", 60, partial(steps, "gpu-8b")),
    DeviceCheck("packing", "Packed rows by FlexAttention and by a dense mask.", 45, packing),
    DeviceCheck("mixture", "A mixture of experts beside dense products.", 10, mixture),
    DeviceCheck("dtypes", "Tokens of bf16 and of float32.", 50, dtypes),
    DeviceCheck("training", "Steps of training.", 75, training),
)


def _suite(name: str, place: Place) -> ShapeSuite:
    return SUITES["smoke" if place.tiny else name]


def _decode(place: Place, dtype: str, batch: int) -> RandomDecode:
    return (
        RandomDecode(8, (4, 4), 4, 4, dtype, batch) if place.tiny else RandomDecode(128, (32, 32), 64, 64, dtype, batch)
    )


def _random(suite: ShapeSuite, place: Place, dtype: torch.dtype) -> MaskedTransformer:
    model = random_model(suite, place.device, 0)
    nn.Module.to(model, dtype)  # without diffusers' advice on loading
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
