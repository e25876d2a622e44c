"""Muddit's VQ model, text encoder, scheduler and pipelines against the reference: every stored tensor is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from muddit_parts import golden_clip, golden_vq, muddit_sets, read_config
from reference.maskgit import GeneratorDraws, MaskGitSchedule
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding import Guidance, ModalityDecoding, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.draw import CHOICE, TOKEN, RowNoise
from unidiff.families.muddit import MUDDIT
from unidiff.families.muddit.denoiser import MudditDenoiser, TextFeatures
from unidiff.families.muddit.rows import MaskGit
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

pytestmark = pytest.mark.golden


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
    return settings, stored, MaskGitSchedule(settings["num_inference_steps"], temperature, masking)


@pytest.mark.parametrize(("folder", "case"), scheduler_cases())
def test_scheduler_steps(folder, case, monkeypatch):
    """Every stored intermediate by the reference's scheduler; then the same tokens by the sampler with its rule."""
    settings, stored, schedule = read_case(folder, case)
    mask_id, start = settings["mask_token_id"], settings["starting_mask_ratio"] or 1.0
    draws, noise = GeneratorDraws(settings["generator_seed"]), []
    monkeypatch.setattr(draws, "gumbel", lambda *args: noise.append(GeneratorDraws.gumbel(draws, *args)) or noise[-1])
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
        near["mid.gumbel_per_step"] = torch.stack(noise)
        near["mid.temperature_per_step"] = schedule.temperatures()[:-1, None]
    for name, value in exact.items():
        assert torch.equal(value, stored[name]), name
    for name, value in near.items():
        close(value, stored[name], name, 1e-6)
    rest = set(stored) - set(exact) - set(near) - {"in.logits", "in.start_tokens"}
    assert not rest, f"stored tensors that nothing compares: {sorted(rest)}"


class Recorded:
    """Noise that makes the sampler draw what the reference drew: its multinomial and uniform numbers, from its generator.

    Args:
        probabilities: of the coming draw, float32 `[B, N, C]`, at the positions `where` `[N]` of a row.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, where: Tensor, probabilities) -> None:
        self.draws, self.where, self.probabilities = GeneratorDraws(seed), where, probabilities
        drawn = RowNoise.__call__
        monkeypatch.setattr(RowNoise, "__call__", lambda noise, step, use: self.uniform(drawn(noise, step, use), use))

    def uniform(self, drawn: Tensor, use: int) -> Tensor:
        u = torch.full_like(drawn, 0.5)
        if use == TOKEN:
            p = self.probabilities()
            token, rows = self.draws.tokens(p, 0)[..., None], len(u)
            cdf = p.double().cumsum(-1)
            u[:, self.where] = (cdf.gather(-1, token) - p.double().gather(-1, token) / 2)[-rows:, :, 0]
            self.choice = self.draws.uniform(len(p), len(self.where))  # the reference draws them in every step
        if use == CHOICE:
            u[:, self.where] = self.choice.double()[-len(u) :]
        return u


class Stored:
    """A denoiser whose logits `[B, L, C]` are those of a case, pass by pass: features are logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.passes = logits, 0

    def hidden(self, ids, modality, positions, attention_mask=None, time=None) -> Tensor:
        self.passes += 1
        return self.logits[self.passes - 1, -len(ids) :]

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return hidden[..., start:stop]


@pytest.mark.parametrize(("folder", "case"), scheduler_cases())
def test_scheduler_cases_by_the_sampler(folder, case, monkeypatch):
    """The last rows of a case, those with enough hidden that the sampler's promise of a token per pass is kept."""
    settings, stored, schedule = read_case(folder, case)
    tokens, logits, mask_id = stored["in.start_tokens"], stored["in.logits"], settings["mask_token_id"]
    if isinstance(settings["temperature"], float):
        pytest.skip("a temperature that ends at 0.01 is the scheduler's default, which no pipeline uses")
    (length, classes), steps, first = logits.shape[2:], schedule.steps, float(settings["temperature"][0])
    enough = (tokens == mask_id).sum(1) >= steps
    rows = int(enough.flip(0).long().cumprod(0).sum())
    if not rows:
        pytest.skip("rows with fewer hidden than steps: the sampler commits one in every pass")
    hidden = tokens[-rows:] == mask_id
    vocabulary, averaged = (
        Vocabulary(classes + 1, (0, classes), (classes, classes), classes),
        settings["starting_mask_ratio"],
    )
    batch = TokenBatch.from_spans(
        [[Span.text(t.masked_fill(h, 0), ~h)] for t, h in zip(tokens[-rows:], hidden, strict=True)]
    )
    model = Stored(logits)
    Recorded(
        monkeypatch, settings["generator_seed"], torch.arange(length), lambda: logits[model.passes - 1].softmax(-1)
    )
    decoding = ModalityDecoding(steps=steps, schedule=schedule.masking, choice_temperature=first)
    rule = MaskGit(steps, 0, schedule.masking, upstream=length, text=averaged is None, temperature=first)
    config = SamplerConfig(text=decoding, stop_at_eos=False)
    sampler = Sampler(model, vocabulary, config, rules={Modality.TEXT: rule})
    out = sampler(batch, torch.zeros(rows, dtype=torch.long), record=True)
    states = torch.stack(out.trajectory[1:])
    assert torch.equal(states.where(states < classes, mask_id), stored["out.tokens_per_step"][:, -rows:])


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


class Traced(MudditDenoiser):
    """Muddit in the sampler, with given text features where there are any; keeps what the network saw and said.

    Args:
        given: features of the conditional stream, then of the unconditional one.
    """

    def __init__(self, *parts, given: list[TextFeatures] | None = None, **more) -> None:
        super().__init__(*parts, **more)
        encoder = self.encoder
        self.encoder = (
            self.read if given is None else lambda ids: TextFeatures(*map(torch.cat, zip(*given, strict=True)))
        )
        self.clip, self.texts, self.times, self.features = encoder, [], [], []
        inner, of_cells = self.model.features, self.model.features_of_cells

        def features(codes, text, pooled, micro, time):
            self.texts.append(TextFeatures(text, pooled))
            self.times.append(time)
            self.features.append(inner(codes, text, pooled, micro, time))
            return self.features[-1]

        self.model.features = features
        self.model.features_of_cells = lambda *inputs: (features(*inputs[:-1]), of_cells(*inputs))[1]

    def read(self, ids: Tensor) -> TextFeatures:
        return self.clip(ids)


def decode(model: Traced, monkeypatch, case: dict, batch: TokenBatch, target: Modality, logits) -> SamplerOutput:
    """A case by the sampler with the reference's rule and its random stream; `logits()` `[B, N, C]` of the last pass."""
    steps, where = case["num_inference_steps"], (batch.modality[0] == target).nonzero()[:, 0]
    scale = case.get("guidance_scale", 1.0)
    Recorded(monkeypatch, case["generator_seed"], where, lambda: logits().softmax(-1))
    schedule, first = case.get("masking_schedule", "cosine"), float(case["temperature"][0])
    decoding = ModalityDecoding(steps=steps, schedule=schedule, choice_temperature=first)
    rule = MaskGit(steps, 0, schedule, upstream=len(where), text=target == Modality.TEXT, temperature=first)
    config = SamplerConfig(decoding, decoding, Guidance(scale), stop_at_eos=False)
    sampler = Sampler(model, model.vocabulary, config, rules={target: rule})
    others = batch if scale != 1 else None
    return sampler(batch, torch.zeros(len(batch.ids), dtype=torch.long), record=True, unconditional=others)


def image_cases(folder: Path) -> dict[str, dict]:
    cases = read_config(folder)["pipeline"]
    return {name: case for name, case in cases.items() if "text_length" not in case}


@pytest.mark.parametrize("folder", muddit_sets())
def test_text_to_image_pipelines(folder, monkeypatch):
    stored = load_file(folder / "pipeline_cases.safetensors")
    factor, compared = golden_vq(folder).factor, set()
    for name, case in image_cases(folder).items():
        model, vocabulary = MUDDIT.load(
            load_file(folder / "transformer.safetensors"), read_config(folder)["transformer"]
        )
        source = name if f"{name}.in.prompt_embeds" in stored else name.split("_")[0]
        keys = ("encoder_hidden_states", "prompt_embeds")
        text = TextFeatures(*(stored[f"{source}.in.{key}"] for key in keys))
        negative = TextFeatures(*(stored[f"{source}.in.negative_{key}"] for key in keys))
        rows, length = text.sequence.shape[:2]
        scale, guided = case["guidance_scale"], case["guidance_scale"] > 1
        given = [text, TextFeatures(*(x.expand(rows, *x.shape[1:]) for x in negative))] if guided else [text]
        wrapped = Traced(model, None, vocabulary, case["num_inference_steps"], factor=factor, given=given)
        shape = case["height"] // factor, case["width"] // factor
        row = [Span.text([0] * length, True), Span.masked_image(shape, vocabulary)]

        def logits(wrapped=wrapped, guided=guided, scale=scale) -> Tensor:
            found = wrapped.model.image_head(wrapped.features[-1].image).flatten(1, 2)
            if not guided:
                return found
            conditional, without = found.chunk(2)
            return without + scale * (conditional - without)

        out = decode(wrapped, monkeypatch, case, TokenBatch.from_spans([row] * rows), Modality.IMAGE, logits)
        codes = torch.stack(out.trajectory[1:])[..., length:].unflatten(-1, shape) - vocabulary.image[0]
        assert model.config.vocab_size - 1 == case["mask_token_id"]
        assert torch.equal(codes, stored[f"{name}.out.tokens_per_step"]), name
        compared |= {
            f"{name}.out.tokens_per_step",
            *(f"{source}.in.{p}{key}" for key in keys for p in ("", "negative_")),
        }
    texts = {n for n in stored if n.split(".")[0] not in image_cases(folder)}  # compared by the next test
    assert compared | texts == set(stored)


@pytest.mark.parametrize("folder", muddit_sets())
def test_question_pipelines(folder, monkeypatch):
    stored, config = load_file(folder / "pipeline_cases.safetensors"), read_config(folder)
    names = set(config["pipeline"]) - set(image_cases(folder))
    assert names
    for name in names:
        model, vocabulary = MUDDIT.load(load_file(folder / "transformer.safetensors"), config["transformer"])
        case = config["pipeline"][name]
        here = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        encoder = golden_clip(folder, here["in.mask_token_embedding"])
        assert encoder.mask_id == case["mask_token_id"] and encoder.length == case["text_length"]
        questions = [[i for i in row if i >= 0][:-1] for row in here["in.question_ids_with_bos_eos"].tolist()]
        assert [len(q) for q in questions] == case["question_lengths_without_eos"]
        factor, length, codes = golden_vq(folder).factor, encoder.length, here["in.image_tokens"]
        wrapped = Traced(model, encoder, vocabulary, case["num_inference_steps"], factor=factor)
        rows = [
            [
                Span.text(torch.tensor(q + [0] * (length - len(q))), torch.arange(length) < len(q)),
                Span.image(image + vocabulary.image[0], True),
            ]
            for q, image in zip(questions, codes, strict=True)
        ]

        def logits(wrapped=wrapped) -> Tensor:
            return wrapped.model.text_head(wrapped.features[-1].text)

        out = decode(wrapped, monkeypatch, case, TokenBatch.from_spans(rows), Modality.TEXT, logits)
        last_choice = logits().argmax(-1)
        exact = {
            "out.tokens_per_step": torch.stack(out.trajectory[1:])[..., :length],
            "out.last_logits_argmax": last_choice,
            "mid.timestep_per_step": torch.stack([time[:1] for time in wrapped.times]),
        }
        ends = torch.stack([wrapped.texts[0].sequence, wrapped.texts[-1].sequence])
        words = torch.stack([wrapped.model.text_head(features.text) for features in wrapped.features])
        near = {
            "mid.text_logits_per_step": (words, 1e-3),
            "mid.pooled_per_step": (torch.stack([text.pooled for text in wrapped.texts]), 1e-4),
            "mid.encoder_hidden_states_first_last": (ends, 1e-4),
        }
        for key, value in exact.items():
            assert torch.equal(value, here[key]), key
        for key, (value, tolerance) in near.items():
            close(value, here[key], key, tolerance)
        # what the reference returns is not what it sampled, but the likeliest ids of the last pass
        returned = {f"out.decoded_ids_{i}": last_choice[i, len(q) :] for i, q in enumerate(questions)}
        assert all(torch.equal(value, here[key]) for key, value in returned.items())
        assert torch.equal(codes, load_file(folder / "vqvae_cases.safetensors")["indices"])
        inputs = {"in.image_tokens", "in.mask_token_embedding", "in.question_ids_with_bos_eos"}
        assert set(exact) | set(near) | set(returned) | inputs == set(here)
