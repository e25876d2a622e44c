"""Decodes of MMaDA-Parallel, models A and M, against every tensor of their golden sets: the one sampler with recorded draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_sets import LOGITS, cases, load, logits_of, settings_of
from reference.parallel_tape import Draws, Tape, taped_run
from safetensors.torch import load_file
from torch import Tensor

from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.families.lumina import MARKS, LuminaLayout
from unidiff.families.mmada import MMaDALayout
from unidiff.families.parallel import A_DEFECTS, M_DEFECTS, JointSettings

pytestmark = pytest.mark.golden
GUIDED, SHARES = (dict(atol=a, rtol=0.0) for a in (5e-4, 1e-4))
A_REPAIRED = ("any_id", "rounded")
M_REPAIRED = ("any_id", "rounded", "all_counted", "always_drawn")


# ---------------------------------------------------------------------------------------------------------------- model A


def layout_a(folder: Path, case: dict[str, Any], stored: Any, compat: Any) -> LuminaLayout:
    """Rows whose template and words have the stored ids."""
    whole, none = stored["prompt.prompt_ids"].tolist(), stored["prompt.uncond_text_ids"].tolist()
    _, vocabulary = load(folder)
    at = none.index(vocabulary.specials["uncondition"])
    tail = none[at + 1 :]
    said = {"": [], "instruction": whole[at : len(whole) - len(tail)]}
    marks = {MARKS[0]: none[:at], MARKS[1]: [], MARKS[2]: [], MARKS[3]: tail}
    passes = case["timesteps"] or int(0.3 * case["text_steps"])
    joint = JointSettings(
        case["text_steps"],
        passes,
        case["cfg_scale"],
        case["cfg_img"],
        temperature=case["temperature"],
        text_temperature=case["text_temperature"],
        random_words=case["remasking"] == "random",
        first_pass=0.25 if case["timesteps"] else 0.0,  # the rule of the app
    )
    return LuminaLayout(vocabulary, said.__getitem__, marks, systems=("",) * 3, joint=joint, compat=compat)


def request_a(folder: Path, case: dict[str, Any], stored: Any, layout: LuminaLayout) -> DecodeRequest:
    config = settings_of(folder)
    told = dict(told=True, longest=config["text_gen_length"], grid=tuple(config["output_grid_hw"]))
    if case.get("no_image"):
        stored["prompt.source_codes"]  # unused there
        return layout.request("generate", TaskInputs(1, ["instruction"], **told))
    codes = stored["prompt.source_codes"].long().view(1, *config["input_grid_hw"])
    request = layout.request("edit", TaskInputs(1, ["instruction"], codes=codes, **told))
    if "paint_mask_1_is_regenerated" not in case:
        return request
    # the answer's picture is known in part, another one than the picture that is read
    known = torch.zeros_like(request.batch.given)
    known[request.picture] = ~torch.tensor(case["paint_mask_1_is_regenerated"]).bool().flatten()
    full = stored["prompt.full"].long()
    row, streams = request.batch, []
    for batch in (row, *request.unconditional):
        ids = batch.ids.clone()
        ids[known] = full[known[0, -len(full) :]]
        streams.append(batch.replace(ids=ids, given=batch.given | known))
    return replace(request, batch=streams[0], unconditional=tuple(streams[1:]))


def bare(ids: Tensor, valid: Tensor) -> Tensor:
    """`[L']`, a row without its padding."""
    return ids[valid]


@pytest.mark.parametrize(("folder", "name"), cases(True))
@torch.no_grad()
def test_model_a(folder, name):
    config, stored = settings_of(folder), load_file(folder / f"{name}.safetensors")
    case, (model, vocabulary) = config["cases"][name], load(folder)
    upstream, shown = not case.get("fixed"), case["timesteps"] is None  # the app shows the last full sample
    compat: Any = (
        [name for name in A_DEFECTS if name != "one_left"] if shown else "upstream" if upstream else A_REPAIRED
    )
    layout = layout_a(folder, case, stored, compat)
    request = request_a(folder, case, stored, layout)
    S, K = case["text_steps"], vocabulary.image_size
    # 1. the rows
    mask = vocabulary.mask_id
    row, valid = request.batch, request.batch.valid[0]
    full, con = stored["prompt.full"].long(), stored["prompt.con"].long()
    begun = torch.where(row.targets, mask, row.ids)[0]
    assert torch.equal(bare(begun, valid), full) and torch.equal(full[: len(con)], con)
    places = torch.arange(row.shape[1])[request.picture[0]]
    shift = int((~valid).sum())
    assert torch.equal(places - shift, stored["image.positions"].long())
    text_places = torch.arange(row.shape[1])[request.words[0]]
    assert [int(text_places[0]) - shift, int(text_places[-1]) + 1 - shift] == [case["text_start"], case["text_end"]]
    assert [int(places[0]) - shift, int(places[-1]) + 2 - shift] == [case["image_start"], case["image_end"]]
    repaired_rows = request_a(folder, case, stored, layout_a(folder, case, stored, A_REPAIRED))
    prefixes = [stored["prompt.uncon_text"].long(), stored["prompt.uncon_image"].long()]
    answer = full[len(con) :]
    for batch, prefix in zip(repaired_rows.unconditional, prefixes, strict=False):
        assert torch.equal(torch.where(batch.targets, mask, batch.ids)[batch.valid], torch.cat((prefix, answer)))
    # 2. the decode, with the stored draws
    text = Tape(
        Draws(
            stored.get("noise.text_uniform"),
            lambda v, u: v + case["text_temperature"] * -torch.log(-torch.log(u + 1e-10) + 1e-10),
            stored.get("noise.text_remask_uniform"),
        ),
        text_places,
    )
    exponential = stored.get("noise.image_sample_exponential")
    image = Tape(
        Draws(exponential, lambda v, e: v.softmax(-1) / e, ranking=stored["noise.image_remask_normal"].double()), places
    )
    out, seen = taped_run(model, layout, request, text, image)
    trail = [ids[0] for ids in out.trajectory]
    trail += [trail[-1]] * (S + 1 - len(trail))
    # 3. what the network saw, and its answers
    inputs = stored["cond.input_ids"].long()
    assert torch.equal(torch.stack([bare(ids, valid) for ids in trail[:S]]), inputs)
    after, left = stored["ids_after_last_step"].long(), torch.zeros_like(full, dtype=torch.bool)
    left[stored["image.positions"].long()] = stored["image.kept_masked"][-1].bool() & shown
    assert torch.equal(torch.where(left, mask, bare(trail[S], valid)), after)
    steps = stored["image.steps"].tolist()
    assert [step.number for step in image.steps] == steps
    logits = logits_of(model, inputs)  # [S, L, V]
    codes = slice(*vocabulary.image)
    own = logits[steps][:, places - shift, codes]
    torch.testing.assert_close(own, stored["cond.image_logits"], **LOGITS)
    if "cond.logits_step0" in stored:
        torch.testing.assert_close(logits[0], stored["cond.logits_step0"], **LOGITS)
    guided = own.clone()
    for number, (part, scale, prefix) in enumerate(
        zip(("uncond_text", "uncond_image"), (case["cfg_scale"], case["cfg_img"]), prefixes, strict=True)
    ):
        stream = []
        for s in steps:
            if upstream:  # the row itself with the words of this pass, its beginning overwritten
                ids = torch.where(request.words[0] & row.targets[0], trail[s + 1], trail[s])[valid].clone()
                ids[: len(prefix)] = prefix
            else:
                ids = torch.cat((prefix, trail[s][valid][len(con) :]))
            stream.append(ids)
        other = torch.stack(stream)
        assert torch.equal(other, stored[f"{part}.input_ids"].long())
        behind = other.shape[1] - len(full)
        values = logits_of(model, other)[:, places - shift + behind, codes]
        torch.testing.assert_close(values, stored[f"{part}.image_logits"], **LOGITS)
        guided += scale * (own - values)
        if number < len(request.unconditional) and (scale or not number):  # a last direction that is off is left out
            batch = request.unconditional[number]
            rows = [r for call in seen for r in call]
            for ids in other:  # and the sampler asked with the same
                assert any(torch.equal(r[batch.valid[0]], ids) for r in rows)
    torch.testing.assert_close(guided, stored["image.guided_logits"], **GUIDED)
    check_steps(stored, text, image, K, vocabulary, trail, text_places, S, all_at_last=shown)
    # 4. the results
    final, random = out.batch.ids[0], stored["final.random_filled"].bool()
    drawn = final[places] - vocabulary.image[0]
    assert torch.equal(drawn[~random], stored["final.codes"].long()[~random])
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < K
    assert bool(random.any()) == (upstream and not shown)
    if "final.text_ids" in stored:
        words = final[text_places]
        assert torch.equal(words[words != mask], stored["final.text_ids"].long())


def check_steps(stored, text, image, K, vocabulary, trail, text_places, S, all_at_last: bool = False):
    """Proposals, confidences, numbers and choices of every pass."""
    proposals, sure = stored["text.proposal"].long(), stored["text.confidence"]
    written, quotas = stored["text.committed"].bool(), stored["text.quota"].tolist()
    at = {step.number: step for step in text.steps}
    for s in range(S):
        present = trail[s][text_places]
        if s not in at:
            assert torch.equal(proposals[s], present) or bool((proposals[s] == -1).all())  # nothing is masked any more
            assert not written[s].any() and quotas[s] == 0 and not sure[s].any()
            continue
        step = at[s]
        expected = present.clone()
        expected[step.open] = step.token
        assert torch.equal(proposals[s], expected)
        confidence = torch.zeros(len(text_places), dtype=torch.float64)
        confidence[step.open] = step.confidence
        torch.testing.assert_close(confidence, sure[s], **SHARES)
        assert step.quota == quotas[s]
        filled = torch.zeros(len(text_places), dtype=torch.bool)
        filled[step.filled] = True
        # where [MASK] is drawn, it is said to be written, and is not
        assert torch.equal(filled, written[s] & (proposals[s] != vocabulary.mask_id))
    assert [step.number for step in image.steps] == stored["image.steps"].tolist()
    for i, step in enumerate(image.steps):
        unknown = stored["image.unknown"][i].bool()
        assert torch.equal(step.open, unknown.nonzero()[:, 0])
        torch.testing.assert_close(step.logits, stored["image.guided_logits"][i][unknown], **GUIDED)
        assert torch.equal(step.token, stored["image.sampled_codes"][i].long()[unknown])
        torch.testing.assert_close(step.confidence.float(), stored["image.selected_probs"][i][unknown], **SHARES)
        assert not stored["image.selected_probs"][i][~unknown].any()
        assert step.kept == int(stored["image.mask_len"][i])
        torch.testing.assert_close(
            torch.tensor(step.noise_scale), stored["image.noise_scale"][i], atol=1e-6, rtol=0, check_dtype=False
        )
        kept = torch.zeros_like(unknown)
        kept[step.open] = True
        kept[step.filled] = False
        if all_at_last and i + 1 == len(image.steps):  # the reference keeps this sample after all
            assert not kept.any()
            kept[step.open[step.score.argsort()[: step.kept]]] = True
        assert torch.equal(kept, stored["image.kept_masked"][i].bool())


# ---------------------------------------------------------------------------------------------------------------- model M


class RowOfCodes(MMaDALayout):
    """A picture of any number of codes: where they stand in it does not matter to the network."""

    grid = property(lambda self: (1, self.side))  # type: ignore[assignment]


def layout_m(folder: Path, case: dict[str, Any], stored: Any, compat: Any) -> MMaDALayout:
    words = stored["prompt.text_ids"].tolist()
    joint = JointSettings(
        case["text_steps"],
        case["image_steps"],
        case["image_cfg"],
        text_guidance=case["text_cfg"],
        temperature=case["image_temperature"],
        text_temperature=case["text_temperature"],
        random_words=case["remasking"] == "random",
    )
    vocabulary, side = load(folder)[1], settings_of(folder)["num_vq_tokens"]
    return RowOfCodes(vocabulary, lambda text: words, side=side, joint=joint, compat=compat)


@pytest.mark.parametrize(("folder", "name"), cases(False))
@torch.no_grad()
def test_model_m(folder, name):
    config, stored = settings_of(folder), load_file(folder / f"{name}.safetensors")
    case, (model, vocabulary) = config["cases"][name], load(folder)
    compat: Any = M_REPAIRED if case.get("fixed") else "upstream"
    layout, S = layout_m(folder, case, stored, compat), case["text_steps"]
    told = dict(told=True, longest=config["text_length"] - 1)
    codes = stored["prompt.source_codes"].long().view(1, 1, -1)
    task = "generate" if case.get("no_image") else "edit"
    request = layout.request(task, TaskInputs(1, [""], codes=None if task == "generate" else codes, **told))
    # 1. the rows
    row, (other,) = request.batch, request.unconditional
    con, away = stored["prompt.con"].long(), stored["prompt.uncond"].long()
    assert bool(row.valid.all()) and bool(other.valid.all())
    assert torch.equal(row.ids[0, : len(con)], con) and torch.equal(other.ids[0, : len(away)], away)
    places = torch.arange(row.shape[1])[request.picture[0]]
    text_places = torch.arange(row.shape[1])[-config["text_length"] :]  # bos included
    # 2. the decode, with the stored draws
    text = Tape(
        Draws(
            stored.get("noise.text_uniform_float64"),
            lambda v, u: v.double().exp() / (-u.log()) ** case["text_temperature"],
            stored.get("noise.text_remask_uniform"),
        ),
        text_places,
    )
    v = stored["noise.image_remask_uniform"].clamp_min(1e-20)
    gumbel = -torch.log((-torch.log(v)).clamp_min(1e-20))
    exponential = stored["noise.image_sample_exponential"]
    image = Tape(Draws(exponential, lambda v, e: v.softmax(-1) / e, ranking=gumbel.double()), places)
    out, seen = taped_run(model, layout, request, text, image)
    trail = [ids[0] for ids in out.trajectory]
    trail += [trail[-1]] * (S + 1 - len(trail))
    # 3. what the network saw, and its answers
    inputs = stored["model_input"].long()  # [S, 2, L]
    open_ = row.targets[0]
    assert torch.equal(torch.stack(trail[:S]), inputs[:, 0])
    assert torch.equal(torch.stack([torch.where(open_, ids, other.ids[0]) for ids in trail[:S]]), inputs[:, 1])
    known = {tuple(ids.tolist()) for ids in inputs.flatten(0, 1)}
    assert all(tuple(ids.tolist()) in known for call in seen[: len(text.steps)] for ids in call)
    logits = logits_of(model, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])  # [S, 2, L, V]
    if "step0_logits" in stored:
        torch.testing.assert_close(logits[0], stored["step0_logits"], **LOGITS)
    g, n = case["text_cfg"] * (1 if case.get("fixed") else -1), len(stored["text.guided_logits"])
    words = logits[:n, :, text_places]
    expected = stored["text.guided_logits"]
    torch.testing.assert_close((1 + g) * words[:, 0] - g * words[:, 1], expected, **GUIDED)
    for step in text.steps[:n]:
        torch.testing.assert_close(step.logits, expected[step.number][step.open], **GUIDED)
    steps, g = stored["image.steps"].tolist(), case["image_cfg"]
    drawn = logits[steps][:, :, places, slice(*vocabulary.image)]
    torch.testing.assert_close((1 + g) * drawn[:, 0] - g * drawn[:, 1], stored["image.guided_logits"], **GUIDED)
    check_steps(stored, text, image, vocabulary.image_size, vocabulary, trail, text_places, S, all_at_last=True)
    # 4. the results
    final = out.batch.ids[0]
    assert torch.equal(final[places] - vocabulary.image[0], stored["final.codes"].long())
    assert torch.equal(final[text_places], stored["final.text_ids"].long())


def test_the_repaired_cases_are_upstream_without_the_defects_that_they_mend():
    assert set(A_DEFECTS) - set(A_REPAIRED) == {"overwritten", "late", "all_counted", "one_left"}
    assert set(M_DEFECTS) - set(M_REPAIRED) == {"inverted", "other_mark", "picture_order"}
