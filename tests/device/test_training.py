"""Training on another device: the losses, weights and reports of the CPU; checkpoints that go on there and elsewhere."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, nullcontext
from dataclasses import astuple
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from device_cases import any_name_means_it, same_pictures
from PIL import Image
from safetensors.torch import load_file
from tiny_pipeline import tiny_parts, tiny_pipeline
from train_fixtures import MIXED, SPECIALS, VOCABULARY, tiny_config, tiny_table, write_documents
from virtual_device import DEVICE, VirtualTensor, virtual_device

from unidiff.decoding import CacheConfig, Guidance, ModalityDecoding, SamplerConfig
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.tokens import Span, TokenBatch
from unidiff.tokens.image.vq import VQImageTokenizer
from unidiff.train.build import add_adapters
from unidiff.train.config import LoraConfig
from unidiff.train.data.samples import SheetSampler
from unidiff.train.data.shard_source import DocumentTokens
from unidiff.train.optim import learning_rate_factor
from unidiff.train.reward import RewardConfig, RewardReport, RewardTuner, States
from unidiff.train.reward_run import tune_pipeline
from unidiff.train.trainer import Trainer

pytestmark = pytest.mark.training
EXACT = ["precision=fp32", "steps=4", "logging.every=1", "ema.decay=0.5", "checkpoint.export_dtype=float32"]
CAUSAL = [
    "model={hidden_size: 32, num_layers: 2, num_heads: 2, qk_norm: head, attention: block_causal, block_length: 4}",
    "tasks.generate={weight: 1, loss: elbo}",
    "tasks.caption.weight=0",
    "tasks.answer.weight=0",
]
RATES = [
    "tasks.generate={weight: 1, rate: uniform, loss: elbo}",
    "tasks.text_to_image={weight: 1, rate: beta, loss: ce, per_sample: true, scale: 0.5}",
    "tasks.caption={weight: 1, rate: cosine, loss: elbo, dropout: 0.5}",
    "objective={text_weight: 0.5, image_weight: 2, chunk: 16}",
]
WEIGHTS = [
    "tasks.generate={weight: 1, rate: uniform, loss: softmin}",
    "tasks.text_to_image={weight: 1, rate: cosine, loss: inverse_rate}",
    "tasks.caption={weight: 1, rate: high, loss: ce}",
    "schedule.name=constant",
]
RUNS: dict[str, list[str]] = {
    "adamw": [],
    "muon": ["optimiser.name=muon"],
    "accumulated": ["accumulate=2", "batch_size=4"],
    "rates and losses": [*RATES, "data.crop_fill=0.5"],
    "weights of tokens": WEIGHTS,
    "timed": ["model={hidden_size: 32, num_layers: 2, num_heads: 2, time_conditioning: true, cond_dim: 8}"],
    "dropout": ["model={hidden_size: 32, num_layers: 2, num_heads: 2, dropout: 0.2}"],
    "packed": ["data.pack=40"],
    "block diffusion": CAUSAL,
    "recomputed": ["activation_checkpointing=full"],
    "recomputed in part": ["activation_checkpointing=selective"],
    "validated": ["logging.validate_every=2", "checkpoint.best=joint_nelbo", "spike_factor=50"],
    "wsd": ["schedule={name: wsd, warmup: 1, decay: 0.5}", "optimiser={lr: 1e-3, clip: 0.01}"],
    "bf16": ["precision=bf16"],
}


def run(folder: Path, *overrides: str, **more: Any) -> tuple[Trainer, dict[str, float], list[dict[str, Any]]]:
    """A finished run, its last report, and the lines of its log."""
    table, held_out = tiny_table(72).split(8)
    config = tiny_config(folder, *MIXED, *EXACT, *overrides)
    trainer = Trainer(config, table.seeded(config.seed), held_out, **more)
    report = trainer.train()
    return trainer, report, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_runs(expected: Any, found: Any, folders: tuple[Path, Path], close: float = 2e-4) -> None:
    (one, report, lines), (two, reported, written) = expected, found
    assert report.keys() == reported.keys() and len(lines) == len(written)
    for a, b in zip(lines, written, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"time", "seconds_per_step", "tokens_per_second", "tflops", "data_wait", "kind"}:
            assert b[name] == pytest.approx(a[name], rel=close, abs=close), name
    assert report == pytest.approx(reported, rel=close, abs=close)
    for (name, p), q in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        assert isinstance(q, VirtualTensor), name
        # Adam makes steps of rounding noise where gradients are tiny
        assert float((p.detach() - q.detach().cpu()).abs().mean()) < 5e-5, name
    exported = [load_file(next((folder / "model").glob("*.safetensors"))) for folder in folders]
    assert exported[0].keys() == exported[1].keys()
    assert all(float((a - exported[1][name]).abs().mean()) < 5e-5 for name, a in exported[0].items())


def check(tmp_path: Path, *overrides: str, **more: Any) -> None:
    expected = run(tmp_path / "cpu", *overrides, **more)
    with virtual_device(), any_name_means_it():
        found = run(tmp_path / "there", *overrides, **more)
        same_runs(expected, found, (tmp_path / "cpu", tmp_path / "there"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(tmp_path, name):
    if name == "bf16":  # autocast does nothing there
        with virtual_device(), any_name_means_it():
            assert math.isfinite(run(tmp_path, *RUNS[name])[2][-1]["joint_nelbo"])
        return
    check(tmp_path, *RUNS[name])


@pytest.mark.parametrize("pack", [0, 60])
def test_documents_are_learnt_from(tmp_path, pack):
    documents = DocumentTokens(str(write_documents(tmp_path / "documents")), seed=3)
    check(tmp_path, f"data.pack={pack}", documents=documents)


@pytest.mark.parametrize("dora", ["false", "true"])
def test_adapters_are_trained(tmp_path, dora):
    pytest.importorskip("peft", reason="peft (the `finetune` extra) is not installed")
    run(tmp_path / "base")
    check(tmp_path, "lora.rank=4", f"lora.dora={dora}", f"checkpoint.init_from={tmp_path / 'base' / 'model'}")


def test_moments_of_8_bits_are_trained(tmp_path):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    wide = "model={hidden_size: 256, num_layers: 1, num_heads: 4, qk_norm: head}"
    check(tmp_path, wide, "optimiser.state_bits=8")


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("places", ["there, there", "here, there", "there, here"])
def test_a_checkpoint_goes_on_on_any_device(tmp_path, optimiser, places):
    """On one device bit for bit, on another but for rounding."""
    first, second = (place == "there" for place in places.split(", "))
    table = tiny_table(72).split(8)[0]

    def begun(name: str, there: bool) -> Trainer:
        config = tiny_config(tmp_path / name, *MIXED, *EXACT, f"optimiser.name={optimiser}")
        with any_name_means_it() if there else nullcontext():
            return Trainer(config, table.seeded(config.seed))

    def steps(trainer: Trainer) -> None:
        for _ in range(2):
            step = trainer.state.step
            trainer.step(learning_rate_factor(trainer.config.schedule, step, trainer.config.steps))

    with virtual_device() if second else nullcontext():
        whole = begun("whole", second)
        steps(whole)
        steps(whole)
    with virtual_device() if first else nullcontext():
        cut = begun("cut", first)
        steps(cut)
        cut.save()
        cut.saver.wait()
    with virtual_device() if second else nullcontext():
        after = begun("cut", second)
        assert after.resumed and after.state.step == 2
        steps(after)
        parts = [
            {f"{part}.{name}": value.detach().cpu() for part, held in kept.items() for name, value in held.items()}
            for kept in (
                {"model": t.model.state_dict(), "ema": t.state.ema.average, "optimiser": t.state.optimisers.state()}
                for t in (whole, after)
            )
        ]
    assert parts[0].keys() == parts[1].keys()
    for name, value in parts[0].items():
        if first == second:
            assert torch.equal(value, parts[1][name]), name
        else:
            torch.testing.assert_close(value, parts[1][name], rtol=1e-3, atol=1e-3)


def test_sample_sheets_are_drawn(tmp_path):
    overrides = [
        "logging.sample_every=2", "logging.sample_steps=3", "logging.prompts=[a,h,c]", "logging.sample_guidance=2",
    ]  # fmt: skip
    sheets = []
    for name in ("cpu", "there"):
        config = tiny_config(tmp_path / name, *overrides)
        parts = tiny_parts(grid=(3, 3))
        image = VQImageTokenizer(parts[1])
        sampler = SheetSampler(config, tiny_table(), image, LetterTokenizer(), tmp_path / name / "samples")
        with virtual_device() if name == "there" else nullcontext(), ExitStack() as stack:
            if name == "there":
                stack.enter_context(any_name_means_it())
            run(tmp_path / name, *overrides, sampler=sampler)
        sheets.append([Image.open(path) for path in sorted((tmp_path / name / "samples").iterdir())])
    assert [len(found) for found in sheets] == [2, 2]
    for a, b in zip(*sheets, strict=True):
        same_pictures([a], [b])


class LetterTokenizer:
    """One id per letter of `abcdefgh`."""

    size, eos_id = VOCABULARY.text_size, SPECIALS["eos"]

    def encode(self, text: str) -> list[int]:
        return [8 + "abcdefgh".index(letter) for letter in text]

    def special(self, name: str) -> int:
        return SPECIALS[name]


def reports(device: Any, states: str, cache: CacheConfig, **changes: Any) -> list[RewardReport]:
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, hidden_size=32, num_layers=1, num_heads=2)
    model.double()  # AdamW enlarges rounding
    if changes.pop("lora", False):
        add_adapters(model, LoraConfig(rank=2, alpha=4.0))
    model.to(device)

    def reward(finished: TokenBatch) -> torch.Tensor:
        assert finished.ids.device == torch.device(device)
        return (finished.ids[:, 2:] == VOCABULARY.image[0] + 3).float().mean(1)

    settings = SamplerConfig(image=ModalityDecoding(steps=3), guidance=Guidance(1.5))
    config = RewardConfig(group=4, beta=0.1, chunk=64, lr=1e-2, states=states, **changes)
    words = Span.text(torch.tensor([1, 9]), True)
    prompts = TokenBatch.from_spans([[words, Span.masked_image((2, 3), VOCABULARY)] for _ in range(3)]).to(device)
    tuner = RewardTuner(model, VOCABULARY, settings, reward, config, cache)
    return [tuner.step(prompts, prompts.given) for _ in range(3)]


@pytest.mark.parametrize("changes", [{}, {"rows": 5}, {"lora": True}], ids=str)
@pytest.mark.parametrize("states", get_args(States))
def test_a_reward_is_learnt_from(states, changes):
    if "lora" in changes:
        pytest.importorskip("peft", reason="peft (the `finetune` extra) is not installed")
    cache = CacheConfig("dual" if states == "decoded" else "none")
    expected = reports("cpu", states, cache, **changes)
    with virtual_device():
        found = reports(DEVICE, states, cache, **changes)
    for a, b in zip(expected, found, strict=True):
        assert astuple(a) == pytest.approx(astuple(b), rel=1e-3, abs=1e-5)


def test_a_pipeline_is_tuned(tmp_path):
    def tuned(name: str, device: Any) -> list[dict[str, Any]]:
        settings = RewardConfig(steps=2, prompts_per_step=2, group=3, lr=1e-3, passes=3)
        pipe = tiny_pipeline().to(device)
        bright = lambda texts, pictures: pictures.flatten(1).mean(1)  # noqa: E731
        tune_pipeline(pipe, tmp_path / name, bright, lambda number: ("a dog", "two cats")[number % 2], settings, {})
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    expected = tuned("cpu", "cpu")
    with virtual_device():
        found = tuned("there", DEVICE)
    for a, b in zip(expected, found, strict=True):
        assert all(a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5) for name in a if name not in ("time", "kind"))
    one, two = (UniDiffPipeline.from_pretrained(tmp_path / name / "pipeline") for name in ("cpu", "there"))
    for p, q in zip(one.transformer.parameters(), two.transformer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)
