"""Whole runs on a tiny set: learning, accumulation, EMA, schedules, guards, export."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from train_fixtures import MIXED, tiny_config, tiny_table

from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary
from unidiff.train.config import OptimiserConfig, ScheduleConfig
from unidiff.train.data.source import TokenTable
from unidiff.train.optim import EMA, Optimisers, learning_rate_factor
from unidiff.train.trainer import Trainer, TrainingAborted

pytestmark = pytest.mark.training


def run(config, **kwargs):
    table, held_out = tiny_table(72).split(8)
    trainer = Trainer(config, table.seeded(config.seed), held_out, **kwargs)
    return trainer, trainer.train()


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_loss_falls_and_logs_tell_tasks_apart(tmp_path, optimiser):
    overrides = [
        *MIXED,
        "steps=150",
        "logging.every=10",
        "optimiser.lr=1e-2",
        "batch_size=32",
        f"optimiser.name={optimiser}",
    ]
    overrides += ["logging.validate_every=75", "ema.decay=0.9", "precision=fp32"]
    _, report = run(tiny_config(tmp_path, *overrides))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(10, 151, 10))
    for key in (
        "nll/text_to_image/image",
        "nll/caption/text",
        "nll/generate/image",
        "nll/text/text",
        "nll/answer/text",
        "share/answer",
    ):
        assert key in train[-1], key
    assert train[-1]["nll/text_to_image/image"] < 0.6 * train[0]["nll/text_to_image/image"] < 0.6 * math.log(16) * 1.2
    validation = [line for line in lines if line["kind"] == "validation"]
    assert [line["step"] for line in validation] == [75, 150]
    assert validation[-1]["joint_nelbo"] == report["joint_nelbo"]
    # the picture is a function of the word; the word is uniform over 8, the paraphrase over 2
    truth, untrained = math.log(8) + math.log(2), 5 * math.log(32) + 9 * math.log(16)
    assert truth - 4 * report["joint_nelbo_error"] < report["joint_nelbo"] < 0.6 * untrained
    assert report["joint_nelbo"] == pytest.approx(report["joint_nelbo_text"] + report["joint_nelbo_image"])
    assert report["caption_nelbo_words"] <= report["caption_nelbo"]


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    whole, _ = run(tiny_config(tmp_path / "a", *MIXED, "steps=3", "batch_size=16", "precision=fp32"))
    parts, _ = run(tiny_config(tmp_path / "b", *MIXED, "steps=3", "accumulate=4", "batch_size=4", "precision=fp32"))
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        # Adam turns rounding noise of tiny gradients into steps, so compare far below the learning rate only mostly
        assert (a - b).abs().mean() < 2e-5, name
    assert whole.state.samples == parts.state.samples == 48


def test_export_holds_the_average_and_loads_strictly(tmp_path):
    trainer, _ = run(tiny_config(tmp_path, "steps=4", "checkpoint.export_dtype=float32"))
    model = MaskedTransformer.from_pretrained(tmp_path / "model")
    average = trainer.state.ema.average
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, average[name]), name
    vocabulary = json.loads((tmp_path / "model" / "vocabulary.json").read_text())
    assert vocabulary["specials"]["eos"] == 0
    assert not [p for p in tmp_path.rglob("*") if ".tmp" in p.name or ".old" in p.name]
    run(tiny_config(tmp_path / "half", "steps=1"))
    weights = load_file(next((tmp_path / "half" / "model").glob("*.safetensors")))
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}


def test_muon_state_resumes_bit_for_bit(tmp_path):
    common = [*MIXED, "optimiser.name=muon", "steps=6"]
    whole, _ = run(tiny_config(tmp_path / "whole", *common))
    config, table = tiny_config(tmp_path / "cut", *common), tiny_table(72).split(8)[0]
    first = Trainer(config, table.seeded(config.seed))
    for _ in range(3):
        first.step(learning_rate_factor(config.schedule, first.state.step, config.steps))
    first.save()
    second = Trainer(config, table.seeded(config.seed))
    assert second.resumed and second.state.step == 3
    second.train()
    for name, value in whole.state.optimisers.state().items():
        assert torch.equal(value, second.state.optimisers.state()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


def test_warm_start_begins_from_the_given_weights(tmp_path):
    run(tiny_config(tmp_path / "first", "steps=5", "checkpoint.export_dtype=float32"))
    config = tiny_config(tmp_path / "second", f"checkpoint.init_from={tmp_path / 'first' / 'model'}", "seed=5")
    trainer = Trainer(config, tiny_table())
    saved = load_file(next((tmp_path / "first" / "model").glob("*.safetensors")))
    assert all(torch.equal(p, saved[n]) for n, p in trainer.model.named_parameters())
    wider = tiny_config(
        tmp_path / "third", f"checkpoint.init_from={tmp_path / 'first' / 'model'}", "model.hidden_size=64"
    )
    with pytest.raises(ValueError, match="do not fit"):
        Trainer(wider, tiny_table())


def test_non_finite_steps_are_skipped_counted_and_end_the_run(tmp_path):
    table = tiny_table()
    trainer = Trainer(tiny_config(tmp_path, "steps=20", "max_bad_steps=3"), table)
    trainer.step(1.0)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    average = {n: p.clone() for n, p in trainer.state.ema.average.items()}
    handle = trainer.model.final_norm.register_forward_hook(lambda module, args, out: out * math.nan)
    report = trainer.step(1.0)
    trainer.settle()
    assert not report.finite and trainer.state.bad_steps == 1
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert all(torch.equal(p, average[n]) for n, p in trainer.state.ema.average.items())
    handle.remove()
    assert trainer.step(1.0).finite
    trainer.settle()
    assert trainer.state.bad_steps == 0 and trainer.state.skipped == 1
    trainer.model.final_norm.register_forward_hook(lambda module, args, out: out * math.nan)
    with pytest.raises(TrainingAborted, match="3 steps in a row"):
        trainer.train()


def test_checkpoints_are_pruned_and_a_fresh_run_refuses_a_used_folder(tmp_path):
    run(tiny_config(tmp_path, "steps=10", "checkpoint.every=2", "checkpoint.keep=2"))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000008", "step-00000010"]
    with pytest.raises(ValueError, match="already holds a run"):
        run(tiny_config(tmp_path, "checkpoint.resume=false"))
    for changed, said in (
        ("model.hidden_size=64", "model.hidden_size = 32, here 64"),
        ("optimiser.name=muon", 'optimiser.name = "adamw", here "muon"'),
    ):
        with pytest.raises(ValueError, match=said):
            run(tiny_config(tmp_path, changed, "steps=20"))
        with pytest.raises(ValueError, match="another model or optimiser"):
            run(tiny_config(tmp_path, changed, "steps=20", "checkpoint.changed=allow"))


def test_ema_follows_its_recursion_with_a_warm_up():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, decay=0.9, warmup=10.0)
    expected = float(model.weight.detach())
    for update in range(200):
        with torch.no_grad():
            model.weight.fill_(float(update))
        decay = float(ema.update())
        assert decay == min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * update
    assert float(ema.average["weight"]) == pytest.approx(expected, rel=1e-5)
    with ema.applied():
        assert float(model.weight.detach()) == float(ema.average["weight"])
    assert float(model.weight.detach()) == 199.0


def test_schedule_values():
    cosine = ScheduleConfig("cosine", warmup=10, floor=0.1)
    assert [learning_rate_factor(cosine, s, 110) for s in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.55, 0.1])
    wsd = ScheduleConfig("wsd", warmup=10, decay=0.2)
    values = [learning_rate_factor(wsd, s, 100) for s in (4, 10, 79, 80, 85, 99)]
    assert values == pytest.approx([0.5, 1, 1, 1, 0.5, 1 - math.sqrt(19 / 20)])
    assert learning_rate_factor(ScheduleConfig("constant", warmup=0), 50, 100) == 1.0


def test_muon_takes_the_matrices_inside_blocks_and_every_parameter_has_one_owner():
    model = MaskedTransformer(vocab_size=49, hidden_size=32, num_layers=2, num_heads=2, qk_norm="head")
    optimisers = Optimisers(model, OptimiserConfig(name="muon"))
    owned = {n: [id(p) for g in o.param_groups for p in g["params"]] for n, o in optimisers.optimisers.items()}
    assert sorted(owned["adamw"] + owned["muon"]) == sorted(id(p) for p in model.parameters())
    names = {n for n, p in model.named_parameters() if id(p) in owned["muon"]}
    assert names and all(n.startswith("blocks.") and n.endswith("weight") and "norm" not in n for n in names)
    assert len(names) == 2 * 4  # qkv, out, up, down of both blocks
    decayed = [p for g in optimisers.optimisers["adamw"].param_groups if g["weight_decay"] > 0 for p in g["params"]]
    assert all(p.ndim >= 2 for p in decayed)


def test_starting_weights_of_other_ids_are_refused_and_other_angles_named(tmp_path, caplog):
    run(tiny_config(tmp_path / "first", "steps=1", "checkpoint.export_dtype=float32"))
    start = f"checkpoint.init_from={tmp_path / 'first' / 'model'}"
    Trainer(tiny_config(tmp_path / "same", start), tiny_table())
    assert not caplog.text
    Trainer(tiny_config(tmp_path / "angles", start, "model.rope_theta=100.0"), tiny_table())
    assert "were trained with rope_theta = 10000.0, here 100.0" in caplog.text
    table, specials = tiny_table(), {"eos": 0, "caption": 1, "question": 2}
    Trainer(tiny_config(tmp_path / "fewer", start), TokenTable(table.tensors, Vocabulary.unified(32, 16, specials)))
    moved = TokenTable(table.tensors, Vocabulary.unified(32, 16, specials | {"answer": 5}))
    with pytest.raises(ValueError, match=r"vocabulary\.json' is another vocabulary than the data's"):
        Trainer(tiny_config(tmp_path / "moved", start), moved)
    (tmp_path / "first" / "model" / "vocabulary.json").write_text('{"size": "x"}')
    with pytest.raises(ValueError, match=r"vocabulary\.json'"):
        Trainer(tiny_config(tmp_path / "broken", start), table)


def test_weights_in_two_files_are_refused(tmp_path):
    run(tiny_config(tmp_path / "first", "steps=1"))
    (path,) = (tmp_path / "first" / "model").glob("*.safetensors")
    (path.parent / "older.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"holds .* in two files; leave one model there"):
        Trainer(tiny_config(tmp_path / "next", f"checkpoint.init_from={path.parent}"), tiny_table())


def test_no_validation_rows_are_no_validation(tmp_path):
    table, held_out = tiny_table(72).split(8)
    trainer = Trainer(tiny_config(tmp_path, "steps=2", "data.validation_rows=0"), table, held_out)
    assert trainer.train() == {}
