"""MMMU accuracy (Yue et al. 2024), by the rules of its scorer, except that what it would guess at random counts 1 / choices."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.results.answers import read_mmmu
from unidiff.evaluation.results.base import Results

_BEFORE_AN_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # with an exponent
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
Answer = str | float


def chosen_letter(response: str, choices: Sequence[str], options: Mapping[str, str]) -> str | None:
    """The letter that a response means: the last "(A)", else the last "A" alone, else in more than five words the last
    option that is said in full; None where there is none of these."""
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    places = {letter: response.rfind(f"({letter})") for letter in choices}
    if max(places.values(), default=-1) < 0:
        places = {letter: response.rfind(f" {letter} ") for letter in choices}
    if max(places.values(), default=-1) < 0 and len(response.split()) > 5:
        places = {letter: response.lower().rfind(str(said).lower()) for letter, said in options.items()}
    best = max(places, key=lambda letter: places[letter], default=None)  # of equal places the first
    return None if best is None or places[best] < 0 else best


def normalised(text: str) -> list[Answer]:
    """A number to two digits, or words in lower case; a single letter only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answers(response: str) -> list[Answer]:
    """What an answer in free words may mean: what follows its "is", "so", ..., and the numbers in that."""
    response = response.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", response)
    found = []
    for number, part in enumerate(parts):
        before = (*_BEFORE_AN_ANSWER, "=") if number == len(parts) - 1 else _BEFORE_AN_ANSWER
        shortest = ""
        for tail in (part.split(word)[-1].strip() for word in before if word in part):
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest not in ("", ":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    found = found or [response]
    texts = [*found, *(number for text in found for way in _NUMBERS for number in re.findall(way, text))]
    return [answer for text in texts for answer in normalised(text)]


def open_is_right(response: str, answer: str | Sequence[str]) -> bool:
    """Whether a right answer is in one of the words, or is one of the numbers, that a response may mean."""
    right = [one for text in ([answer] if isinstance(answer, str) else answer) for one in normalised(str(text))]
    return any(
        any(isinstance(one, str) and one in said for one in right) if isinstance(said, str) else said in right
        for said in open_answers(response)
    )


def credit(entry: Mapping[str, Any]) -> float | None:
    """1 or 0 for a response; None where no letter can be read."""
    if entry["question_type"] != "multiple-choice":
        return float(open_is_right(entry["response"], entry["answer"]))
    if not entry["all_choices"]:
        raise ValueError(f"{entry['id']} is multiple-choice and has no choices; its file is damaged")
    letter = chosen_letter(entry["response"], entry["all_choices"], entry["index2ans"])
    if letter is None:
        return None
    right = entry["answer"]
    return float(letter in right if isinstance(right, list) else letter == right)


def _mmmu(results: Results) -> Numbers:
    categories, unread = defaultdict(list), 0
    entries = read_mmmu(results.path("made"))
    for entry in entries:
        if entry.get("answer") in (None, "", "?"):
            raise ValueError(
                f"{entry['id']} has no right answer in its file; only its own server knows those of the test"
            )
        score = credit(entry)
        unread += score is None
        guess = 1 / max(1, len(entry["all_choices"]))
        categories[entry["category"]].append(guess if score is None else score)
        results.keys.append(entry["id"])
    if unread:
        results.notes.append(f"{unread} of {len(entries)} responses name no option; each counts 1 / its options")
    results.about["unread"] = unread
    numbers = {"mmmu_accuracy": Estimate.mean([score for of in categories.values() for score in of])}
    return numbers | {f"mmmu_category.{name}": Estimate.mean(of) for name, of in categories.items()}


MMMU = Metric("mmmu", None, _mmmu, "a folder of CATEGORY/output.json, as `unidiff eval run mmmu` writes it")
