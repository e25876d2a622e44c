"""What the studio asks for each task, and how a filled-in form becomes the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unidiff.pipelines.options import one_of, short, whole

MOST_LETTERS = 4000
"""Longest text that a form takes, in characters."""
MOST_STEPS, MOST_CANDIDATES, MOST_NEW_TOKENS, MOST_TURNS = 256, 8, 512, 40
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class StudioTask:
    """A tab.

    Args:
        name: the pipeline's method. title, button, about: what a person reads.
        words: the argument that takes what is typed, "" for none. label, hint: of its box.
        optional: whether the box may stay empty. picture, mask: whether the tab has a picture, and a brush on it.
        writes: whether the longest text can be chosen.
    """

    name: str
    title: str
    button: str
    about: str
    words: str = ""
    label: str = ""
    hint: str = ""
    optional: bool = False
    picture: bool = False
    mask: bool = False
    writes: bool = False


TASKS = (
    StudioTask(
        "text_to_image",
        "Draw",
        "Draw",
        "A picture from words.",
        "prompt",
        "Prompt",
        "What should the picture show?",
    ),
    StudioTask("caption", "Describe", "Describe", "Words for a picture.", picture=True),
    StudioTask(
        "answer",
        "Ask",
        "Ask",
        "An answer to a question about a picture.",
        "question",
        "Question",
        "What would you like to know?",
        picture=True,
    ),
    StudioTask(
        "inpaint",
        "Complete",
        "Complete",
        "Paint over a part of the picture, write <mask> for words that you leave open (<mask:3> for three tokens), and both "
        "are filled in together.",
        "text",
        "Caption",
        "a <mask> on a green background",
        optional=True,
        picture=True,
        mask=True,
    ),
    StudioTask(
        "generate",
        "Invent",
        "Invent",
        "A picture and its caption together, from nothing or from a text with <mask> in it.",
        "text",
        "Text with <mask> (may stay empty)",
        "leave it empty, or: a <mask:2> on a <mask> background",
        optional=True,
    ),
    StudioTask(
        "edit",
        "Edit",
        "Edit",
        "A picture changed as told.",
        "prompt",
        "What to change",
        "make the sky red",
        picture=True,
    ),
    StudioTask(
        "chat", "Chat", "Send", "A conversation.", "messages", "Message", "Ask something", writes=True
    ),
    StudioTask(
        "complete",
        "Go on",
        "Go on",
        "A text, written on.",
        "prompt",
        "Beginning",
        "Once upon a time",
        writes=True,
    ),
    StudioTask(
        "infill",
        "Fill in",
        "Fill in",
        "A text with <mask> holes (<mask:3> for three tokens), filled in.",
        "text",
        "Text",
        "The capital of <mask> is Paris.",
    ),
)  # fmt: skip
BY_NAME = {task.name: task for task in TASKS}

PRESETS: Mapping[str, tuple[int, float, str, int]] = {
    "Fast": (6, 0.0, "auto", 1),
    "Balanced": (12, 0.0, "auto", 1),
    "Model's own": (0, 0.0, "none", 1),
    "Careful": (64, 0.0, "none", 4),
}
"""Positions of the dial: steps, threshold, cache, candidates; 0 is the model's own."""


@dataclass(frozen=True)
class Dial:
    """Speed against quality: passes, and what is kept of them. 0 steps and threshold 0 are the model's own.

    Raises:
        ValueError: a value of another kind or out of range.
    """

    steps: int = 0
    threshold: float = 0.0
    cache: str = "none"
    candidates: int = 1

    def __post_init__(self) -> None:
        from unidiff.decoding.cache.config import CACHES

        whole(self.steps, "steps", 0, MOST_STEPS, "; 0 is the model's own")
        whole(self.candidates, "candidates", 1, MOST_CANDIDATES)
        one_of(self.cache, "cache", ("auto", *CACHES))
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {short(self.threshold)}; expected a number from 0 (the model's own) to 1")

    def options(self, pipe: Any, task: str) -> dict[str, Any]:
        """Arguments of a call, those that say something only."""
        several = self.candidates != pipe.layout.candidates(task) and pipe.images is not None
        asked = {
            "steps": self.steps or None,
            "threshold": round(self.threshold, 4) or None,
            "cache": None if self.cache == "none" else self.cache,
            "num_candidates": self.candidates if several else None,
        }
        return {name: value for name, value in asked.items() if value is not None}


def tasks_of(pipe: Any) -> list[StudioTask]:
    """The tabs of a loaded model: what its family can do, and it was trained for where that is noted; else all of it."""
    able = [task for task in TASKS if task.name in pipe.layout.tasks]
    return [task for task in able if not pipe.layout.note(task.name)] or able


def call_arguments(
    pipe: Any,
    task: StudioTask,
    words: Any = None,
    picture: Any = None,
    mask: Any = None,
    dial: Dial | None = None,
    seed: Any = 0,
    longest: Any = 0,
    said: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Arguments of the pipeline's method `task.name` for a filled-in form.

    Args:
        words: what was typed. picture, mask: PIL images of the model's size, see `unidiff.studio.uploads`.
        longest: most tokens of a text, 0 for the usual. said: the conversation before `words`.

    Raises:
        ValueError: something is missing, too long or of another kind.
    """
    made: dict[str, Any] = {}
    if task.picture:
        if picture is None:
            raise ValueError("there is no picture yet; choose one, or click an example")
        made["image"] = picture
    if task.words:
        text = _text(words, task)
        if text:
            told = task.name in pipe.layout.words_beside  # a prompt, which words and a picture answer
            made["prompt" if told else task.words] = _turns(pipe, said, text) if task.name == "chat" else text
    if task.mask:
        if mask is not None:
            made["mask_image"] = mask
        elif "text" not in made:
            raise ValueError("nothing is left open; paint over a part of the picture, or write <mask> into the caption")
    if task.writes and longest:
        made["max_text_tokens"] = whole(longest, "the longest text", 1, MOST_NEW_TOKENS, " tokens")
    made |= (dial or Dial()).options(pipe, task.name)
    return {**made, "generator": whole(seed, "the seed", 0, MOST_SEED)}


def _text(words: Any, task: StudioTask) -> str:
    if words is None:
        words = ""
    if not isinstance(words, str):
        raise ValueError(f"{task.label} is {short(words)}; expected a text")
    if len(words) > MOST_LETTERS:
        raise ValueError(f"the text has {len(words)} characters; expected at most {MOST_LETTERS}")
    if not words.strip() and not task.optional:
        raise ValueError(f"{task.label} is empty; write at least one word, or click an example")
    return words.strip()


def _turns(pipe: Any, said: Sequence[Mapping[str, str]], text: str) -> str | list[dict[str, str]]:
    """The conversation with its last words; these alone where the family knows no others."""
    if not pipe.layout.conversations:
        return text
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in said][-MOST_TURNS:]
    return [*turns, {"role": "user", "content": text}]


def about_model(pipe: Any, name: str) -> str:
    """One line about the loaded model."""
    millions = sum(weights.numel() for weights in pipe.transformer.parameters()) / 1e6
    size = f"{millions / 1000:.1f} B" if millions >= 1000 else f"{millions:.1f} M"
    pictures = "" if pipe.images is None else f", {pipe.image_size[1]} x {pipe.image_size[0]} pixels"
    known = [word for word in sorted(pipe.texts.known_words or ()) if len(word) > 3]
    some = known[:: max(1, len(known) // 4)][:4]
    words = f"; it knows {len(pipe.texts.known_words)} words, such as {', '.join(some)}" if some else ""
    return f"{name}: {pipe.layout.family}, {size} parameters{pictures}{words}"
