"""A unidiff model for other people's evaluation programs: lm-evaluation-harness and lmms-eval."""

from pathlib import Path
from typing import Any

LM_EVAL_MODEL = "unidiff.evaluation.harness.lm_eval:UniDiffLM"
TASK_FILE = Path(__file__).with_name("unidiff.yaml")
"""A task file without tasks, whose reading makes lm-evaluation-harness know the model."""


def lmms_eval_model() -> Any:
    """The entry point of lmms-eval: what the model is called and where it is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("unidiff", simple_class_path="unidiff.evaluation.harness.lmms_eval.UniDiffLMM")
