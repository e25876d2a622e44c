"""Muddit's VQ model, text encoder, scheduler and pipelines against the reference: every stored tensor is compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from muddit_parts import golden_clip, golden_vq, muddit_sets, read_config
from safetensors.torch import load_file
from torch import Tensor

from unidiff.families.muddit import MUDDIT
from unidiff.families.muddit.scheduler import GeneratorDraws, MaskGitSchedule
from unidiff.families.muddit.tasks import MudditSettings, StepReport, generate_image, write_text
from unidiff.families.muddit.text import TextFeatures, question_rows

pytestmark = pytest.mark.golden


class Recorded(GeneratorDraws):
    """The reference's stream, keeping the Gumbel noise it gave."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.Generator().manual_seed(seed))
        self.noise: list[Tensor] = []

    def gumbel(self, like: Tensor, step: int) -> Tensor:
        self.noise.append(super().gumbel(like, step))
        return self.noise[-1]


class Injected:
    """Stored draws instead of a generator's."""

    def __init__(self, sampled: Tensor, gumbel: Tensor | None) -> None:
        self._sampled, self._gumbel = sampled, gumbel

    def tokens(self, probabilities: Tensor, step: int) -> Tensor:
        return self._sampled[step]

    def gumbel(self, like: Tensor, step: int) -> Tensor:
        return self._gumbel[step]


def close(actual: Tensor, expected: Tensor, name: str, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("folder", muddit_sets())
def test_no_file_is_left_unread(folder):
    weights = {f"{name}.safetensors" for name in read_config(folder) if (folder / f"{name}.safetensors").is_file()}
    cases = {f"{name}_cases.safetensors" for name in ("transformer", "vqvae", "scheduler", "pipeline")}
    assert {p.name for p in folder.glob("*.safetensors")} == weights | cases


@pytest.mark.parametrize("folder", muddit_sets())
@torch.no_grad()
def test_vq_model(folder):
    stored, tokenizer = load_file(folder / "vqvae_cases.safetensors"), golden_vq(folder)
    model = tokenizer.model
    latents = model.encode(stored["image"]).latents
    quantized, loss, (_, _, indices) = model.quantize(latents)
    shape = (*stored["random_indices"].shape, latents.shape[1])
    raw = model.decode(stored["random_indices"].flatten(), force_not_quantize=True, shape=shape).sample
    assert torch.equal(indices.reshape(stored["indices"].shape), stored["indices"])
    assert torch.equal(tokenizer.encode(stored["image"]), stored["indices"])
    ours = {
        "latents": latents,
        "quantized": quantized,
        "quantize_loss": loss.reshape(1),
        "decoded": model.decode(latents).sample,
        "random_decoded": raw,
    }
    for name, value in ours.items():
        close(value, stored[name], name, 1e-4)
    # the interface: codes in, pixels in [0, 1] out
    close(tokenizer.decode(stored["random_indices"]), stored["random_decoded"].clamp(0, 1), "decode", 1e-4)
    close(tokenizer.decode(stored["indices"]), stored["decoded"].clamp(0, 1), "decode of encode", 1e-4)
    rest = set(stored) - set(ours) - {"image", "indices", "random_indices"}
    assert not rest, f"stored tensors that nothing compares: {sorted(rest)}"


def scheduler_cases() -> list:
    out = []
    for parameter in muddit_sets():
        if (folder := parameter.values[0]) is None:
            return [pytest.param(None, None, marks=parameter.marks)]
        cases = [n.removesuffix(".in.logits") for n in load_file(folder / "scheduler_cases.safetensors")]
        out += [pytest.param(folder, case, id=case) for case in cases if "." not in case]
    return out


def read_case(folder: Path, case: str) -> tuple[dict, dict[str, Tensor], MaskGitSchedule]:
    """Settings, tensors with positions flattened to L and classes last, and the schedule in compat mode."""
    settings = read_config(folder)["scheduler"][case]
    stored = load_file(folder / "scheduler_cases.safetensors")
    stored = {k.removeprefix(f"{case}."): v for k, v in stored.items() if k.startswith(f"{case}.")}
    if settings["two_dim"]:
        for name in ("in.start_tokens", "out.tokens_per_step", "out.pred_original_per_step"):
            stored[name] = stored[name].flatten(-2)
        stored["in.logits"] = stored["in.logits"].flatten(3).transpose(2, 3)
    temperature, masking = settings["temperature"], settings["masking_schedule"]
    return settings, stored, MaskGitSchedule(settings["num_inference_steps"], temperature, masking, compat=True)


@pytest.mark.parametrize(("folder", "case"), scheduler_cases())
def test_scheduler_steps(folder, case):
    """Every stored intermediate from the reference's random stream; then the same tokens from injected draws."""
    settings, stored, schedule = read_case(folder, case)
    mask_id, start = settings["mask_token_id"], settings["starting_mask_ratio"] or 1.0
    draws = Recorded(settings["generator_seed"])
    tokens, steps = stored["in.start_tokens"], []
    for k in range(schedule.steps):
        steps.append(schedule.step(stored["in.logits"][k], tokens, mask_id, k, draws, start))
        tokens = steps[-1].tokens
    exact = {
        "out.tokens_per_step": torch.stack([s.tokens for s in steps]),
        "out.pred_original_per_step": torch.stack([s.x0 for s in steps]),
        "out.masked_count_per_step": torch.stack([(s.tokens == mask_id).sum(1) for s in steps]),
        "mid.sampled_ids_per_step": torch.stack([s.sampled for s in steps]),
    }
    near = {}
    if schedule.steps > 1:
        exact["mid.remask_per_step"] = torch.stack([s.hidden for s in steps[:-1]])
        exact["mid.mask_len_per_step"] = torch.stack([s.count for s in steps[:-1]])
        near["mid.selected_probs_per_step"] = torch.stack([s.probability for s in steps[:-1]])
        near["mid.gumbel_per_step"] = torch.stack(draws.noise)
        near["mid.temperature_per_step"] = schedule.temperatures()[:-1, None]
    for name, value in exact.items():
        assert torch.equal(value, stored[name]), name
    for name, value in near.items():
        close(value, stored[name], name, 1e-6)
    rest = set(stored) - set(exact) - set(near) - {"in.logits", "in.start_tokens"}
    assert not rest, f"stored tensors that nothing compares: {sorted(rest)}"
    tokens, draws = (
        stored["in.start_tokens"],
        Injected(exact["mid.sampled_ids_per_step"], stored.get("mid.gumbel_per_step")),
    )
    for k in range(schedule.steps):
        tokens = schedule.step(stored["in.logits"][k], tokens, mask_id, k, draws, start).tokens
        assert torch.equal(tokens, stored["out.tokens_per_step"][k])


@pytest.mark.parametrize(("folder", "case"), scheduler_cases())
def test_default_mode_differs_only_in_rows_with_nothing_hidden(folder, case):
    settings, stored, schedule = read_case(folder, case)
    schedule, mask_id = replace(schedule, compat=False), settings["mask_token_id"]
    draws = GeneratorDraws(torch.Generator().manual_seed(settings["generator_seed"]))
    tokens = stored["in.start_tokens"]
    known = ~(tokens == mask_id).any(1)
    for k in range(schedule.steps):
        step = schedule.step(stored["in.logits"][k], tokens, mask_id, k, draws, settings["starting_mask_ratio"] or 1.0)
        tokens = step.tokens
        assert torch.equal(tokens[~known], stored["out.tokens_per_step"][k][~known])
        assert torch.equal(tokens[known], stored["in.start_tokens"][known])


@pytest.mark.parametrize("folder", muddit_sets())
def test_schedule_tables_and_noise(folder):
    stored, config = load_file(folder / "scheduler_cases.safetensors"), read_config(folder)["scheduler"]
    compared = set()
    for name in (n for n in stored if n.startswith("table.")):
        kind, *numbers = name.removeprefix("table.").rsplit("_", 2 if "mask_len" in name else 1)
        steps = int(numbers[0])
        schedule = MaskGitSchedule(steps)
        if kind == "temperatures_scalar":
            ours = MaskGitSchedule(steps, float(stored[name][0])).temperatures()
        elif kind == "cosine_mask_len":
            ours = schedule.planned(int(numbers[1]))
        else:
            ours = {
                "temperatures_pair": schedule.temperatures(),
                "cosine_mask_ratio": schedule.ratios(),
                "timesteps": torch.arange(steps).flip(0),  # counted down; ours are counted up
            }[kind]
        assert torch.equal(ours, stored[name]), name
        compared.add(name)
    for case in (n.removesuffix(".in.tokens") for n in stored if n.endswith(".in.tokens")):
        settings, tokens = config[case], stored[f"{case}.in.tokens"]
        schedule = MaskGitSchedule(settings["num_inference_steps"], masking=settings["masking_schedule"])
        for i, expected in enumerate(stored[f"{case}.out.tokens_per_step"]):
            u = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(settings["generator_seed_first"] + i))
            assert torch.equal(schedule.add_noise(tokens, i, settings["mask_token_id"], u), expected)
        compared |= {f"{case}.in.tokens", f"{case}.out.tokens_per_step"}
    steps = {n for n in stored if f"{n.split('.')[0]}.in.logits" in stored}  # compared by test_scheduler_steps
    assert compared | steps == set(stored)


def image_cases(folder: Path) -> dict[str, dict]:
    cases = read_config(folder)["pipeline"]
    return {name: case for name, case in cases.items() if "text_length" not in case}


@pytest.mark.parametrize("compat", [None, "upstream"])
@pytest.mark.parametrize("folder", muddit_sets())
def test_text_to_image_pipelines(folder, compat):
    stored = load_file(folder / "pipeline_cases.safetensors")
    model, _ = MUDDIT.load(load_file(folder / "transformer.safetensors"), read_config(folder)["transformer"])
    factor, compared = golden_vq(folder).factor, set()
    for name, case in image_cases(folder).items():
        source = name if f"{name}.in.prompt_embeds" in stored else name.split("_")[0]
        keys = ("encoder_hidden_states", "prompt_embeds")
        text = TextFeatures(*(stored[f"{source}.in.{key}"] for key in keys))
        negative = TextFeatures(*(stored[f"{source}.in.negative_{key}"] for key in keys))
        shape = (len(text.pooled), case["height"] // factor, case["width"] // factor)
        seen: list[StepReport] = []
        settings = MudditSettings(
            case["num_inference_steps"], case["guidance_scale"], case["temperature"], compat=compat
        )
        final = generate_image(
            model,
            text,
            torch.full(shape, case["mask_token_id"]),
            settings,
            GeneratorDraws(torch.Generator().manual_seed(case["generator_seed"])),
            factor,
            negative,
            seen.append,
        )
        tokens = torch.stack([report.tokens for report in seen])
        assert torch.equal(tokens, stored[f"{name}.out.tokens_per_step"]), name
        assert torch.equal(final, tokens[-1])
        compared |= {
            f"{name}.out.tokens_per_step",
            *(f"{source}.in.{p}{key}" for key in keys for p in ("", "negative_")),
        }
    texts = {n for n in stored if n.split(".")[0] not in image_cases(folder)}  # compared by the next test
    assert compared | texts == set(stored)


@pytest.mark.parametrize("compat", [None, "upstream"])
@pytest.mark.parametrize("folder", muddit_sets())
def test_question_pipelines(folder, compat):
    stored, config = load_file(folder / "pipeline_cases.safetensors"), read_config(folder)
    model, _ = MUDDIT.load(load_file(folder / "transformer.safetensors"), config["transformer"])
    names = set(config["pipeline"]) - set(image_cases(folder))
    assert names
    for name in names:
        case = config["pipeline"][name]
        here = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        encoder = golden_clip(folder, here["in.mask_token_embedding"])
        assert encoder.mask_id == case["mask_token_id"] and encoder.length == case["text_length"]
        questions = [[i for i in row if i >= 0][:-1] for row in here["in.question_ids_with_bos_eos"].tolist()]
        assert [len(q) for q in questions] == case["question_lengths_without_eos"]
        rows = question_rows(questions, encoder.length, encoder.mask_id)
        settings = MudditSettings(
            case["num_inference_steps"],
            temperature=case["temperature"],
            masking=case["masking_schedule"],
            compat=compat,
        )
        draws = GeneratorDraws(torch.Generator().manual_seed(case["generator_seed"]))
        seen: list[StepReport] = []
        codes = here["in.image_tokens"]
        result = write_text(model, encoder, codes, rows, settings, draws, golden_vq(folder).factor, seen.append)
        exact = {
            "out.tokens_per_step": torch.stack([report.tokens for report in seen]),
            "out.last_logits_argmax": result.last_choice,
            "mid.timestep_per_step": torch.stack([report.time for report in seen]),
        }
        ends = torch.stack([seen[0].text.sequence, seen[-1].text.sequence])
        near = {
            "mid.text_logits_per_step": (torch.stack([report.logits for report in seen]), 1e-3),
            "mid.pooled_per_step": (torch.stack([report.text.pooled for report in seen]), 1e-4),
            "mid.encoder_hidden_states_first_last": (ends, 1e-4),
        }
        for key, value in exact.items():
            assert torch.equal(value, here[key]), key
        for key, (value, tolerance) in near.items():
            close(value, here[key], key, tolerance)
        returned = {f"out.decoded_ids_{i}": result.last_choice[i, len(q) :] for i, q in enumerate(questions)}
        assert all(torch.equal(value, here[key]) for key, value in returned.items())
        if compat:
            assert result.answers == [here[key].tolist() for key in returned]
        else:  # the sampled tokens, up to the end token
            for row, question, answer in zip(result.tokens.tolist(), questions, result.answers, strict=True):
                rest = row[len(question) :]
                assert row[: len(question)] == question and encoder.mask_id not in row
                assert answer == (rest[: rest.index(encoder.end_id)] if encoder.end_id in rest else rest)
        assert torch.equal(codes, load_file(folder / "vqvae_cases.safetensors")["indices"])
        inputs = {"in.image_tokens", "in.mask_token_embedding", "in.question_ids_with_bos_eos"}
        assert set(exact) | set(near) | set(returned) | inputs == set(here)
