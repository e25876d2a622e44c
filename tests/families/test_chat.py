"""Chat rows: the template's ids, answers up to their end, padding on either side, blocks and caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decode_layout import decode, decode_request, request_of

from unidiff.decoding import SamplerConfig
from unidiff.decoding.cache import DualCache, NoCache, PrefixCache
from unidiff.families.chat import ChatLayout
from unidiff.families.dream import DREAM_CHAT
from unidiff.families.family import named_vocabulary
from unidiff.families.llada import LLADA
from unidiff.families.llada.rows import LLADA_CHAT, llada_sampler
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary

MASK, EOS, BOS, START, END, EOT = 60, 61, 62, 63, 64, 65
CONFIG = {"d_model": 16, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 24, "vocab_size": 70, "mask_token_id": MASK}
TINY = replace(LLADA_CHAT, marks={"bos": BOS, "start_header": START, "end_header": END, "eot": EOT})


def encode(text: str) -> list[int]:
    """One id per word and per newline; every word of the tests has its own."""
    words = text.replace("\n", " ; ").split()
    known = [";", "user", "assistant", "system", "a", "fox", "what", "is", "You", "are", "helpful", "assistant."]
    return [known.index(word) for word in words]


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(5)
    model = MaskedTransformer(**LLADA.settings(CONFIG)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model, LLADA.vocabulary({**CONFIG, "eos_token_id": EOS})


def rows_of(made, left=True, **settings) -> ChatLayout:
    vocabulary = made[1]
    config = llada_sampler(vocabulary, **{"steps": 6, "block_length": 4, **settings})
    config = replace(config, text=replace(config.text, forbid=(*config.text.forbid, BOS, START, END)))
    return ChatLayout(vocabulary, encode, config, paced=True, left=left, family="llada", template=TINY)


def run(made, rows, task, seeds, policy=None, **inputs):
    return decode(made[0], rows, task, seeds, policy, **inputs)


def test_llada_template(made):
    rows = rows_of(made)
    head = [BOS, START, 1, END, 0, 0, 6, 7, 4, 5, EOT]
    assert rows.ids("what is a fox ") == [*head, START, 2, END, 0, 0]
    talk = [{"role": "user", "content": "what is a fox"}, {"role": "assistant", "content": "a fox"}]
    talk.append({"role": "user", "content": "what"})
    expected = [*head, START, 2, END, 0, 0, 4, 5, EOT, START, 1, END, 0, 0, 6, EOT, START, 2, END, 0, 0]
    assert rows.ids(talk) == expected and rows.ids([5, 6]) == [5, 6]


def test_dream_template():
    marks = {"im_start": 20, "im_end": 21}
    vocabulary = Vocabulary(30, (0, 30), (30, 30), 29)
    template = replace(DREAM_CHAT, marks=marks, system="You are a helpful assistant.")
    rows = ChatLayout(vocabulary, encode, DREAM_CHAT.sampler(vocabulary), template=template)
    assert rows.ids("what is a fox") == [20, 3, 0, 8, 9, 4, 10, 11, 21, 0, 20, 1, 0, 6, 7, 4, 5, 21, 0, 20, 2, 0]
    assert rows.config.text.confidence == "entropy"
    asked = [{"role": "system", "content": "helpful"}, {"role": "user", "content": "fox"}]
    assert rows.ids(asked)[:5] == [20, 3, 0, 10, 21]


def test_released_marks_agree_with_the_vocabulary():
    vocabulary, mmada = named_vocabulary("llada"), named_vocabulary("mmada").specials
    assert LLADA_CHAT.marks["eot"] == vocabulary.specials["eot"]
    assert all(mmada[name] == i for name, i in LLADA_CHAT.marks.items())
    rows = ChatLayout(vocabulary, encode, llada_sampler(vocabulary), template=LLADA_CHAT)
    assert rows.ends == (126348,) and set(rows.never) == {126080, 126346, 126347}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_an_answer_does_not_depend_on_the_batch(made, left, guidance):
    """Questions of different lengths, padded on either side, in blocks, with and without guidance."""
    questions = ["what is a fox", "fox", "a fox is what"]
    rows = rows_of(made, left, guidance=guidance, temperature=0.8)
    together = run(made, rows, "chat", [1, 2, 3], turns=questions, longest=8)
    for row, question in enumerate(questions):
        alone = run(made, replace(rows, left=True), "chat", [row + 1], turns=[question], longest=8)
        assert alone.texts[0] == together.texts[row]
        targets = alone.output.batch.ids[0, -8:]
        batch = together.output.batch
        assert torch.equal(batch.ids[row][batch.valid[row]][-8:], targets)


def test_blocks_are_decoded_one_after_the_other(made):
    rows = rows_of(made)
    request = request_of(rows, "chat", turns=["what", "a fox"], longest=8)
    never = replace(request.config, text=replace(request.config.text, forbid=(*request.config.text.forbid, EOS, EOT)))
    result = decode_request(made[0], rows, request, config=never, record=True)
    for ids in result.output.trajectory:
        answer = ids[:, -8:] == MASK
        assert not (answer[:, :4].any(1) & ~answer[:, 4:].all(1)).any()


@pytest.mark.parametrize("end", [EOS, EOT])
def test_an_answer_ends_at_end_of_text_or_turn(made, end):
    model, _ = made
    loud = MaskedTransformer(**{**LLADA.settings(CONFIG), "head_bias": True}).eval()
    loud.load_state_dict({**model.state_dict(), "output_bias": torch.zeros(70)})
    loud.output_bias.data[end] = 100.0
    result = decode(loud, rows_of(made, steps=8), "chat", turns=["what", "a fox"], longest=8)
    assert result.texts == [[], []] and result.output.steps < 8
    answers = result.output.batch.ids[:, -8:]
    assert set(answers.flatten().tolist()) <= {end, EOS}


@pytest.mark.parametrize("policy", [PrefixCache(interval=1), DualCache(interval=1)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_caches_refreshed_in_every_pass_change_nothing(made, policy, threshold):
    rows, given = rows_of(made, threshold=threshold), dict(turns=["what is a fox", "fox"], longest=8)
    plain, cached = (run(made, rows, "chat", [1, 2], p, **given) for p in (NoCache(), policy))
    assert torch.equal(plain.output.batch.ids, cached.output.batch.ids)
    fast = run(made, rows, "chat", [1, 2], type(policy)(), **given)
    assert fast.output.stats.partial_passes > 0 and not (fast.output.batch.ids == MASK).any()


def test_infilling_leaves_the_rest(made):
    result = run(made, rows_of(made), "infill", [1, 2], texts=["a <mask> fox <mask:2>", "<mask> is"])
    for filled, text in zip(result.texts, [[4, MASK, 5, MASK, MASK], [MASK, 7]], strict=True):
        assert len(filled) == len(text) and MASK not in filled and not {EOS, EOT, BOS} & set(filled)
        assert all(b == a for a, b in zip(text, filled, strict=True) if a != MASK)


def test_completion_takes_a_text_as_it_is(made):
    request = request_of(rows_of(made), "complete", texts=["a fox", "a"], longest=4)
    assert request.batch.ids[0, :2].tolist() == [4, 5] and request.batch.targets.sum(1).tolist() == [4, 4]


def test_a_callers_settings_lose_nothing_that_a_task_needs(made):
    own = SamplerConfig(stop_at_eos=False)
    kept = request_of(rows_of(made), "chat", turns=["fox"]).needs.keep_in(own)
    assert kept.ends == (EOT,) and {BOS, START, END} <= set(kept.text.forbid) and kept.stop_at_eos
    holes = request_of(rows_of(made), "infill", texts=["<mask>"]).needs.keep_in(SamplerConfig())
    assert {BOS, EOS, EOT} <= set(holes.text.forbid) and not holes.stop_at_eos


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("infill", dict(texts=["a fox"]), "known in full"),
        ("chat", dict(turns=["a"]), "has no marks for turns"),
        ("caption", dict(count=1), "llada cannot do 'caption'; it does chat, complete, infill"),
    ],
)
def test_errors_are_one_clear_sentence(made, task, given, message):
    rows = rows_of(made)
    bare = replace(rows, template=replace(TINY, marks={}))
    with pytest.raises(ValueError, match=message):
        request_of(bare if task == "chat" else rows, task, **given)
