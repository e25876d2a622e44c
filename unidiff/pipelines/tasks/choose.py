"""Which task a call of the pipeline means: `choose_task`, `call_task`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.layout import TASKS
from unidiff.pipelines.decode import texts_of
from unidiff.pipelines.options import one_of, own_names
from unidiff.tokens.text import all_have_holes

# what a task needs, and what it takes besides, in the order of choice; the last ones by name, or with a model of text alone
_INPUTS: dict[str, tuple[set[str], set[str]]] = {
    "text_to_image": ({"prompt"}, set()),
    "answer": ({"image", "question"}, set()),
    "caption": ({"image"}, set()),
    "inpaint": ({"image"}, {"mask_image", "text"}),
    "generate": (set(), {"text", "image", "prompt"}),
    "edit": ({"image", "prompt"}, {"mask_image", "reference"}),
    "chat": ({"prompt"}, {"image"}),
    **dict.fromkeys(("complete", "infill"), ({"prompt"}, set[str]())),
}
_NAMES = ("prompt", "image", "question", "mask_image", "text", "reference")
_CALLED = {"chat": "messages", "infill": "text"}  # what these call the prompt


def choose_task(given: Mapping[str, Any], task: str | None = None) -> str:
    """The task of a call, one of `TASKS`.

    A prompt: text_to_image. A picture and a question: answer. A picture with a mask or with text: inpaint. A picture alone:
    caption. Text alone, or nothing at all: generate.

    Args:
        given: inputs of the call that are not None, by name.
        task: asked for by name; then only checked.
    """
    names, by_name = set(given), {"edit", "generate", "chat"} if "prompt" in given else {"edit"}
    if task is None:
        fits = [n for n, (needs, more) in _INPUTS.items() if needs <= names <= needs | more and n not in by_name]
        if not fits:
            raise ValueError(
                f"no task takes {' and '.join(sorted(names))} together; expected a prompt, an image (with a question, or "
                "with a mask_image and text), text, or nothing; a prompt with an image needs mask_image, strength or "
                "task='edit' besides"
            )
        return fits[0]
    one_of(task, "task", TASKS)
    needs, more = _INPUTS[task]
    if not needs <= names <= needs | more:
        raise ValueError(
            f"task {task!r} was given {sorted(names)}; it needs {sorted(needs) or 'nothing'} and takes {sorted(more)} besides"
        )
    return task


def call_task(pipe: Any, prompt: Any, task: str | None, inputs: Mapping[str, Any]) -> Any:
    """Call the method of `pipe` that the inputs mean; arguments and errors as of `choose_task`.

    As with diffusers' pipelines, a prompt may guide a picture that is repainted (mask_image) or redrawn (strength).
    """
    inputs = own_names(inputs)
    messages, text, redrawn = (inputs.pop("messages", None), inputs.get("text"), False)
    if inputs.get("image") is not None and prompt is not None and task is None:
        redrawn = inputs.get("mask_image") is not None or inputs.get("strength") is not None
    if messages is not None:
        if prompt is not None or task not in (None, "chat"):
            raise ValueError("messages are all that chat is given; leave out prompt, and other tasks")
        prompt, task = messages, "chat"
    elif redrawn and "inpaint" in pipe.layout.tasks:
        if text is not None:
            raise ValueError("prompt and text both hold words; give one of them")
        prompt, task, inputs = None, "inpaint", {**inputs, "text": prompt}
    elif redrawn:
        task = "edit"
    if task is None and prompt is not None and pipe.images is None and "chat" in pipe.layout.tasks:
        task = "chat"
    if prompt is not None and task is None and all_have_holes(texts_of(prompt, "prompt", holes=True), "prompt"):
        if text is not None:
            raise ValueError("prompt and text both hold words; give captions with <mask> holes as text alone")
        prompt, inputs = None, {**inputs, "text": prompt}  # words with holes are filled, not drawn as letters
    known = {n: v for n, v in {**{n: inputs.get(n) for n in _NAMES}, "prompt": prompt}.items() if v is not None}
    chosen = choose_task(known, task)
    if chosen in _CALLED:
        known[_CALLED[chosen]] = known.pop("prompt")
    options = {name: value for name, value in inputs.items() if name not in _NAMES}
    return getattr(pipe, chosen)(**known, **options)
