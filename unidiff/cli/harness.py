"""`unidiff eval lm-eval`: EleutherAI's lm-evaluation-harness with a unidiff model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from unidiff.evaluation.harness import LM_EVAL_MODEL, TASK_FILE

PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command whose options are another program's."""


def lm_eval(
    context: typer.Context,
    task_file: Annotated[
        bool, typer.Option("--task-file", help="Say which task file names the model to lm_eval's own command.")
    ] = False,
) -> None:
    """Run lm-evaluation-harness: its own options, and `--model unidiff` where no other model is named."""
    from unidiff.errors import import_extra

    if task_file:
        return typer.echo(TASK_FILE)
    harness = import_extra("lm_eval.__main__", "lm-eval is not installed; run pip install 'unidiff[lm-eval]'")
    import lm_eval.models  # noqa: F401  # its own names, before another one is added
    from lm_eval.api.registry import model_registry

    model_registry.register("unidiff", target=LM_EVAL_MODEL)
    words = context.args
    others = {"ls", "validate", "-h", "--help"} & set(words)
    if words and not others and not any(word == "-M" or word.split("=")[0] == "--model" for word in words):
        words = [*words, "--model", "unidiff"]
    sys.argv = ["lm-eval", *words]  # which the harness reads and changes
    harness.cli_evaluate()
