"""The emoji world: sprites on flat backgrounds, what is said about them, and readers that find them again."""

from pathlib import Path

from unidiff.evaluation.networks.base import NamedNetwork
from unidiff.world import World, later

EMOJI = World(
    name="emoji",
    model=Path(__file__).resolve().parents[2] / "assets" / "emoji" / "model",
    prompts=later("unidiff.worlds.emoji.demo:demo_prompts"),
    demo=later("unidiff.worlds.emoji.demo:run_demo"),
    demo_files=("demo.png", "demo.html"),
    evaluate=later("unidiff.worlds.emoji.evaluation:run_emoji_eval"),
    benchmark=later("unidiff.worlds.emoji.evaluation:judged_tasks"),
    reward=later("unidiff.worlds.emoji.evaluation:oracle_reward"),
    pictures=later("unidiff.worlds.emoji.table:picture_source"),
    cells=later("unidiff.worlds.emoji.table:sprite_cells"),
    examples=later("unidiff.worlds.emoji.examples:task_examples"),
)
READER = NamedNetwork("emoji", later("unidiff.worlds.emoji.features:load_reader"))
