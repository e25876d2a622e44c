"""A unidiff model for other people's evaluation programs: lm-evaluation-harness and lmms-eval."""

from pathlib import Path

LM_EVAL_MODEL = "unidiff.evaluation.harness.lm_eval:UniDiffLM"
TASK_FILE = Path(__file__).with_name("unidiff.yaml")
"""A task file without tasks, whose reading makes lm-evaluation-harness know the model."""
