"""MMBench accuracy (Liu et al. 2023, arXiv 2307.06281) by the rules of VLMEvalKit without a language model as a judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.results.answers import answers_file
from unidiff.evaluation.results.base import Results
from unidiff.evaluation.suites.mmbench import Line, choices, table

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_TURN = 1_000_000  # rows of one question differ by multiples of it
_SHORT = 3  # words, in which "A" is a letter and no article


def chosen(answer: str, options: Mapping[str, str]) -> str:
    """The letter that an answer means; "" for none.

    The one letter of the options that is a word of the answer (none where "A" is among more than three words), else the one
    option whose text is in an answer that is at most twice as long as all options.
    """
    words = answer.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and not ("A" in words and len(words) > _SHORT):
        return letters[0]
    text = answer.lower()
    if len(text) > 2 * sum(map(len, options.values())):
        return ""
    told = [letter for letter, option in options.items() if option.lower() in text]
    return told[0] if len(told) == 1 else ""


def _mmbench(results: Results) -> Numbers:
    path = answers_file(results.path("made"), "unidiff_*.tsv")
    turns = defaultdict[int, list[Line]](list)
    for line in table(path, ("index", "question", "A", "B", "answer", "prediction")):
        if not line["answer"].strip():
            raise ValueError(
                f"{str(path)!r} has no right answer to {line['index']}; only MMBench's server knows those of the test"
            )
        turns[int(line["index"]) % _TURN].append(line)
    unread, hits = 0, dict[int, bool]()
    for index in sorted(turns):
        said = [chosen(line["prediction"], choices(line)) for line in turns[index]]
        unread += said.count("")
        hits[index] = all(letter == line["answer"].strip() for letter, line in zip(said, turns[index], strict=True))
        results.keys.append(str(index))
    if not hits:
        raise ValueError(f"{str(path)!r} is empty; it should have a row for every question")
    if unread:
        results.notes.append(f"{unread} of {sum(map(len, turns.values()))} answers name no option; they count as wrong")
    results.about |= {"unread": unread, "rows": sum(map(len, turns.values()))}
    numbers = {"mmbench_accuracy": Estimate.share(hits.values())}
    for name, key in (("l2-category", "mmbench_ability"), ("category", "mmbench_category")):
        groups = defaultdict[str, list[bool]](list)
        for index, hit in hits.items():
            if group := turns[index][0].get(name, ""):
                groups[group.replace(".", " ")].append(hit)
        numbers |= {f"{key}.{group}": Estimate.share(own) for group, own in groups.items()}
    return numbers


MMBENCH = Metric("mmbench", None, _mmbench, "the table that `unidiff eval run mmbench` writes, with right answers")
