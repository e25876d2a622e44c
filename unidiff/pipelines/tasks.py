"""Which task a call of the pipeline means, from what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.layout import TASKS
from unidiff.pipelines.inputs import texts_of
from unidiff.pipelines.options import one_of
from unidiff.tokens.text import all_have_holes

_INPUTS: dict[
    str, tuple[set[str], set[str]]
] = {  # what a task needs, and what it takes besides, in the order of choice
    "text_to_image": ({"prompt"}, set()),
    "answer": ({"image", "question"}, set()),
    "caption": ({"image"}, set()),
    "inpaint": ({"image"}, {"mask_image", "text"}),
    "generate": (set(), {"text", "image"}),
    # only by name, or with a model of text alone
    "edit": ({"image", "prompt"}, {"mask_image", "reference"}),
    **dict.fromkeys(("chat", "complete", "infill"), ({"prompt"}, set[str]())),
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

    Raises:
        ValueError: an unknown task, or inputs that no task, or not this one, takes together.
    """
    names = set(given)
    if task is None:
        fits = [name for name, (needs, more) in _INPUTS.items() if needs <= names <= needs | more and name != "edit"]
        if not fits:
            raise ValueError(
                f"no task takes {' and '.join(sorted(names))} together; expected a prompt, an image (with a question, or "
                "with a mask_image and text), text, or nothing"
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
    """Call the method of `pipe` that the inputs mean; arguments and errors as of `choose_task`."""
    if task is None and prompt is not None and pipe.images is None and "chat" in pipe.layout.tasks:
        task = "chat"
    if prompt is not None and task is None and all_have_holes(texts_of(prompt, "prompt", holes=True), "prompt"):
        if inputs.get("text") is not None:
            raise ValueError("prompt and text both hold words; give captions with <mask> holes as text alone")
        prompt, inputs = None, {**inputs, "text": prompt}  # words with holes are filled, not drawn as letters
    given = {**{name: inputs.get(name) for name in _NAMES}, "prompt": prompt}
    known = {name: value for name, value in given.items() if value is not None}
    chosen = choose_task(known, task)
    if chosen in _CALLED:
        known[_CALLED[chosen]] = known.pop("prompt")
    options = {name: value for name, value in inputs.items() if name not in _NAMES}
    return getattr(pipe, chosen)(**known, **options)
