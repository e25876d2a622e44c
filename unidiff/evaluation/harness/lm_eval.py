"""`--model unidiff` of EleutherAI's lm-evaluation-harness, which imports this module when the model is asked for.

The harness finds models by import alone. Either its own program is given `TASK_FILE`, an empty group that names this model,
beside the tasks (`lm_eval --model unidiff --tasks FILE,gsm8k`), or it is started by `unidiff eval lm-eval`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

import lm_eval.models  # noqa: F401  # its own models, added to an empty registry only
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from unidiff.evaluation.harness.asked import Context, without_marks
from unidiff.evaluation.harness.model import HarnessModel
from unidiff.evaluation.harness.settings import HarnessSettings

_log = logging.getLogger("lm_eval.unidiff")  # which the harness shows
Found = TypeVar("Found")


@register_model("unidiff")
class UniDiffLM(LM):
    """A unidiff pipeline behind the harness's interface.

    Args:
        given: see `HarnessSettings`. pipe: a pipeline that is loaded already, for `lm_eval.simple_evaluate`.
    """

    def __init__(self, pipe: Any = None, **given: Any) -> None:
        super().__init__()
        given = given if pipe is None else {"pretrained": "a pipeline", **given}
        if given.get("device") == "cuda:0" and not _has_cuda():  # what the harness says where nobody said anything
            given["device"] = "auto"
        self.model = HarnessModel(HarnessSettings.of(**given), pipe)
        self._device = self.model.device
        self.MULTIMODAL = self.model.sees

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """As `create_from_arg_obj`, of `name=value,...`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """`--model_args`, which go before what `--device` and `--batch_size` say, as these have defaults."""
        return cls(**{**{k: v for k, v in (additional_config or {}).items() if v is not None}, **arg_dict})

    @property
    def tokenizer_name(self) -> str:
        """Of request caches."""
        return self.model.settings.pretrained.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What a question becomes, for the record; `ValueError` for a template by name."""
        if not isinstance(chat_template, bool):
            raise ValueError(f"this model has one chat template and none called {chat_template!r}; leave the name out")
        return self.model.chat_text([{"role": "user", "content": "{content}"}]) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See `HarnessModel.chat_text`."""
        return self.model.chat_text(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """See `HarnessModel.log_likelihoods`."""
        asked = [(_context(request.args), request.args[1]) for request in requests]
        found = self._collected("loglikelihood", requests, self.model.log_likelihoods(asked))
        if widths := self.model.half_widths:
            text = "95 %% intervals of log-likelihoods: half-width %.3g nats on average, %.3g at most (%d draws)"
            _log.info(text, sum(widths) / len(widths), max(widths), self.model.settings.draws)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """See `HarnessModel.rolling`."""
        texts = [request.args[0] for request in requests]
        return self._collected("loglikelihood_rolling", requests, self.model.rolling(texts))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """See `HarnessModel.write`."""
        asked = [(_context(request.args), request.args[1]) for request in requests]
        return self._collected("generate_until", requests, self.model.write(asked))

    def get_model_info(self) -> dict[str, Any]:
        """What `results.json` says about the model."""
        return self.model.about()

    def _collected(self, kind: str, requests: Sequence[Any], found: Iterable[tuple[int, Found]]) -> list[Found]:
        """Results in the order of the requests; each is put into the harness's cache as it comes."""
        results = dict[int, Found]()
        for number, result in tqdm(found, desc=f"Running {kind} requests", total=len(requests)):
            results[number] = result
            self.cache_hook.add_partial(kind, requests[number].args, result)
        return [results[number] for number in range(len(requests))]


def _context(args: Sequence[Any]) -> Context:
    """Words, and pictures where the third argument has some."""
    more: Mapping[str, Any] = args[2] if len(args) > 2 else {}
    if unknown := sorted(set(more) - {"visual"}):
        raise ValueError(
            f"the task gives {', '.join(unknown)}, and a unidiff model takes words and pictures; use another"
        )
    pictures = tuple(more.get("visual") or ())
    return Context(without_marks(args[0]) if pictures else args[0], pictures)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
