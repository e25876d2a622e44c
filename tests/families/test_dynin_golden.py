"""Dynin-Omni against every tensor of its golden set: the one sampler with recorded draws, on the rows of the layout."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import absent_set, golden_cases, golden_folders
from golden_pipelines import write_golden_pipeline
from PIL import Image
from reference.dynin_prompts import IGNORED, DyninPrompts, DyninRows
from reference.dynin_tape import Tape, taped_run
from reference.mmada_prompts import mmada_batch
from safetensors.torch import load_file
from torch import Tensor

from unidiff.decoding.commit.base import Quota
from unidiff.families.dynin import DYNIN, SPECIALS, dynin_vocabulary
from unidiff.families.dynin.rows import DyninLayout
from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.families.mmada import ImageSettings, image_config
from unidiff.families.upstream_order import UpstreamQuota
from unidiff.tokens import Modality, Vocabulary

pytestmark = pytest.mark.golden
LOGITS, GUIDED, SHARES = (dict(atol=a, rtol=0.0) for a in (5e-5, 5e-4, 1e-4))
SETS = pytest.mark.parametrize("folder", golden_cases("dynin", having="weights.safetensors"))
IMAGE_PASSES = ("guided_logits", "sampled_codes", "selected_probs", "unknown", "kept_masked")


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def vocabulary_of(folder: Path) -> Vocabulary:
    ids = settings_of(folder)["tokens"]
    named = {name.strip("<|>[]").replace("/", "end_").lower(): i for name, i in ids["reserved"].items()}
    named |= {"bos": ids["bos"], "eos": ids["eos"], "eot": ids["eot_id"]}
    named |= {name: ids[f"{name}_id"] for name in ("start_header", "end_header")}
    assert set(named) == set(SPECIALS)
    sizes = ids["new_vocab_size"], ids["image_token_offset"], ids["codebook_size"], ids["speech_codebook_size"]
    vocabulary = dynin_vocabulary(*sizes, ids["mask"], named)
    assert vocabulary.others["speech"][0] == ids["speech_token_offset"]
    return vocabulary


@lru_cache(maxsize=4)
def load(folder: Path) -> tuple[Any, Vocabulary]:
    config, vocabulary = settings_of(folder), vocabulary_of(folder)
    fields = {**config["model"], "new_vocab_size": config["tokens"]["new_vocab_size"], "model_type": "dynin_omni"}
    return DYNIN.load(load_file(folder / "weights.safetensors"), fields, vocabulary=vocabulary)


def cases(kind: str) -> list[Any]:
    found = [f for f in golden_folders("dynin") if (f / "weights.safetensors").exists()]
    names = [(f, name) for f in found for name in settings_of(f)["cases"] if name.startswith(kind)]
    return [pytest.param(f, n, id=f"{f.name}-{n}") for f, n in names] or [absent_set("dynin", None)]


class AnyShape(DyninLayout):
    """Pictures are lines of codes: rows tell their number alone."""

    def check_shapes(self, inputs: TaskInputs) -> None:
        pass


def layout_of(folder: Path, **more: Any) -> DyninLayout:
    """Texts are ids with spaces between."""
    vocabulary, length = vocabulary_of(folder), settings_of(folder)["max_text_len"]
    return AnyShape(vocabulary, lambda text: [int(i) for i in text.split()], length, **more)


@SETS
def test_every_file_is_a_case(folder):
    config = settings_of(folder)
    files = {path.stem for path in folder.glob("*.safetensors")} - {"weights", "forward", "prompts"}
    assert files == set(config["cases"])
    assert config["text_part"] == config["max_text_len"] + 1


@SETS
def test_every_weight_maps_both_ways(folder):
    stored = load_file(folder / "weights.safetensors")
    back = DYNIN.export(load(folder)[0])
    assert set(back) == set(stored)
    assert all(torch.equal(back[name], value) for name, value in stored.items())


@SETS
@torch.no_grad()
def test_forward(folder):
    (model, vocabulary), stored = load(folder), load_file(folder / "forward.safetensors")
    ids, visible = stored["input_ids"].long(), stored["pair_mask_source"].bool()
    torch.testing.assert_close(model(mmada_batch(ids, vocabulary)), stored["logits_no_mask"], **LOGITS)
    masked = model(mmada_batch(ids, vocabulary, visible))
    torch.testing.assert_close(masked[visible], stored["logits_bool_mask"][visible], **LOGITS)


def check_rows(stored: dict[str, Tensor], name: str, rows: DyninRows) -> None:
    assert torch.equal(stored[f"{name}.ids"].long(), rows.ids), name
    assert torch.equal(stored[f"{name}.mask"].bool(), rows.visible), name
    if f"{name}.labels" in stored:
        assert torch.equal(stored[f"{name}.labels"].long(), rows.labels), name


@SETS
def test_prompts(folder):
    config, vocabulary, stored = settings_of(folder), vocabulary_of(folder), load_file(folder / "prompts.safetensors")
    texts, order = config["prompt_texts"], config["prompt_order"]
    prompts, said = DyninPrompts(vocabulary, config["text_part"]), [texts[name] for name in order]
    source = stored["source_tokens"].long()
    hidden = torch.full((len(source), config["num_vq_tokens"]), vocabulary.mask_id)
    nothing = torch.full_like(hidden, IGNORED)
    check_rows(stored, "t2i_gen", prompts.t2i(said, hidden))
    empty = len(stored["t2i_gen_empty.ids"])
    check_rows(stored, "t2i_gen_empty", prompts.t2i([[]] * empty, hidden[:empty]))
    check_rows(stored, "t2i_train", prompts.t2i(said, hidden, stored["t2i_train.labels"][:, -1 - hidden.shape[1] : -1]))
    edited = [texts[name] for name in ("short", "mid", "over", "short")]
    check_rows(stored, "i2i", prompts.i2i(edited, source, hidden, nothing))
    check_rows(stored, "i2i_gen", prompts.i2i_gen(said, source, hidden))
    answers = [texts[name] for name in ("tgt", "tgt2", "over", "tgt")]
    check_rows(stored, "ti2ti_gen", prompts.ti2ti_gen(said, answers, source, hidden))
    codes, labels = stored["ti2ti_train.image_tokens"].long(), stored["ti2ti_train.image_labels"].long()
    trained = prompts.ti2ti_train(said, answers, source, codes, labels, stored["ti2ti_train.target_mask"])
    check_rows(stored, "ti2ti_train", trained)


def words_in(row: Tensor, vocabulary: Vocabulary) -> str:
    """The words between bos and eos of a row, which the layout is given back."""
    ids, s = row.tolist(), vocabulary.specials
    start = ids.index(s["bos"])
    return " ".join(map(str, ids[start + 1 : ids.index(s["eos"], start)]))


def codes_in(ids: Tensor, vocabulary: Vocabulary, count: int) -> Tensor:
    """Codes `[B, 1, n]` of the first picture of rows, which begins behind the mark of the task and soi."""
    return (ids[:, 2 : 2 + count].long() - vocabulary.image[0])[:, None]


def same_rows(own: Tensor, valid: Tensor, ids: Tensor, visible: Tensor) -> None:
    """Rows of the layout, without the padding that all of them have in front, are the stored ones."""
    width = own.shape[1]
    assert not bool(visible[:, :-width].any())
    assert torch.equal(valid, visible[:, -width:].bool())
    assert torch.equal(own[valid], ids[:, -width:].long()[valid])


def request_of(folder: Path, name: str, stored: dict[str, Tensor]) -> tuple[DyninLayout, DecodeRequest]:
    """The layout and its rows for a case; they are the stored ones."""
    config, vocabulary = settings_of(folder), vocabulary_of(folder)
    case, task = config["cases"][name], name.partition("_")[0]
    cut = case.get("prefix_cut", 0)
    layout = layout_of(folder, compat="upstream", cuts=(cut, cut))
    ids = stored["input_ids"]
    given: dict[str, Any] = {"texts": [words_in(row, vocabulary) for row in ids], "grid": (1, config["num_vq_tokens"])}
    if task != "t2i":
        given |= {"codes": codes_in(ids, vocabulary, config["num_source_tokens"])}
    if task == "ti2ti":
        given |= {"told": True, "longest": config["text_part"]}
    method = "text_to_image" if task == "t2i" else "edit"
    request = layout.request(method, TaskInputs(len(ids), **given))
    same_rows(request.batch.ids, request.batch.valid, ids, stored["attention_mask"])
    if "uncond_input_ids" in stored:
        (away,) = request.unconditional
        visible = stored["uncond_attention_mask"]
        same_rows(away.ids, away.valid, upstream_start(stored, cut), visible)
    return layout, request


def upstream_start(stored: dict[str, Tensor], cut: int) -> Tensor:
    """Ids of the unconditional rows in the first pass: their own up to the cut, the conditional ones from there on."""
    own, other = stored["uncond_input_ids"], stored["input_ids"]
    return own if not cut else torch.where(torch.arange(own.shape[1]) < cut, own, other)


@pytest.mark.parametrize(("folder", "name"), cases("t2i") + cases("i2i"))
def test_pictures(folder, name):
    """Both what upstream runs and what it would run with the right cut, which is the default here."""
    (model, vocabulary), stored = load(folder), load_file(folder / f"{name}.safetensors")
    case, passes = settings_of(folder)["cases"][name], len(stored["step_temperature"])
    layout, request = request_of(folder, name, stored)
    settings = ImageSettings(case["timesteps"], case["guidance_scale"], case["temperature"], case["schedule"])
    config = image_config(settings)
    places = request.picture[0].nonzero()[:, 0]
    count = torch.full((len(request.batch.ids),), len(places))
    uniform = stored["noise.mask_uniform"]
    exponential = stored["noise.sample_exponential"].unflatten(1, (len(count), len(places)))
    tape = Tape(places, exponential, lambda own, targets: UpstreamQuota(own, targets, count), uniform)
    out, seen = taped_run(model, layout, request, config, {Modality.IMAGE: tape})
    assert len(seen) == len(tape.passes) == passes == case["forward_passes"]
    final = out.batch.ids[request.picture].view(len(count), -1) - vocabulary.image[0]
    assert torch.equal(final, stored["final_codes"].long())
    frozen = [
        (rows.given & request.picture).sum(1).tolist() for rows in request.unconditional if case["guidance_scale"]
    ]
    assert frozen in ([], [[case.get("frozen_codes_in_uncond", 0)] * len(count)])
    check_pictures(stored, tape, passes)
    rule = UpstreamQuota(config.image, request.batch.targets, count)
    for number in range(passes):
        rule.step = torch.full_like(count, number)
        expected = stored["step_temperature"][number] * torch.ones(len(count))
        torch.testing.assert_close(case["temperature"] * rule.temperature.float(), expected, atol=1e-6, rtol=0)
    streams = [request.batch, *(request.unconditional if case["guidance_scale"] else ())]
    valid = torch.cat([rows.valid for rows in streams])
    for number, ids in enumerate(seen):
        expected = stored["model_input"][number][:, -ids.shape[1] :].long()
        assert torch.equal(ids[valid], expected[valid]), number


def check_pictures(stored: dict[str, Tensor], tape: Tape, passes: int) -> None:
    known = torch.zeros_like(stored["sampled_codes"][0])
    for number, own in enumerate(tape.passes):
        unknown, logits = stored["unknown"][number], stored["guided_logits"][number]
        assert torch.equal(own.masked, unknown)
        torch.testing.assert_close(own.logits[unknown], logits[unknown], **GUIDED)
        sampled = torch.where(unknown, own.token.to(known.dtype), known)
        assert torch.equal(sampled, stored["sampled_codes"][number])
        chosen = torch.where(unknown, own.probability.float(), 0.0)
        torch.testing.assert_close(chosen, stored["selected_probs"][number], **SHARES)
        kept, left = stored["kept_masked"][number], stored["mask_len"][number]
        assert torch.equal(kept.sum(1), left.long())
        if number + 1 < passes:  # what stays masked in the end is returned as it was sampled
            assert torch.equal(unknown & ~own.picked, kept)
        known = sampled
    assert all(torch.equal(own.picked, own.masked) for own in tape.passes[-1:])


@pytest.mark.parametrize(("folder", "name"), cases("ti2ti"))
def test_words_and_pictures_together(folder, name):
    """Upstream's program in the one sampler; the default is another layout and draws the picture in several passes."""
    (model, vocabulary), stored = load(folder), load_file(folder / f"{name}.safetensors")
    case = settings_of(folder)["cases"][name]
    layout, request = request_of(folder, name, stored)
    usual = request.config
    config = replace(
        usual,
        text=replace(usual.text, steps=case["timesteps_text"]),
        guidance=replace(usual.guidance, scale=1 + case["guidance_scale"]),
    )
    text, image = (where[0].nonzero()[:, 0] for where in (request.words, request.picture))
    drawn = stored["noise.text_exponential"], stored["noise.image_exponential"]
    tapes = {
        m: Tape(places, noise, Quota)
        for m, places, noise in zip((Modality.TEXT, Modality.IMAGE), (text, image), drawn, strict=True)
    }
    out, seen = taped_run(model, layout, request, config, tapes)
    assert torch.equal(out.batch.ids[request.batch.valid], stored["final_ids"].long()[request.batch.valid])
    passes, streams = len(stored["cond_input"]), 2 if "uncond_input" in stored else 1
    assert len(seen) == passes and passes * streams == case["forward_passes"] == out.nfe
    (drawing,) = tapes[Modality.IMAGE].passes
    assert stored["image.passes"].tolist() == [0] and bool(drawing.picked.all())
    torch.testing.assert_close(drawing.logits, stored["image.guided_logits"][0], **GUIDED)
    written = tapes[Modality.TEXT].passes
    torch.testing.assert_close(written[0].logits, stored["text.guided_logits_first"], **GUIDED)
    present = torch.full_like(stored["text.proposal"][0], vocabulary.mask_id)
    for number, own in enumerate(written):
        proposed = torch.where(own.masked, own.token.to(present.dtype), present)
        assert torch.equal(proposed, stored["text.proposal"][number])
        sure = torch.where(own.masked, own.probability.float(), 0.0)
        torch.testing.assert_close(sure, stored["text.confidence"][number], **SHARES)
        assert torch.equal(own.picked, stored["text.committed"][number])
        assert torch.equal(own.picked.sum(1), stored["text.plan"][:, number].long())
        present = torch.where(own.picked, proposed, present)
    assert len(written) == stored["text.plan"].shape[1] == len(stored["text.proposal"])
    inputs = [stored["cond_input"], *([stored["uncond_input"]] if streams == 2 else [])]
    valid = torch.cat([request.batch.valid, *(rows.valid for rows in request.unconditional[: streams - 1])])
    for number, ids in enumerate(seen):
        expected = torch.cat([stream[number] for stream in inputs]).long()
        assert torch.equal(ids[valid], expected[valid]), number


@SETS
def test_the_command_line_runs_its_tasks(folder, tmp_path, run):
    """A checkpoint of the size of the golden set, found by the sizes that its config names."""
    config, vocabulary = settings_of(folder), vocabulary_of(folder)
    sizes = {name: config["tokens"][name] for name in ("new_vocab_size", "llm_vocab_size", "codebook_size")}
    side = math.isqrt(config["num_vq_tokens"])
    fields = {**config["model"], **sizes, "num_vq_tokens": side * side}
    write_golden_pipeline(tmp_path / "model", folder / "weights.safetensors", fields, vocabulary)
    few = ("--model", tmp_path / "model", "--steps", 2)
    status, out, _ = run("info", tmp_path / "model")
    assert status == 0 and "dynin" in out and "of speech" in out
    status, _, error = run("generate", "w3 w4", *few, "--out", tmp_path / "fox.png")
    assert status == 0, error
    assert Image.open(tmp_path / "fox.png").size == (2 * side, 2 * side)
    for command in ("caption",), ("answer", "w5 w6"), ("edit", "w7"):
        out = ("--out", tmp_path / "blue.png") if command[0] == "edit" else ()
        status, _, error = run(command[0], tmp_path / "fox.png", *command[1:], *few, *out, "--max-text-tokens", 4)
        assert status == 0, error
    assert Image.open(tmp_path / "blue.png").size == (2 * side, 2 * side)
    status, _, error = run("verify", tmp_path / "model")
    assert status == 1 and "known answer" in error + _
