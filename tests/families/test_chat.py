"""Chat rows: the template's ids, answers up to their end, padding on either side, blocks and caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from unidiff.decoding.cache import DualCache, NoCache, PrefixCache
from unidiff.families.chat import DREAM_CHAT, LLADA_CHAT, ChatRows, llada_sampler
from unidiff.families.llada import LLADA
from unidiff.families.registry import named_vocabulary
from unidiff.families.tasks import run_task
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


def rows_of(made, left=True, **settings) -> ChatRows:
    vocabulary = made[1]
    config = llada_sampler(vocabulary, **{"steps": 6, "block_length": 4, **settings})
    config = replace(config, text=replace(config.text, forbid=(*config.text.forbid, BOS, START, END)))
    return ChatRows(vocabulary, TINY, encode, config, left)


def run(made, request, seeds, policy=None):
    return run_task(made[0], made[1], request, seeds, policy)


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
    rows = ChatRows(
        Vocabulary(30, (0, 30), (30, 30), 29),
        replace(DREAM_CHAT, marks=marks, system="You are a helpful assistant."),
        encode,
    )
    assert rows.ids("what is a fox") == [20, 3, 0, 8, 9, 4, 10, 11, 21, 0, 20, 1, 0, 6, 7, 4, 5, 21, 0, 20, 2, 0]
    assert replace(rows, template=replace(rows.template, system=None))._settings().text.confidence == "entropy"
    asked = [{"role": "system", "content": "helpful"}, {"role": "user", "content": "fox"}]
    assert rows.ids(asked)[:5] == [20, 3, 0, 10, 21]


def test_released_marks_agree_with_the_vocabulary():
    vocabulary, mmada = named_vocabulary("llada"), named_vocabulary("mmada").specials
    assert LLADA_CHAT.marks["eot"] == vocabulary.specials["eot"]
    assert all(mmada[name] == i for name, i in LLADA_CHAT.marks.items())
    config = ChatRows(vocabulary, LLADA_CHAT)._settings()
    assert config.ends == (126348,) and set(config.text.forbid) == {126080, 126346, 126347}


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_an_answer_does_not_depend_on_the_batch(made, left, guidance):
    """Questions of different lengths, padded on either side, in blocks, with and without guidance."""
    questions = ["what is a fox", "fox", "a fox is what"]
    together = run(made, rows_of(made, left, guidance=guidance, temperature=0.8).ask(questions, 8), [1, 2, 3])
    for row, question in enumerate(questions):
        alone = run(made, rows_of(made, guidance=guidance, temperature=0.8).ask([question], 8), [row + 1])
        assert alone.texts[0] == together.texts[row]
        targets = alone.output.batch.ids[0, -8:]
        batch = together.output.batch
        assert torch.equal(batch.ids[row][batch.valid[row]][-8:], targets)


def test_blocks_are_decoded_one_after_the_other(made):
    request = rows_of(made).ask(["what", "a fox"], 8)
    result = run_task(
        made[0], made[1], replace(request, config=replace(request.config, stop_at_eos=False)), [1, 2], record=True
    )
    for ids in result.output.trajectory:
        answer = ids[:, -8:] == MASK
        assert not (answer[:, :4].any(1) & ~answer[:, 4:].all(1)).any()


@pytest.mark.parametrize("end", [EOS, EOT])
def test_an_answer_ends_at_end_of_text_or_turn(made, end):
    model, vocabulary = made
    loud = MaskedTransformer(**{**LLADA.settings(CONFIG), "head_bias": True}).eval()
    loud.load_state_dict({**model.state_dict(), "output_bias": torch.zeros(70)})
    loud.output_bias.data[end] = 100.0
    request = rows_of(made, steps=8).ask(["what", "a fox"], 8)
    result = run_task(loud, vocabulary, request, [1, 2])
    assert result.texts == [[], []] and result.output.steps < 8
    answers = result.output.batch.ids[:, -8:]
    assert set(answers.flatten().tolist()) <= {end, EOS}


@pytest.mark.parametrize("policy", [PrefixCache(interval=1), DualCache(interval=1)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_caches_refreshed_in_every_pass_change_nothing(made, policy, threshold):
    request = rows_of(made, threshold=threshold).ask(["what is a fox", "fox"], 8)
    plain, cached = (run(made, request, [1, 2], p) for p in (NoCache(), policy))
    assert torch.equal(plain.output.batch.ids, cached.output.batch.ids)
    fast = run(made, request, [1, 2], type(policy)())
    assert fast.output.stats.partial_passes > 0 and not (fast.output.batch.ids == MASK).any()


def test_infilling_leaves_the_rest(made):
    texts = [[4, MASK, 5, MASK, MASK], [MASK, 7]]
    result = run(made, rows_of(made).infill(texts), [1, 2])
    for filled, text in zip(result.texts, texts, strict=True):
        assert len(filled) == len(text) and MASK not in filled and not {EOS, EOT, BOS} & set(filled)
        assert all(b == a for a, b in zip(text, filled, strict=True) if a != MASK)


def test_completion_takes_a_text_as_it_is(made):
    request = rows_of(made).complete(["a fox", [4]], 4)
    assert request.batch.ids[0, :2].tolist() == [4, 5] and request.batch.targets.sum(1).tolist() == [4, 4]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.ask([" "]), "the question is empty"),
        (lambda r: r.ask([[{"role": "user"}]]), "exactly a role and a content"),
        (lambda r: r.ask(["fox"], 0), "answer_length is 0"),
        (lambda r: r.complete([[]]), "prompt is empty"),
        (lambda r: r.ask([]), "no rows given"),
        (lambda r: replace(r, encode=None).ask(["fox"]), "need a tokenizer"),
    ],
)
def test_errors_are_one_clear_sentence(made, call, message):
    with pytest.raises(ValueError, match=message):
        call(rows_of(made))
