"""Answers to questions about pictures: VQA accuracy (Antol et al. 2015), GQA (Hudson and Manning 2019) and POPE (Li et al. 2023),
by their scorers' rules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from unidiff.errors import few
from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.resampling import bootstrap, percentile_interval
from unidiff.evaluation.results.answers import answers_file, read_entries
from unidiff.evaluation.results.base import Results
from unidiff.evaluation.suites.gqa import questions

RESAMPLES = 10_000
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_APOSTROPHES = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've couldn't've hadn't've
he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've something'd've there'd've they'd've
we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES.split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}
"""Words that lack one of their apostrophes, and the whole word; the last one is as the official scorer has it."""


def without_marks(text: str) -> str:
    """Punctuation goes, or becomes a space where it stands between letters; at most 32 full stops go."""
    joined, found = _COMMA.search(text) is not None, text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside or joined else " ")
    return _PERIOD.sub("", found, count=32)


def normalise_answer(text: str) -> str:
    """An answer as VQA's scorer compares it: no punctuation or articles, digits for number words, apostrophes."""
    words = without_marks(_on_a_line(text)).lower().split()
    digits = [_NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in digits if word not in _ARTICLES)


def _on_a_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, people: Sequence[str], always: bool = False) -> float:
    """The mean over each person left out of min(1, n / 3), n of the others having said the same.

    Answers are normalised where people differ; where all said the same, the official scorer (2021) compares as it is, and
    "Yes." is not "yes".

    Args:
        always: normalise the model's answer there too, as other programs do.
    """
    said, answer = [_on_a_line(one) for one in people], _on_a_line(answer)
    if len(set(said)) > 1:
        said, answer = [normalise_answer(one) for one in said], normalise_answer(answer)
    elif always:
        answer = normalise_answer(answer)
    same = [one == answer for one in said]
    return float(np.mean([min(1.0, (sum(same) - own) / 3) for own in same]))


def _vqa(results: Results) -> Numbers:
    made = read_entries(answers_file(results.path("made"), "*_results.json"), {"question_id": int, "answer": str})
    against = read_entries(
        answers_file(results.path("against"), "*annotations.json"), {"question_id": int, "answers": list}, "annotations"
    )
    known = {entry["question_id"]: entry for entry in against}
    asked = {entry["question_id"]: entry["answer"] for entry in made}
    if len(asked) < len(made):
        raise ValueError("a question is answered twice; expected one answer for each")
    if strange := sorted(asked.keys() - known.keys()):
        raise ValueError(
            f"{len(strange)} answered questions are not in the annotations: {few(map(str, strange))}; name those of the "
            "same split"
        )
    if len(asked) < len(known):
        results.notes.append(f"{len(asked)} of the {len(known)} questions of the annotations are answered")
    scores: dict[str, list[float]] = defaultdict(list)
    for number in sorted(asked):
        people = [str(one["answer"]) for one in known[number]["answers"]]
        scores["vqa_accuracy"].append(vqa_accuracy(asked[number], people))
        scores["vqa_accuracy_normalised"].append(vqa_accuracy(asked[number], people, always=True))
        if kind := known[number].get("answer_type"):
            scores[f"vqa_answer_type.{str(kind).replace('/', '_')}"].append(scores["vqa_accuracy"][-1])
        results.keys.append(str(number))
    return {key: Estimate.mean(of) for key, of in scores.items()}


def says_yes(answer: str) -> bool:
    """POPE's reading: no, where the first sentence has the word No, no or not."""
    first = answer.split(".")[0].replace(",", "")
    return not {"No", "not", "no"} & set(first.split(" "))


def pope_numbers(answers: Sequence[bool], labels: Sequence[bool], resamples: int = RESAMPLES, seed: int = 0) -> Numbers:
    """Accuracy, precision, recall and share of yes with Wilson's intervals, and F1 with a percentile bootstrap.

    Args:
        answers, labels: whether yes was said, and is right.

    Raises:
        ValueError: answers or labels without any yes: precision or recall is a share of nothing.
    """
    said, true = np.array(answers, bool), np.array(labels, bool)
    if not said.any() or not true.any():
        raise ValueError(
            f"no {'answer' if true.any() else 'label'} is yes, so that there is no precision and no recall"
        )

    def f1(*rows: np.ndarray) -> float:
        a, b = (said[rows[0]], true[rows[0]]) if rows else (said, true)
        return 2 * int((a & b).sum()) / max(1, int(a.sum()) + int(b.sum()))

    return {
        "pope_accuracy": Estimate.share(said == true),
        "pope_precision": Estimate.share(true[said]),
        "pope_recall": Estimate.share(said[true]),
        "pope_f1": percentile_interval(f1(), bootstrap((len(said),), f1, resamples, seed, "f1"), len(said)),
        "pope_yes": Estimate.share(said),
    }


def _pope(results: Results) -> Numbers:
    made = read_entries(answers_file(results.path("made"), "answers.jsonl"), {"question": str, "answer": str})
    against = read_entries(results.path("against"), {"text": str, "label": str})
    if len(made) != len(against):
        raise ValueError(f"{len(made)} answers for {len(against)} questions; expected one for each, in the same order")
    for number, (answer, question) in enumerate(zip(made, against, strict=True), 1):
        if answer["question"] != question["text"]:
            raise ValueError(f"answer {number} is to another question than line {number} of the questions has")
        if question["label"] not in ("yes", "no"):
            raise ValueError(f"question {number} has the label {question['label']!r:.40}; expected yes or no")
    results.keys += [f"{e.get('question_id', n)} {e['text']}" for n, e in enumerate(against)]
    resamples = results.about["resamples"] = results.resamples or RESAMPLES
    labels = [question["label"] == "yes" for question in against]
    return pope_numbers([says_yes(answer["answer"]) for answer in made], labels, resamples, results.seed)


def _gqa(results: Results) -> Numbers:
    made = read_entries(
        answers_file(results.path("made"), "*_predictions.json"), {"questionId": str, "prediction": str}
    )
    asked = {
        number: entry for number, entry in questions(results.path("against")).items() if entry.get("isBalanced", True)
    }
    answers = {entry["questionId"]: entry["prediction"] for entry in made}
    if len(answers) < len(made):
        raise ValueError("a question is answered twice; expected one answer for each")
    if missing := [number for number in asked if number not in answers]:
        raise ValueError(
            f"{len(missing)} questions have no answer: {few(missing)}; name the questions of the same split"
        )
    scores: dict[str, list[bool]] = defaultdict(list)
    for number, entry in asked.items():
        if not isinstance(entry.get("answer"), str):
            raise ValueError(
                f"question {number} has no right answer in its file; only GQA's own server knows those of the test"
            )
        scores["gqa_accuracy"].append(answers[number] == entry["answer"])
        if isinstance(types := entry.get("types"), dict):
            kind = "open" if types.get("structural") == "query" else "binary"
            scores[f"gqa_kind.{kind}"].append(scores["gqa_accuracy"][-1])
        results.keys.append(number)
    return {key: Estimate.share(of) for key, of in scores.items()}


GQA = Metric("gqa", None, _gqa, "answers of a model (GQA)", "the file of GQA's questions, with answers")
VQA = Metric("vqa", None, _vqa, "answers of a model (VQAv2)", "annotations of VQAv2 with ten answers of people")
POPE = Metric("pope", None, _pope, "answers of a model (POPE)", "the file of POPE's questions, with labels")
