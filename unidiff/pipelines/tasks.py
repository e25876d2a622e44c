"""Which task a call of the pipeline means, from what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.families.layout import TASKS as ALL_TASKS
from unidiff.pipelines.arguments import one_of, texts_of
from unidiff.pipelines.settings import TASKS
from unidiff.words import all_have_holes

_INPUTS = {  # what a task needs, and what it takes besides
    "text_to_image": ({"prompt"}, set()),
    "caption": ({"image"}, set()),
    "answer": ({"image", "question"}, set()),
    "inpaint": ({"image"}, {"mask_image", "text"}),
    "generate": (set(), {"text", "image"}),
}


def choose_task(given: Mapping[str, Any], task: str | None = None) -> str:
    """The task of a call, one of `TASKS`.

    A prompt: text_to_image, or with `<mask>` holes generate. A picture and a question: answer. A picture with a mask or with text: inpaint. A picture
    alone: caption. Text alone, or nothing at all: generate.

    Args:
        given: inputs of the call that are not None, by name.
        task: asked for by name; then only checked.

    Raises:
        ValueError: an unknown task, or inputs that no task, or not this one, takes together.
    """
    names = set(given)
    if task is None:
        order = ("text_to_image", "answer", "caption", "inpaint", "generate")
        fits = [name for name in order if _takes(name, names)]
        if not fits:
            raise ValueError(
                f"no task takes {' and '.join(sorted(names))} together; expected a prompt, an image (with a question, or "
                "with a mask_image and text), text, or nothing"
            )
        return fits[0]
    one_of(task, "task", TASKS)
    if not _takes(task, names):
        needs, more = _INPUTS[task]
        raise ValueError(
            f"task {task!r} was given {sorted(names)}; it needs {sorted(needs) or 'nothing'} and takes {sorted(more)} besides"
        )
    return task


def call_task(pipe: Any, prompt: Any, task: str | None, inputs: Mapping[str, Any]) -> Any:
    """Call the method of `pipe` that the inputs mean; arguments and errors as of `choose_task`."""
    if task is None and prompt is not None and "chat" in pipe.layout.tasks and pipe.images is None:
        task = "chat"
    if task is not None and one_of(task, "task", ALL_TASKS) is None and task not in _INPUTS:
        first = {"image": inputs.get("image")} if task == "edit" else {}
        first["prompt"] = prompt
        if missing := [name for name, value in first.items() if value is None]:
            raise ValueError(f"task {task!r} needs {' and '.join(missing)}")
        return getattr(pipe, task)(*first.values(), **{n: v for n, v in inputs.items() if n not in first})
    if prompt is not None and task is None and all_have_holes(texts_of(prompt, "prompt", holes=True), "prompt"):
        if inputs.get("text") is not None:
            raise ValueError("prompt and text both hold words; give captions with <mask> holes as text alone")
        prompt, inputs = None, {**inputs, "text": prompt}  # words with holes are filled, not drawn as letters
    given = {"prompt": prompt, **{name: inputs.get(name) for name in ("image", "question", "mask_image", "text")}}
    known = {name: value for name, value in given.items() if value is not None}
    options = {name: value for name, value in inputs.items() if name not in given}
    return getattr(pipe, choose_task(known, task))(**known, **options)


def _takes(task: str, names: set[str]) -> bool:
    needs, more = _INPUTS[task]
    return needs <= names <= needs | more
