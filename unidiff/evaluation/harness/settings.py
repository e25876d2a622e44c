"""What `--model_args` of a harness may say about a unidiff model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from unidiff.pipelines.options import DecodeOptions, own_names, short
from unidiff.schema import Between, check_fields

MOST_DRAWS = 100_000
AUTO_BATCH = 64  # rows to begin with where the batch size is "auto"
TASKS = ("auto", "answer", "caption")
OPTIONS = ("steps", "guidance_scale", "temperature", "cache", "block_length", "threshold", "graphs")
_HERE = {  # as LLaDA's evaluation and the harnesses call them
    **dict(mc_num="draws", is_check_greedy="check_greedy", model_path="pretrained", cfg="cfg_scale"),
    **dict(max_gen_toks="max_text_tokens", torch_dtype="dtype"),
}


@dataclass(frozen=True)
class HarnessSettings:
    """How a harness uses a model.

    Args:
        pretrained: folder, hub model `owner/name`, or an embedded model ("emoji").
        device: auto, cpu, cuda, cuda:N or mps. dtype: of the weights; None for the model's own.
        draws: masks per log-likelihood, each a forward pass; a single token needs one.
        seed: of masks and of everything drawn; each request has its own, which depends on its words and pictures alone.
        batch_size: rows of one pass, results do not depend on it; None ("auto"): as many as fit, at most `max_batch_size`.
        max_length: tokens that a row of text may have; longer contexts lose their beginning.
        max_text_tokens: tokens to write, where given in place of what the task says.
        check_greedy: decode every continuation to say whether it is what the model would write; costs a pass per token.
            Otherwise none is said to be.
        task: what is asked about pictures: "answer" (the context is the question), "caption" (the context is left out), or
            "auto": an answer where there is a question and the model can.
        options: of every decode, of `DecodeOptions`; what is given here goes before what a task asks for.

    Raises:
        ValueError: a value out of range, or of another type.
    """

    pretrained: str
    device: str = "auto"
    dtype: str | None = None
    draws: Annotated[int, Between(1, MOST_DRAWS)] = 128
    seed: int = 0
    batch_size: Annotated[int, Between(1, MOST_DRAWS)] | None = 1
    max_batch_size: Annotated[int, Between(1, MOST_DRAWS)] | None = None
    max_length: Annotated[int, Between(2, 1_000_000)] = 4096
    max_text_tokens: Annotated[int, Between(1, 1_000_000)] | None = None
    check_greedy: bool = False
    task: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "--model_args")
        if self.task not in TASKS:
            raise ValueError(f"--model_args task is {short(self.task)}; expected one of {', '.join(TASKS)}")
        DecodeOptions(**self.options)

    @classmethod
    def of(cls, **given: Any) -> HarnessSettings:
        """From keyword arguments, under the names of other programs too; `ValueError` for one that nothing is called."""
        here = dict[str, Any]()
        for name, value in given.items():
            if (ours := _HERE.get(name, name)) in here:
                raise ValueError(f"--model_args gives {ours} twice, once as {name}; leave one out")
            here[ours] = value
        named = own_names(here)
        own = [f.name for f in fields(cls) if f.name != "options"]
        known = (*own, *OPTIONS)
        if unknown := sorted(set(named) - set(known)):
            near = difflib.get_close_matches(unknown[0], known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected some of {', '.join(known)}"
            raise ValueError(f"--model_args has no {unknown[0]!r}; {hint}")
        if named.get("pretrained") is None:
            raise ValueError("--model_args lacks pretrained=; name a model folder, a hub model or 'emoji'")
        settings = {name: value for name, value in named.items() if name in own}
        if "batch_size" in settings:
            settings["batch_size"] = _batch_size(settings["batch_size"])
        options = {name: value for name, value in named.items() if name in OPTIONS and value is not None}
        return cls(**{**settings, "pretrained": str(settings["pretrained"])}, options=options)

    @property
    def rows(self) -> int:
        """Rows of one pass, to begin with where as many are wanted as fit."""
        return self.batch_size or self.max_batch_size or AUTO_BATCH


def _batch_size(given: Any) -> Any:
    """A whole number, None for "auto" and "auto:N" (which another harness tries N times), or what is neither."""
    if not isinstance(given, str):
        return given
    return None if given.partition(":")[0] == "auto" else int(given) if given.isdecimal() else given
