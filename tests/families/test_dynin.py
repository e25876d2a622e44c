"""Dynin-Omni on a tiny random model: its rows, its defects (off, and on with `compat`), batches, caches, what loading keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from decode_layout import decode, decode_request, request_of
from golden import golden_cases
from reference.dynin_prompts import DyninPrompts, DyninRows
from reference.dynin_tape import Spy
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff.decoding import Guidance, Sampler
from unidiff.decoding.cache import AdaptiveCache, DualCache, IntervalCache, MaxLogitCache, NoCache, SegmentCache
from unidiff.decoding.draw import RowNoise
from unidiff.families.checkpoint.convert import convert
from unidiff.families.checkpoint.load import load_released
from unidiff.families.checkpoint.small_memory import quantise
from unidiff.families.checkpoint.verify import describe
from unidiff.families.dynin import DYNIN, RELEASED, SPECIALS, dynin_vocabulary, has_speech
from unidiff.families.dynin.rows import DyninLayout, both_config
from unidiff.families.family import recognise
from unidiff.families.mmada import ImageSettings, image_config
from unidiff.families.upstream_order import UpstreamQuota
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Vocabulary

MARKS = {name: 20 + i for i, name in enumerate(SPECIALS)}
VOCABULARY = dynin_vocabulary(80, 51, 16, 4, 50, MARKS)
FIELDS = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "new_vocab_size": 80}
WORDS = {"a": 1, "fox": 2, "blue": 3, "user": 4, "assistant": 5, "\n": 6, "system": 7, "hi": 8}
CODES = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
PART = 7  # text_length + 1


def encode(text: str) -> list[int]:
    return [WORDS[part] for part in text.replace("\n", " \n ").split(" ") if part]


ROWS = DyninLayout(
    VOCABULARY,
    encode,
    text_length=PART - 1,
    side=2,
    image=ImageSettings(steps=3),
    edits=ImageSettings(steps=3),
    both=both_config(3, 3),
)
UPSTREAM = replace(ROWS, compat="upstream", cuts=(PART + 3, 5), both=None)
TEXTS = ["a blue fox", "fox"]


@pytest.fixture(scope="module")
def model() -> MaskedTransformer:
    torch.manual_seed(0)
    model = MaskedTransformer(**DYNIN.settings(FIELDS)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def same_rows(batch, rows: DyninRows) -> None:
    """But for padding, the reference's rows; padding inside a row is counted."""
    for n in range(len(rows.ids)):
        own, theirs = batch.valid[n], rows.visible[n]
        assert batch.ids[n, own].tolist() == rows.ids[n, theirs].tolist()
        places = batch.positions[n, own, 0]
        assert torch.equal(places - places[-1], theirs.nonzero()[:, 0] - theirs.nonzero()[-1, 0])


def test_rows_are_the_references():
    prompts, said = DyninPrompts(VOCABULARY, PART), [encode(text) for text in TEXTS]
    source, hidden = CODES.flatten(1) + VOCABULARY.image[0], torch.full((2, 4), VOCABULARY.mask_id)
    drawn = request_of(ROWS, "text_to_image", texts=TEXTS)
    same_rows(drawn.batch, prompts.t2i(said, hidden))
    same_rows(drawn.unconditional[0], prompts.t2i([[], []], hidden))
    edited = request_of(ROWS, "edit", texts=TEXTS, codes=CODES)
    same_rows(edited.batch, prompts.i2i(said, source, hidden))
    same_rows(edited.unconditional[0], prompts.i2i([[], []], source, hidden))
    both = request_of(ROWS, "edit", texts=TEXTS, codes=CODES, told=True, longest=3)
    answers = [[1, 2], [1, 2]]  # and eos: three tokens that are hidden
    masked = torch.tensor([[False, True, True, True, False, False, False]] * 2)
    trained = prompts.ti2ti_train(said, answers, source, hidden, hidden, masked)
    for batch, texts in ((both.batch, said), (both.unconditional[0], [[], []])):
        same_rows(batch, prompts.ti2ti_train(texts, answers, source, hidden, hidden, masked))
    assert torch.equal(both.batch.targets.sum(1), torch.tensor([7, 7])) and trained.labels.shape == trained.ids.shape


def test_what_is_read_back(model):
    drawn = decode(model, ROWS, "text_to_image", texts=TEXTS)
    assert drawn.codes.shape == (2, 2, 2) and drawn.texts == [encode(text) for text in TEXTS]
    edited = decode(model, ROWS, "edit", texts=TEXTS, codes=CODES, grid=(3, 3))
    assert edited.codes.shape == (2, 3, 3) and edited.texts == [encode(text) for text in TEXTS]
    both = decode(model, ROWS, "edit", texts=TEXTS, codes=CODES, told=True, longest=4)
    assert both.codes.shape == (2, 2, 2) and all(len(words) <= 4 for words in both.texts)
    marks = set(MARKS.values()) - {MARKS[name] for name in ("eos", "eot", "think", "end_think")}
    assert not marks & {i for words in both.texts for i in words}
    holes = torch.tensor([[[True, False], [False, False]]] * 2)
    changed = decode(model, ROWS, "edit", texts=TEXTS, codes=CODES, holes=holes)
    assert torch.equal(changed.codes[~holes], CODES[~holes])
    asked = decode(model, ROWS, "answer", texts=TEXTS, codes=CODES, longest=4)
    assert torch.equal(asked.codes, CODES)
    described = request_of(replace(ROWS, encode=lambda text: [9] * len(text.split())), "caption", codes=CODES)
    assert (described.batch.ids[0] == 9).sum() == 2 + len(ROWS.described.split())


def test_conversations_are_put_into_the_template(model):
    s = VOCABULARY.specials
    user, answer = [s["start_header"], 4, s["end_header"], 6], [s["start_header"], 5, s["end_header"], 6]
    assert ROWS.ids("fox") == [s["bos"], *user, 2, s["eot"], *answer]
    talk = [
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "a"},
    ]
    said = [*user, 2, s["eot"], *answer, 8, s["eot"], *user, 1, s["eot"], *answer]
    assert ROWS.conversation(talk) == [s["bos"], *said]
    out = decode(model, ROWS, "chat", turns=["fox", talk], longest=4)
    assert all(len(words) <= 4 for words in out.texts)


def test_thoughts_may_be_written_and_marks_of_prompts_may_not():
    needs = request_of(ROWS, "chat", turns=["fox"]).needs
    kept = {MARKS[name] for name in ("eos", "eot", "think", "end_think")}
    assert set(needs.forbid) == set(MARKS.values()) - kept and needs.ends == (MARKS["eot"],)


GIVEN = {
    "text_to_image": {"texts": TEXTS},
    "edit": {"texts": TEXTS, "codes": CODES},
    "both": {"texts": TEXTS, "codes": CODES, "told": True, "longest": 4},
    "answer": {"texts": TEXTS, "codes": CODES, "longest": 4},
    "chat": {"turns": TEXTS, "longest": 4},
}
SEGMENTS = SegmentCache(text=DualCache(), image=MaxLogitCache(0.6, 0.2, 4), image_prompt=IntervalCache(3))
POLICIES = (NoCache(), AdaptiveCache(4, 2, 0.5), SEGMENTS)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("task", GIVEN)
def test_a_row_does_not_depend_on_the_batch(model, task, policy):
    method, given = task.replace("both", "edit"), GIVEN[task]
    together = decode(model.double(), ROWS, method, (5, 6), policy, **given)
    for row in range(2):
        own = {n: v if isinstance(v, int) else v[row : row + 1] for n, v in given.items()}
        alone = decode(model, ROWS, method, [5 + row], policy, **own)
        assert alone.texts[0] == together.texts[row] and torch.equal(alone.codes[0], together.codes[row])
    model.float()


def test_what_does_not_fit_is_refused():
    long = " ".join(["a"] * 7)
    wide = torch.zeros(1, 2, 3, dtype=torch.long)
    for task, given, message in (
        ("text_to_image", {"texts": ["a " * 5]}, "needs 7 tokens and 6 fit; shorten it"),
        ("edit", {"texts": [long], "codes": CODES[:1]}, "needs 9 tokens and 7 fit; shorten it"),
        ("edit", {"texts": ["a"], "codes": wide}, "square pictures only, and one has 2 x 3 codes"),
        ("answer", {"texts": ["a"], "codes": wide}, "square pictures only"),
        ("text_to_image", {"texts": ["a"], "grid": (2, 3)}, "square pictures only"),
        ("edit", {"texts": ["a"], "codes": CODES[:1], "references": CODES[:1]}, "by words alone; leave reference out"),
        ("generate", {"texts": ["a"]}, "dynin cannot do 'generate'"),
    ):
        with pytest.raises(ValueError, match=message):
            request_of(ROWS, task, **given)
    with pytest.raises(ValueError, match=r"compat = 'yes'; expected None or 'upstream'"):
        replace(ROWS, compat="yes")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tasks_with_fewer_bits_in_each_weight(kind):
    pytest.importorskip("torchao", reason="the extra `quantise` (torchao) is not installed")
    torch.manual_seed(0)
    wide = MaskedTransformer(**DYNIN.settings({**FIELDS, "d_model": 64, "mlp_hidden_size": 96})).bfloat16().eval()
    small = quantise(wide, kind)
    for task, given in GIVEN.items():
        out = decode(small, ROWS, task.replace("both", "edit"), **given)
        assert not torch.isin(out.output.batch.ids, torch.tensor(VOCABULARY.mask_id)).any()


# --------------------------------------------------------------------------------- defects: off, and on with `compat`


def seen_by(model, layout: DyninLayout, request) -> Tensor:
    """Ids `[passes, streams, B, L]` of a decode."""
    spy = Spy(model)
    decode_request(spy, layout, request)
    return torch.stack([ids.unflatten(0, (2, -1)) for ids in spy.seen])


def test_codes_of_the_unconditional_rows_are_those_that_were_decoded(model):
    """Upstream: the first ones, by a number that was meant for longer prompts, stay masked in it for ever."""
    request = request_of(ROWS, "text_to_image", texts=TEXTS)
    seen = seen_by(model, ROWS, request)
    assert torch.equal(seen[:, 0, request.picture], seen[:, 1, request.picture])
    request = request_of(UPSTREAM, "text_to_image", texts=TEXTS)
    seen, picture = seen_by(model, UPSTREAM, request), request.picture[0].nonzero()[:, 0]
    frozen, others = picture[:2], picture[2:]  # the cut is two codes behind the beginning
    assert (seen[:, 1][..., frozen] == VOCABULARY.image_mask).all()
    assert (seen[-1, 0][..., frozen] != VOCABULARY.image_mask).any()
    assert torch.equal(seen[:, 0][..., others], seen[:, 1][..., others])


def test_edits_are_guided_away_from_no_words(model):
    """Upstream: both rows have the same ids, words included, and differ in what is visible alone."""
    request = request_of(ROWS, "edit", texts=TEXTS, codes=CODES)
    (away,) = request.unconditional
    words = {i for text in TEXTS for i in encode(text)}
    assert not words & set(away.ids[away.valid].tolist())
    (away,) = request_of(UPSTREAM, "edit", texts=TEXTS, codes=CODES).unconditional
    assert torch.equal(away.ids[away.valid], request.batch.ids[away.valid])
    for row, text in enumerate(TEXTS):
        assert words & set(away.ids[row, away.valid[row]].tolist()) == {encode(text)[-1]}  # the last word stays visible


def test_how_many_codes_stay_and_the_noise_of_the_ranking(model, monkeypatch):
    """Upstream: a share of all codes, rounded in float32, with one left to the end; noise that falls again and again."""
    codes, kept = torch.arange(16).view(1, 4, 4), {}
    for layout in (ROWS, UPSTREAM):
        inputs = {"texts": ["a"], "codes": codes, "holes": codes < 4}
        request = request_of(layout, "edit", **inputs)
        config = image_config(ImageSettings(steps=2, schedule="linear", guidance=0.0))
        ready = layout.prepared(SimpleModel(model), request, config, torch.tensor([1]))
        out = Sampler(model, VOCABULARY, config, rules=dict(ready.rules))(request.batch, torch.tensor([1]), record=True)
        kept[layout.compat] = [int((ids == VOCABULARY.mask_id).sum()) for ids in out.trajectory]
    assert kept == {None: [4, 2, 0], "upstream": [4, 3, 0]}
    settings = image_config(ImageSettings(steps=5, schedule="linear")).image
    rule = UpstreamQuota(settings, torch.ones(1, 4, dtype=torch.bool), torch.tensor([4]))
    left = []
    for step in range(5):
        rule.step = torch.tensor([step])
        left.append(float(rule.temperature))
    assert left == pytest.approx([0.8, 0.48, 0.192, 0.0384, 0.0])
    one = torch.tensor(-1.0, dtype=torch.float64).exp().neg().exp()  # a Gumbel number of 1
    drawn, seen = RowNoise.__call__, []
    monkeypatch.setattr(RowNoise, "__call__", lambda *about: one.expand(drawn(*about).shape))

    def look(confidence, score, is_real, count, index):
        seen.append(float((score - confidence.log())[is_real].mean()))
        return torch.zeros_like(is_real)

    config = image_config(ImageSettings(steps=4, schedule="linear", guidance=0.0))
    request = request_of(ROWS, "text_to_image", texts=["a"])
    Sampler(model, VOCABULARY, config, rules={Modality.IMAGE: look})(request.batch, torch.tensor([1]))
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.25])


class SimpleModel:
    """What `prepared` needs of a pipeline."""

    def __init__(self, model) -> None:
        self.transformer = model


def test_a_picture_beside_words_takes_all_its_steps(model):
    """Upstream: it is drawn in the first pass, whatever is asked for."""
    given = {"texts": TEXTS, "codes": CODES, "told": True, "longest": PART}
    for layout, left in ((ROWS, [4, 3, 2]), (UPSTREAM, [4, 0, 0])):
        request = request_of(layout, "edit", **given)
        seen = seen_by(model, layout, request)
        masked = (seen[:3, 0][:, request.picture].unflatten(1, (2, 4)) == VOCABULARY.mask_id).sum(-1)
        assert masked.tolist() == [[n, n] for n in left]


def test_words_beside_a_picture_stand_as_in_training():
    """Upstream's program pads the instruction and hides bos too, which its training does not."""
    given = {"texts": TEXTS, "codes": CODES, "told": True, "longest": PART}
    prompts, said = DyninPrompts(VOCABULARY, PART), [encode(text) for text in TEXTS]
    source, hidden = CODES.flatten(1) + VOCABULARY.image[0], torch.full((2, 4), VOCABULARY.mask_id)
    rows = prompts.ti2ti_gen(said, [[1] * 9] * 2, source, hidden)
    ids = rows.ids.clone()
    ids[:, -PART:] = VOCABULARY.mask_id
    same_rows(request_of(UPSTREAM, "edit", **given).batch, replace(rows, ids=ids))
    own = request_of(ROWS, "edit", **given)
    assert own.batch.given[0, own.words[0].nonzero()[0, 0] - 1]  # bos
    assert own.needs.stop_at_eos and not request_of(UPSTREAM, "edit", **given).needs.stop_at_eos


def test_no_mask_is_drawn(model):
    """Upstream: [MASK] is among the ids of words; it uses up quota, and its place stays masked."""
    given = {"texts": TEXTS, "codes": CODES, "told": True, "longest": PART}
    loud = MaskedTransformer(**DYNIN.settings(FIELDS)).eval()
    loud.load_state_dict(model.state_dict())
    request = request_of(ROWS, "edit", **given)
    with torch.no_grad():
        batch = request.batch
        direction = loud.hidden(batch.ids, batch.modality, batch.positions)[batch.targets].mean(0)
        loud.output_weight[VOCABULARY.mask_id] = 20 * direction
    for layout, left in ((ROWS, False), (UPSTREAM, True)):
        request = request_of(layout, "edit", **given)
        out = decode_request(loud, layout, request, config=replace(request.config, guidance=Guidance()))
        assert bool((out.output.batch.ids[request.words] == VOCABULARY.mask_id).any()) is left
        assert VOCABULARY.mask_id not in {i for words in out.texts for i in words}
        assert out.codes.min() >= 0


def test_rows_need_not_be_aligned(model):
    """Upstream looks for the parts in the first row alone."""
    texts = ["a blue fox a", "a"]
    given = {"codes": CODES, "told": True, "longest": 4}
    together = decode(model, ROWS, "edit", (3, 4), texts=texts, **given)
    second = decode(model, ROWS, "edit", [4], texts=texts[1:], codes=CODES[1:], told=True, longest=4)
    assert torch.equal(second.codes[0], together.codes[1]) and second.texts[0] == together.texts[1]


# ---------------------------------------------------------------------------------------- what a checkpoint also holds


def test_it_is_found_by_the_sizes_of_its_config_or_weights():
    sizes = {"new_vocab_size": 138752, "llm_vocab_size": 126464, "codebook_size": 8192}
    names = list(DYNIN.export(MaskedTransformer(**DYNIN.settings(FIELDS))))
    assert has_speech(sizes) and not has_speech({**sizes, "new_vocab_size": 134656})
    plain = {key: RELEASED[key] for key in ("d_model", "n_layers")}
    assert recognise({**plain, **sizes}, names).name == "dynin"
    assert recognise({**plain, **sizes, "new_vocab_size": 134656}, names).name == "mmada"
    assert recognise(plain, names).name == "llada"
    rows = {name: torch.empty(138752 if name.endswith("wte.weight") else 1, 1, device="meta") for name in names}
    assert recognise(plain, rows).name == recognise({}, rows).name == "dynin"


def test_speech_codes_are_named_and_never_drawn(model):
    start, stop = VOCABULARY.others["speech"]
    assert (start, stop) == (67, 71)
    with torch.no_grad():
        loud = MaskedTransformer(**DYNIN.settings(FIELDS)).eval()
        loud.load_state_dict(model.state_dict())
        request = request_of(ROWS, "edit", texts=TEXTS, codes=CODES, told=True, longest=4)
        batch = request.batch
        loud.output_weight[start:stop] = 50 * loud.hidden(batch.ids, batch.modality, batch.positions).mean((0, 1))
    ids = decode_request(loud, ROWS, request).output.batch.ids
    assert not ((ids >= start) & (ids < stop)).any()
    plain = VOCABULARY.to_dict()
    assert plain["others"] == {"speech": [start, stop]} and Vocabulary.from_dict(plain) == VOCABULARY
    with pytest.raises(ValueError, match=r"speech range \(60, 70\) must lie behind text and image"):
        replace(VOCABULARY, others={"speech": (60, 70)})


def write_checkpoint(folder, merger: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = DYNIN.export(MaskedTransformer(**DYNIN.settings(FIELDS)))
    if merger:
        sides = {"norm.weight": (128,), "norm.bias": (128,), "fc1.weight": (128, 128), "fc2.weight": (32, 128)}
        weights |= {f"video_token_merger.{name}": torch.randn(shape) for name, shape in sides.items()}
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**FIELDS, "model_type": "dynin_omni", "vid_merge": merger}))
    return weights


def test_a_video_merger_is_kept_and_written_back(tmp_path):
    weights = write_checkpoint(tmp_path / "theirs")
    released = load_released(tmp_path / "theirs", vocabulary=VOCABULARY)
    assert set(released.carried) == {name for name in weights if name.startswith("video")}
    lines = describe(tmp_path / "theirs", vocabulary=VOCABULARY).lines()
    assert lines["in no task"] == "ids 67-70 of speech, 4 weights of video_token_merger"
    convert(tmp_path / "theirs", tmp_path / "ours", vocabulary=VOCABULARY)
    assert describe(tmp_path / "ours").lines()["in no task"] == lines["in no task"]
    convert(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(weights) and all(torch.equal(back[name], value) for name, value in weights.items())
    for source, target in (("theirs", "half"), ("half", "half_back")):
        vocabulary = VOCABULARY if source == "theirs" else None
        convert(tmp_path / source, tmp_path / target, torch.bfloat16, vocabulary=vocabulary)
    half = load_file(tmp_path / "half_back" / "model.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in weights.items())
    weights["video_token_merger.fc1.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(ValueError, match=r"NaN or infinity \(video_token_merger.fc1.weight\)"):
        load_released(tmp_path / "theirs", vocabulary=VOCABULARY)
    save_file({**weights, "audio_head.weight": torch.ones(2)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 left over \(audio_head.weight\)"):
        load_released(tmp_path / "theirs", vocabulary=VOCABULARY)


@pytest.mark.golden
@pytest.mark.parametrize("folder", golden_cases("dynin", having="weights.safetensors"))
def test_the_golden_checkpoint_is_found_by_its_sizes(folder, tmp_path):
    stored = json.loads((folder / "config.json").read_text())
    ids = stored["tokens"]
    rows = {name: ids[name] for name in ("new_vocab_size", "llm_vocab_size", "codebook_size")}
    (tmp_path / "config.json").write_text(json.dumps({**stored["model"], **rows}))
    save_file(dict(load_file(folder / "weights.safetensors").items()), tmp_path / "model.safetensors")
    sizes = ids["new_vocab_size"], ids["image_token_offset"], ids["codebook_size"], ids["speech_codebook_size"]
    assert load_released(tmp_path, vocabulary=dynin_vocabulary(*sizes, ids["mask"], {})).family.name == "dynin"
