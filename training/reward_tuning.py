"""Tune a text-to-image pipeline towards a reward (UniGRPO).

    python training/reward_tuning.py MODEL OUTPUT --prompts FILE --reward MODULE:FUNCTION [--steps N] [--lora RANK]
    python training/reward_tuning.py emoji runs/tuned --reward oracle --steps 200 --passes 12

FUNCTION(prompts, pictures) gets a list of texts and float pictures [B, 3, H, W] in [0, 1], and returns a number for each
(`--reward my_rewards:brightness`). `oracle` is EmojiEval's exact reader: 1 where it finds in the picture what the text says;
its prompts are then scenes of the generator, seeded apart from EmojiEval's. OUTPUT gets `metrics.jsonl`, `checkpoints` and
`pipeline`, which draws with the passes and the guidance of the run and which `unidiff eval emoji --model OUTPUT/pipeline`
scores. Run the same command again to continue from the newest checkpoint; a killed and continued run ends with the weights
of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from unidiff.files import file_stamp
from unidiff.process import exit_status, parsed, pick_device, set_up_process
from unidiff.train.config import TRACKERS
from unidiff.world import WORLDS

set_up_process(os.environ)
_ORACLE_SEED = 7_310_000  # scenes of their own: EmojiEval's are seeded from 0
_FREE = ("model", "output", "steps", "checkpoint_every", "track", "keep", "fallback", "prompts", "device")
"""What may change between two parts of a run; of places the content is compared."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model")
    add("output", type=Path)
    add("--prompts", type=Path, help="a text file, one prompt a line; not for --reward oracle")
    add("--reward", required=True)
    add("--steps", type=int, default=100)
    add("--prompts-per-step", type=int, default=8)
    add("--group", type=int, default=8, help="pictures per prompt")
    add("--passes", type=int, help="of each decode; fewer are faster, and leave more to be rewarded for")
    scale = (
        "of the decodes, by default the model's own; 1 is none: then what decodes is what is tuned, in half the time"
    )
    add("--guidance-scale", type=float, help=scale)
    kinds = "with --reward oracle: of scenes of one object, several of a kind, pairs and groups"
    add("--kinds", type=float, nargs=4, metavar="SHARE", help=kinds)
    states = "pictures are scored under `random` masks, or from what their own decode saw before a pass (`decoded`)"
    add("--states", default="random", help=states)
    add("--masks", type=int, default=2, help="masks or states per picture, each with an update")
    add("--rows", type=int, default=192, help="pictures per forward pass; more are split")
    add("--cache", default="none", help="of the decodes: none, auto, or the name of a policy")
    add("--lr", type=float, default=1e-5)
    add("--beta", type=float, default=0.01, help="weight of the divergence from the starting model")
    add("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    keep = "share of the change that is saved: weights between the first and the last"
    add("--keep", type=float, default=1.0, help=keep)
    add("--bf16", action="store_true", help="decode in bfloat16 and learn under autocast")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--seed", type=int, default=0)
    add("--track", action="append", default=[], choices=TRACKERS, help="send numbers there too; repeatable")
    add("--checkpoint-every", type=int, default=10, help="steps between checkpoints")
    add("--fallback", action="store_true", help="go on from the checkpoint before a damaged one, if there is one")
    options = parsed(parser, arguments)
    return exit_status(lambda: tune(options))


def tune(options: argparse.Namespace) -> None:
    oracle = options.reward == "oracle"
    if not oracle and options.prompts is None:
        raise ValueError("--prompts is missing; name a text file with one prompt a line")
    if not oracle and options.kinds is not None:
        raise ValueError(f"--kinds {options.kinds} goes with --reward oracle only; leave it out")
    if oracle and options.prompts is not None:
        raise ValueError("--prompts does not go with --reward oracle, which has its own; leave it out")
    if options.kinds is not None and not (all(0 <= k < 1e9 for k in options.kinds) and sum(options.kinds) > 0):
        raise ValueError(f"--kinds is {options.kinds}; expected four shares, none negative and not all 0")

    from unidiff.evaluation.benchmark.measure import model_hash
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.train.reward import RewardConfig
    from unidiff.train.reward_run import check_places, prompts_of, reward_of, tune_pipeline

    names = {field.name for field in fields(RewardConfig)}
    run = RewardConfig(**{name: value for name, value in vars(options).items() if name in names})
    check_places(options.output, options.model)
    device = pick_device(options.device)
    pipe = UniDiffPipeline.from_pretrained(options.model).to(device)
    if oracle:
        reward, prompts = WORLDS["emoji"].reward(pipe, _ORACLE_SEED + options.seed, options.kinds)
    else:
        prompts, reward = prompts_of(options.prompts), reward_of(options.reward)
    about = {name: str(value) for name, value in vars(options).items() if name not in _FREE}
    about["the content of MODEL"] = model_hash(pipe)
    about["the content of --prompts"] = "" if oracle else str(file_stamp(options.prompts)["hash"])
    tune_pipeline(pipe, options.output, reward, prompts, run, about)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
