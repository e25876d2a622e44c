"""`--model unidiff` of lmms-eval, which finds it by the entry point group `lmms_eval.models`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from lmms_eval.api.model import lmms
from tqdm import tqdm

from unidiff.evaluation.harness.asked import Context, without_marks
from unidiff.evaluation.harness.model import HarnessModel
from unidiff.evaluation.harness.settings import HarnessSettings

Found = TypeVar("Found")


class UniDiffLMM(lmms):
    """A unidiff pipeline behind the interface of lmms-eval, for questions about one picture each.

    Args:
        given: see `HarnessSettings`. pipe: a pipeline that is loaded already.
    """

    is_simple = True

    def __init__(self, pipe: Any = None, **given: Any) -> None:
        super().__init__()
        given = given if pipe is None else {"pretrained": "a pipeline", **given}
        self.model = HarnessModel(HarnessSettings.of(**given), pipe)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> UniDiffLMM:
        """`--model_args`, which go before what `--device` and `--batch_size` say."""
        from lmms_eval.utils import simple_parse_args_string

        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**more, **simple_parse_args_string(arg_string)})

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Pairs of -log p (see `HarnessModel.log_likelihoods`), as lmms-eval takes the least for the best, and greediness.

        The evaluator makes strings of what it does not know, which leaves no pair to read; what a result of its own type
        holds is passed on as it is.
        """
        from lmms_eval.api.instance import GenerationResult

        asked = [(self._context(*_parts(request)), request.args[1]) for request in requests]
        found = _collected("loglikelihood", len(asked), self.model.log_likelihoods(asked))
        return [GenerationResult((-value, greedy)) for value, greedy in found]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """See `HarnessModel.write`."""
        asked = [(self._context(*_parts(request)), request.args[1]) for request in requests]
        return _collected("generate_until", len(asked), self.model.write(asked))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Always `ValueError`."""
        raise ValueError("a unidiff model answers one question at a time; leave tasks of several rounds out")

    def generate_visual_cot(self, requests: Sequence[Any]) -> list[str]:
        """Always `ValueError`."""
        raise ValueError("a unidiff model draws no pictures on the way to an answer; leave visual_cot tasks out")

    def _context(self, words: str, shown: Callable[[Any], Any] | None = None, *place: Any) -> Context:
        if shown is None:
            return Context(words)
        number, task, split = place
        visuals = shown(self.task_dict[task][split][number])
        visuals = visuals if isinstance(visuals, list | tuple) else [visuals]
        pictures = tuple(visual for visual in visuals if visual is not None)
        for picture in pictures:
            if not hasattr(picture, "tobytes") or not hasattr(picture, "mode"):
                kind = type(picture).__name__
                raise ValueError(f"task {task} shows a {kind}, and a unidiff model reads still pictures; use another")
        return Context(without_marks(words), pictures)


def _parts(request: Any) -> tuple[Any, ...]:
    """Words, what makes pictures of a document, and where that is."""
    args = request.args
    return args[0], *args[2:]


def _collected(kind: str, count: int, found: Iterable[tuple[int, Found]]) -> list[Found]:
    """Results in the order of the requests."""
    results = dict(tqdm(found, desc=f"Running {kind} requests", total=count))
    return [results[number] for number in range(count)]
