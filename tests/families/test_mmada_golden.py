"""MMaDA against every tensor of its golden set: names, forward, prompts, noising, losses, gradients, decoding traces."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from golden import golden_cases
from reference.dynin_tape import Tape, taped_run
from reference.mmada_prompts import MMaDAPrompts, PromptRows, mmada_batch
from reference.mmada_sampling import generate_codes, generate_text
from reference.mmada_training import answer_loss, image_loss, mask_answers, mask_image, training_mask
from safetensors.torch import load_file

from unidiff.decoding.commit.base import quota, take_best
from unidiff.families.layout import DecodeRequest, TaskNeeds
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.mmada import MMADA, ImageSettings, MMaDALayout, image_config, mmada_vocabulary
from unidiff.tokens import Modality

pytestmark = pytest.mark.golden
NAMES = {
    "bos": "bos",
    "eos": "eos",
    "<|soi|>": "soi",
    "<|eoi|>": "eoi",
    "<|sov|>": "sov",
    "<|eov|>": "eov",
    "<|t2i|>": "t2i",
    "<|mmu|>": "mmu",
    "<|t2v|>": "t2v",
    "<|v2v|>": "v2v",
    "<|lvg|>": "lvg",
    "[iPAD]": "ipad",
    "<|r2i|>": "r2i",
    "start_header_id": "start_header",
    "end_header_id": "end_header",
    "eot_id": "eot",
}


class Stored:
    """A golden file that knows which of its tensors were looked at."""

    def __init__(self, path) -> None:
        self.tensors, self.seen = load_file(path), set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.seen.add(name)
        return self.tensors[name]

    def check(self, name: str, actual: torch.Tensor, atol: float = 0.0, rtol: float = 0.0) -> None:
        expected = self[name]
        torch.testing.assert_close(
            actual, expected, atol=atol, rtol=rtol, check_dtype=False, msg=lambda m: f"{name}: {m}"
        )

    def all_seen(self) -> None:
        rest = sorted(set(self.tensors) - self.seen)
        assert not rest, f"stored tensors that nothing compares: {rest}"


class Golden:
    """Model, vocabulary and settings of a folder."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        vocab = self.config["vocab"]
        self.vocabulary = mmada_vocabulary(
            vocab["new_vocab_size"],
            vocab["image_token_offset"],
            vocab["codebook_size"],
            vocab["mask"],
            {ours: vocab[theirs] for theirs, ours in NAMES.items()},
        )
        self.fields = {**self.config["model"], "new_vocab_size": vocab["new_vocab_size"]}
        self.weights = load_file(folder / "weights.safetensors")
        self.model, _ = MMADA.load(self.weights, self.fields, vocabulary=self.vocabulary)
        self.prompts = MMaDAPrompts(self.vocabulary, self.config["max_text_len"], overflow="cut")

    def read(self, name: str) -> Stored:
        return Stored(self.folder / f"{name}.safetensors")

    def files(self, pattern: str) -> list[str]:
        return sorted(path.stem for path in self.folder.glob(pattern))


@pytest.fixture(scope="module", params=golden_cases("mmada"), ids=lambda f: getattr(f, "name", "absent"))
def golden(request) -> Golden:
    return Golden(request.param)


def test_no_file_of_the_set_is_left_unread(golden):
    known = {"config.json", "README.md", *(f"{n}.safetensors" for n in ("weights", "forward", "prompts", "masking"))}
    known |= {"losses.safetensors", *(f"{stem}.safetensors" for stem in golden.files("t2i_*") + golden.files("mmu_*"))}
    assert {path.name for path in golden.folder.iterdir()} == known
    assert {f"t2i_{name}" for name in golden.config["t2i_cases"]} == set(golden.files("t2i_*"))
    assert {f"mmu_{name}" for name in golden.config["mmu_cases"]} == set(golden.files("mmu_*"))


def test_every_weight_maps_both_ways(golden):
    back = MMADA.export(golden.model)
    assert set(back) == set(golden.weights)
    for name, value in golden.weights.items():
        assert torch.equal(back[name], value), name


@torch.no_grad()
def test_forward_with_and_without_a_mask(golden):
    stored = golden.read("forward")
    ids, visible = stored["input_ids"], stored["pair_mask_source"].bool()
    stored.check("logits_no_mask", golden.model(mmada_batch(ids, golden.vocabulary)), atol=1e-4)
    masked = golden.model(mmada_batch(ids, golden.vocabulary, visible))
    # a padding query sees nothing here and everything alike upstream; nothing reads its logits
    torch.testing.assert_close(masked[visible], stored["logits_bool_mask"][visible], atol=1e-4, rtol=0)
    stored.all_seen()


def test_prompts(golden):
    stored, noisy = golden.read("prompts"), golden.read("masking")
    texts, prompts = golden.config["prompt_texts"], golden.prompts
    n, total = golden.config["num_vq_tokens"], stored.tensors["lm_ids"].shape[1]

    def check(name: str, rows: PromptRows) -> None:
        parts = {"ids": rows.ids, "labels": rows.labels, "mask": rows.visible, "prompt_mask": rows.prompt}
        for part, value in parts.items():
            if f"{name}_{part}" in stored.tensors:
                stored.check(f"{name}_{part}", value.to(stored.tensors[f"{name}_{part}"].dtype))

    image, labels = noisy["masked_image_tokens"], noisy["labels"]
    everything = torch.ones(len(image), dtype=torch.bool)
    hidden = torch.full_like(image, golden.vocabulary.image_mask)
    check("t2i", prompts.text_to_image(texts["t2i"], image, labels))
    check("t2i_dropped", prompts.text_to_image(texts["t2i"], image, labels, everything))
    check("t2i_gen", prompts.text_to_image(texts["t2i"], hidden))
    check("uncond_gen", prompts.text_to_image([[]] * len(image), hidden))
    check("mmu", prompts.understanding(stored["mmu_image_ids"], texts["mmu"]))
    check("lm", prompts.text(texts["lm"], total))
    check("lm_chat", prompts.text(texts["lm_chat"], total))
    check("r2i", prompts.reasoning_to_image(texts["r2i"], stored["r2i_image_ids"]))
    assert image.shape[1] == n
    stored.all_seen()


def test_masking(golden):
    stored = golden.read("masking")
    noisy = mask_image(
        stored["image_tokens"],
        stored["u_timestep"],
        stored["u_perm"],
        golden.vocabulary.image_mask,
        golden.config["min_masking_rate"],
    )
    stored.check("mask_prob", noisy.rate, atol=1e-6)
    stored.check("masked_image_tokens", noisy.ids)
    stored.check("labels", noisy.labels)
    stored.all_seen()


def test_losses_and_gradients(golden):
    stored = golden.read("losses")
    mask_id, first = golden.vocabulary.mask_id, golden.config["max_text_len"] + 1
    n_t2i, n_lm, n_mmu = stored["batch_sizes_t2i_lm_mmu"].tolist()
    ids, labels = stored["input_ids"], stored["labels"]
    parts = {"lm": slice(n_t2i, n_t2i + n_lm), "mmu": slice(n_t2i + n_lm, n_t2i + n_lm + n_mmu)}
    # 1. the rows, rebuilt from the clean ones
    noisy = {}
    for name, rows in parts.items():
        clean, prompt = stored[f"clean_{name}_ids"], stored[f"prompt_mask_{name}"]
        noisy[name] = mask_answers(clean, prompt, stored[f"u_t_{name}"], stored[f"u_mask_{name}"], mask_id)
        assert torch.equal(noisy[name].ids, ids[rows]), name
        stored.check(f"p_mask_{name}", noisy[name].p_mask[:, None].expand(clean.shape), atol=1e-6)
        stored.check(f"answer_lengths_{name}", noisy[name].answer_length[:, None].expand(clean.shape))
    # 2. forward with the bias that upstream trains with: padding weakened, not hidden
    model = golden.model.train()
    visible = torch.ones_like(ids)
    visible[:n_t2i] = stored["t2i_masks"]

    def logits_of(rows: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        batch = mmada_batch(rows, golden.vocabulary)
        return model.head(model.hidden(rows, batch.modality, batch.positions, training_mask(seen, float_bias=True)))

    logits = logits_of(ids, visible)
    stored.check("logits", logits, atol=1e-4)
    # 3. losses
    t2i = image_loss(logits[:n_t2i], labels[:n_t2i], first, markers=True)
    answers = {}
    for name, rows in parts.items():
        masked = ids[rows] == mask_id
        answers[name] = answer_loss(logits[rows], labels[rows], masked, noisy[name].p_mask, noisy[name].answer_length)
        if f"loss_{name}_without_answer_lengths" in stored.tensors:
            plain = answer_loss(logits[rows], labels[rows], masked, noisy[name].p_mask)
            stored.check(f"loss_{name}_without_answer_lengths", plain, rtol=1e-5)
        for key in (f"loss_{name}", f"loss_{name}_in_r2i_call"):
            stored.check(key, answers[name], rtol=1e-5)
    for key in ("loss_t2i", "loss_t2i_in_r2i_call"):
        stored.check(key, t2i, rtol=1e-5)
    coefficients = golden.config["loss_coeffs"]
    total = coefficients["t2i"] * t2i + sum(coefficients[name] * loss for name, loss in answers.items())
    stored.check("loss_total", total, rtol=1e-5)
    r2i_ids, lengths = stored["r2i_input_ids"], stored["answer_lengths_r2i"][:, 0]
    r2i = answer_loss(
        logits_of(r2i_ids, torch.ones_like(r2i_ids)),
        stored["r2i_labels"],
        r2i_ids == mask_id,
        stored["p_mask_r2i"][:, 0],
        lengths,
    )
    stored.check("loss_r2i", r2i, rtol=1e-5)
    # 4. gradients, under released names
    model.zero_grad()
    total.backward()
    check_gradients(golden, stored)
    model.zero_grad(set_to_none=True)
    model.eval()
    stored.all_seen()


def check_gradients(golden: Golden, stored: Stored) -> None:
    ours = {name: value.grad for name, value in golden.model.named_parameters()}
    norm = torch.stack([g.norm() for g in ours.values()]).norm()
    stored.check("grad_norm_total", norm, rtol=1e-4)
    theirs = golden_names(golden, ours)
    for name in [n for n in stored.tensors if n.startswith("grad.")]:
        expected = stored[name]
        gap = (theirs[name.removeprefix("grad.")] - expected).norm() / expected.norm()
        assert gap < 1e-4, f"{name}: relative error {gap:.2e}"


def golden_names(golden: Golden, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients under released names, through the same name map as weights."""
    apart = {name: value.clone() for name, value in golden.weights.items()}
    carrier, _ = MMADA.load(apart, golden.fields, vocabulary=golden.vocabulary)
    carrier.load_state_dict(ours)
    return MMADA.export(carrier)


def test_image_traces(golden):
    vocabulary = golden.vocabulary
    for name, case in golden.config["t2i_cases"].items():
        stored = golden.read(f"t2i_{name}")
        batch = mmada_batch(stored["input_ids"], vocabulary, stored["attention_mask"])
        unconditional = mmada_batch(stored["uncond_input_ids"], vocabulary, stored["uncond_attention_mask"])
        uniform, exponential = stored["noise.mask_uniform"], stored["noise.sample_exp"]
        settings = ImageSettings(case["timesteps"], case["guidance_scale"], case["temperature"], case["noise_schedule"])
        steps = []
        codes = generate_codes(
            golden.model,
            vocabulary,
            batch,
            unconditional if case["guidance_scale"] > 0 else None,
            settings,
            draw=lambda s, p: (p / exponential[s].reshape(p.shape)).argmax(-1),  # noqa: B023
            choice=lambda s: -torch.log(-torch.log(uniform[s])),  # noqa: B023
            observe=steps.append,
        )
        stored.check("final_codes", codes)
        stored.check("image_probs", torch.stack([s.probabilities for s in steps]), atol=1e-4)
        stored.check("selected_probs", torch.stack([s.selected for s in steps]), atol=1e-4)
        stored.check("mask_len", torch.stack([s.keep for s in steps]).float())
        stored.check("masking", torch.stack([s.masked for s in steps]))
        stored.check("step_temperature", torch.tensor([s.temperature for s in steps]), atol=1e-6)
        inputs = torch.stack([s.inputs for s in steps])
        expected = stored["model_input_trace"]
        assert torch.equal(expected[:, : len(codes)], inputs), name
        if case["guidance_scale"] > 0:
            image = batch.modality[0] == 1
            assert torch.equal(expected[:, len(codes) :, image], inputs[..., image]), name
            assert torch.equal(
                expected[:, len(codes) :, ~image], unconditional.ids[:, ~image].expand(len(inputs), -1, -1)
            )
        first = stored["step0_raw_logits"]
        rows = [batch, unconditional] if len(first) > len(codes) else [batch]
        with torch.no_grad():
            logits = torch.cat([golden.model(b) for b in rows])
        seen = torch.cat([b.valid for b in rows])  # padding queries: see the forward test
        torch.testing.assert_close(logits[seen], first[seen], atol=1e-4, rtol=0)
        stored.all_seen()


def test_image_traces_through_the_sampler(golden):
    """`compat="upstream"`: the counts and the noise of the program, in the package's own decode."""
    layout = MMaDALayout(golden.vocabulary, lambda text: [], compat="upstream")
    for name, case in golden.config["t2i_cases"].items():
        stored = golden.read(f"t2i_{name}")
        batch = mmada_batch(stored["input_ids"], golden.vocabulary, stored["attention_mask"])
        away = mmada_batch(stored["uncond_input_ids"], golden.vocabulary, stored["uncond_attention_mask"])
        settings = ImageSettings(case["timesteps"], case["guidance_scale"], case["temperature"], case["noise_schedule"])
        config, picture = image_config(settings), batch.modality == Modality.IMAGE
        away = away.replace(ids=torch.where(picture, batch.ids, away.ids), given=away.given | (picture & batch.given))
        request = DecodeRequest(batch, config, TaskNeeds(), ~picture, picture, (away,), drawn=True)
        pipe, places = SimpleNamespace(transformer=golden.model), picture[0].nonzero()[:, 0]
        maker = layout.prepared(pipe, request, config, torch.zeros(len(batch.ids))).rules[Modality.IMAGE]
        exponential = stored["noise.sample_exp"].unflatten(1, (len(batch.ids), len(places)))
        tape = Tape(places, exponential, maker.start, stored["noise.mask_uniform"])
        out, seen = taped_run(golden.model, layout, request, config, {Modality.IMAGE: tape})
        assert len(seen) == len(tape.passes) == case["timesteps"]
        codes = out.batch.ids[picture].view(len(batch.ids), -1) - golden.vocabulary.image[0]
        assert torch.equal(codes, stored["final_codes"]), name
        valid = torch.cat([batch.valid, away.valid][: len(seen[0]) // len(codes)])
        for number, (ids, own) in enumerate(zip(seen, tape.passes, strict=True)):
            assert torch.equal(ids[valid], stored["model_input_trace"][number][valid]), (name, number)
            sure = torch.where(own.masked, stored["selected_probs"][number], 0.0)
            torch.testing.assert_close(own.probability.float(), sure, atol=1e-4, rtol=0)
            if number + 1 < len(seen):
                assert torch.equal(own.masked & ~own.picked, stored["masking"][number]), (name, number)


def test_text_traces_through_the_sampler(golden):
    drawn = {name for name, case in golden.config["mmu_cases"].items() if case["temperature"] > 0}
    for name, case in golden.config["mmu_cases"].items():
        if name in drawn:
            continue  # its noise is [B, L, V]: see the next test
        stored = golden.read(f"mmu_{name}")
        assert case["remasking"] == "low_confidence"
        prompt = stored["input_ids"]
        rows, new = len(prompt), case["max_new_tokens"]
        ids = torch.cat((prompt, prompt.new_full((rows, new), case["mask_id"])), dim=1)
        visible = stored["attention_mask"] if "attention_mask" in stored.tensors else torch.ones_like(ids)
        batch = mmada_batch(ids, golden.vocabulary, visible)
        config = llada_sampler(
            golden.vocabulary, case["steps"], case["block_length"], case["temperature"], case["cfg_scale"]
        )
        out = generate_text(golden.model, golden.vocabulary, batch, torch.arange(rows), config, record=True)
        trace = torch.stack(out.trajectory)
        expected = stored["model_input_trace"]
        assert torch.equal(expected[:, :rows], trace[:-1]), name
        if case["cfg_scale"] > 0:
            blind = torch.where(batch.given, case["mask_id"], trace[:-1])
            assert torch.equal(expected[:, rows:], blind), name
        stored.check("output_ids", out.batch.ids)
        stored.all_seen()


@torch.no_grad()
def test_text_traces_with_noise(golden):
    drawn = {name: case for name, case in golden.config["mmu_cases"].items() if case["temperature"] > 0}
    assert drawn
    for name, case in drawn.items():
        stored = golden.read(f"mmu_{name}")
        prompt, u = stored["input_ids"], stored["noise.uniform_float64"]
        new, length, mask_id = case["max_new_tokens"], case["block_length"], case["mask_id"]
        ids = torch.cat((prompt, prompt.new_full((len(prompt), new), mask_id)), dim=1)
        trace, step = [], 0
        for start in range(prompt.shape[1], ids.shape[1], length):
            passes = case["steps"] // (new // length)
            for left in range(passes, 0, -1):
                trace.append(ids)
                logits = golden.model(mmada_batch(ids, golden.vocabulary))
                pick = (logits.double().exp() / (-u[step].log()) ** case["temperature"]).argmax(-1)
                sure = logits.double().softmax(-1).gather(-1, pick[..., None])[..., 0]
                open_ = ids == mask_id
                open_[:, start + length :] = False
                done = torch.full_like(open_[:, 0].long(), passes - left)
                count = quota("fixed", torch.full_like(done, length), open_.sum(1), done, torch.full_like(done, passes))
                ids = torch.where(take_best(sure, open_, count), pick, ids)
                step += 1
        stored.check("model_input_trace", torch.stack(trace))
        stored.check("output_ids", ids)
        stored.all_seen()
