"""A world."""

from pathlib import Path

from unidiff.evaluation.report import Estimate, EvaluationReport
from unidiff.pipelines.sheet import save_image
from unidiff.world import World

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.1), "blue": (0.1, 0.1, 0.9)}


def evaluate(pipe, seed, n, per_task=None, tasks=(), batch_size=64, tick=lambda *_: None, kept=None, **options):
    """Is the picture of "a red fox" more red than anything else?"""
    words = [f"a fox on a {colour} background" for colour in COLOURS for _ in range(n)]
    means = pipe.text_to_image(words, generator=seed, output_type="pt", **options).images.mean((2, 3))  # [B, 3]
    right = [list(COLOURS)[int(mean.argmax())] in word for word, mean in zip(words, means, strict=True)]
    report = EvaluationReport(about={"seed": seed})
    report.add("colour", Estimate.share(right))
    return report


def demo(pipe, folder, seed):
    path = Path(folder) / "dots.png"
    save_image(pipe.text_to_image("a fox on a red background", generator=seed).images[0], path)
    return (path,)


def nothing(*_, **__):
    raise ValueError("the world dots has no such part")


DOTS = World("dots", None, lambda: ["a fox"], demo, ("dots.png",), evaluate, *[nothing] * 4)
