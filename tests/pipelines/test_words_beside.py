"""Words and a picture answered together, as a prompt tells: which families can, and what others say."""

from __future__ import annotations

import pytest
import torch
from tiny_pipeline import tiny_pipeline

from unidiff.families.layout import RowLayout
from unidiff.pipelines.tasks.choose import choose_task


class Both(RowLayout):
    """A family that writes words in `generate`, and in `edit` where it is asked to."""

    family = "both"
    words_beside = {"generate": 9, "edit": 0}  # noqa: RUF012


def test_a_prompt_means_a_picture_alone_unless_generate_is_named():
    assert choose_task({"prompt": "a"}) == "text_to_image"
    assert choose_task({"prompt": "a"}, "generate") == "generate"
    assert choose_task({}) == "generate"
    with pytest.raises(ValueError, match="no task takes image and prompt together"):
        choose_task({"prompt": "a", "image": 1})
    with pytest.raises(ValueError, match="no task takes prompt and text together"):
        choose_task({"prompt": "a", "text": "b"})


def test_a_family_says_how_many_words_it_writes_beside_a_picture():
    family = Both()
    assert family.usual_words("generate", None) == 9
    assert family.usual_words("edit", None) == 0 and family.usual_words("edit", 5) == 0
    other = tiny_pipeline()
    assert other.layout.usual_words("edit", None) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate(prompt="a dog"), "answers no prompt in words and a picture; leave prompt out"),
        (lambda p: p("a dog", "generate"), "answers no prompt in words and a picture; leave prompt out"),
        (lambda p: p.generate("a <mask>", prompt="a dog"), "leave text and image out"),
        (lambda p: p.generate(prompt=""), "the prompt is empty"),
        (
            lambda p: p.layout.usual_words("edit", 4),
            "edit of .* answers no prompt in words and a picture; leave max_text_tokens out",
        ),
    ],
)
def test_what_a_family_cannot_do_is_one_clear_sentence(call, message):
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        call(pipe)
    assert torch.is_tensor(pipe.generate(generator=0, output_type="codes").codes)
