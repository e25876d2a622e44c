"""`docs/extending.md` says the truth: its examples run, are short, and cover every protocol it names."""

from __future__ import annotations

import ast

import pytest
import torch
from doc_code import Block, blocks, run

from unidiff.diffusion import masked_nll
from unidiff.diffusion.likelihood import model_scorer

NAME = "extending.md"
BLOCKS = blocks(NAME)


@pytest.fixture(scope="module")
def namespace() -> dict:
    """What the blocks define, one after the other."""
    space: dict = {"__name__": "extending"}
    for block in BLOCKS:
        run(block, NAME, space)
    return space


def test_every_part_has_its_example(namespace: dict):
    headings = [block.heading for block in BLOCKS]
    parts = [
        "A backbone",
        "An encoder without codes",
        "Features of a released encoder",
        "An image tokenizer",
        "A commit rule",
        "A refresh policy",
        "A schedule",
        "A metric",
        "A metric of files, and a feature network",
        "A world",
        "A family",
        "A family of checkpoints",
    ]
    assert headings[1:] == parts
    parts = {"Recurrent", "Mosaic", "SureAndApart", "EveryNth", "Logarithmic", "CODES_USED", "Parrot", "RND"}
    assert parts <= set(namespace)


@pytest.mark.parametrize("block", BLOCKS[1:], ids=lambda b: b.heading)
def test_an_example_is_about_thirty_lines(block: Block):
    code = [line for line in block.text.splitlines() if line.strip() and not line.startswith(("from", "import"))]
    assert len(code) <= 32
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(block.text)))


def test_rules_are_per_modality_and_always_progress(namespace: dict):
    """A rule that never takes anything fills one position per pass; the other modality keeps its own rule."""
    sampler_of, modality = namespace["Sampler"], namespace["Modality"]
    batch, seeds = namespace["batch"], namespace["seeds"]

    def never(confidence, score, live, count, index):
        return torch.zeros_like(live)

    for policy in (None, namespace["EveryNth"](2)):
        sampler = sampler_of(
            namespace["transformer"],
            namespace["vocabulary"],
            namespace["config"],
            policy,
            rules={modality.IMAGE: never},
        )
        out = sampler(batch, seeds)
        assert out.steps == 16 and not (out.batch.ids == namespace["vocabulary"].mask_id).any()
    plain = sampler_of(namespace["transformer"], namespace["vocabulary"], namespace["config"])(batch, seeds)
    assert plain.steps == 4  # the text's three, the image's four
    assert torch.equal(plain.batch.ids[1], out.batch.ids[1])  # the second row writes text only


def test_the_backbone_can_be_trained_and_scored(namespace: dict):
    """With the same two methods, as the page says."""
    backbone, vocabulary, batch = namespace["backbone"], namespace["vocabulary"], namespace["batch"].rows([1])
    x0 = batch.replace(ids=torch.where(batch.ids == vocabulary.mask_id, 5, batch.ids))
    x_t = x0.hide_targets(vocabulary)
    hidden = backbone.hidden(x_t.ids, x_t.modality, x_t.positions, x_t.attention_mask())
    nll = masked_nll(hidden, backbone.head, x0.targets, x0, vocabulary, count=4)
    nll.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in backbone.parameters() if p.grad is not None)
    assert backbone.out.weight.grad.any()
    backbone.zero_grad(set_to_none=True)
    with torch.no_grad():
        scored = model_scorer(backbone, vocabulary)(x_t, x0, x0.targets)
    torch.testing.assert_close(scored, nll.detach())
    assert (scored > 0).sum() == 3


def test_a_rule_sees_what_the_page_says(namespace: dict):
    seen = []

    def watch(confidence, score, live, count, index):
        seen.append((confidence, score, live, count, index))
        return live

    sampler = namespace["Sampler"](
        namespace["transformer"],
        namespace["vocabulary"],
        namespace["config"],
        rules={namespace["Modality"].TEXT: watch},
    )
    sampler(namespace["batch"], namespace["seeds"])
    confidence, score, live, count, index = seen[0]
    assert len(seen) == 1 and confidence.dtype == torch.float64 and torch.equal(confidence, score)
    assert live.tolist() == [[False] * 3, [True] * 3] and index[1].tolist() == [0, 1, 2] and count.tolist() == [0, 1]
    assert ((confidence > 0) & (confidence <= 1)).all()


def test_rules_that_do_not_fit_are_refused(namespace: dict):
    make = namespace["Sampler"]
    parts = (namespace["transformer"], namespace["vocabulary"], namespace["config"])
    with pytest.raises(ValueError, match="rules"):
        make(*parts, rules={"image": lambda *a: a})
    sampler = make(*parts, rules={namespace["Modality"].IMAGE: lambda *a: a[2][:, :1]})
    with pytest.raises(ValueError, match="commit rule"):
        sampler(namespace["batch"], namespace["seeds"])
