"""The faces world: portraits made of layers of pixel art, what is said about them, and a reader that finds the layers again."""

from pathlib import Path

from unidiff.world import World, later

FACES = World(
    name="faces",
    model=Path(__file__).resolve().parents[2] / "assets" / "faces" / "model",
    prompts=later("unidiff.worlds.faces.examples:face_prompts"),
    demo=later("unidiff.worlds.faces.examples:run_demo"),
    demo_files=("demo.png", "demo.html"),
    evaluate=later("unidiff.worlds.faces.evaluation:run_faces_eval"),
    benchmark=later("unidiff.worlds.faces.evaluation:judged_tasks"),
    reward=later("unidiff.worlds.faces.evaluation:reader_reward"),
    pictures=later("unidiff.worlds.faces.table:picture_source"),
    cells=later("unidiff.worlds.faces.table:face_cells"),
    examples=later("unidiff.worlds.faces.examples:task_examples"),
)
