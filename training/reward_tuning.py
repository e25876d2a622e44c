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
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff.errors import check_regular, first_line, reading
from unidiff.files import file_stamp, locked
from unidiff.process import parsed
from unidiff.train.config import TRACKERS
from unidiff.train.run.startup import exit_status, set_up_process
from unidiff.world import WORLDS

if TYPE_CHECKING:
    from torch import Tensor

    from unidiff.pipeline import UniDiffPipeline
    from unidiff.train.reward import RewardTuner

set_up_process(os.environ)
PictureReward = Callable[[list[str], "Tensor"], "Tensor"]
Prompts = Callable[[int], str]  # by number, so that a position needs no state
_ORACLE_SEED = 7_310_000  # scenes of their own: EmojiEval's are seeded from 0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line; not for --reward oracle")
    parser.add_argument("--reward", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts-per-step", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="pictures per prompt")
    parser.add_argument(
        "--passes", type=int, help="of each decode; fewer are faster, and leave more to be rewarded for"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        help="of the decodes, by default the model's own; 1 is none: then what decodes is what is tuned, in half the time",
    )
    parser.add_argument(
        "--kinds",
        type=float,
        nargs=4,
        metavar="SHARE",
        help="with --reward oracle: of scenes of one object, several of a kind, pairs and groups",
    )
    parser.add_argument(
        "--states",
        default="random",
        help="pictures are scored under `random` masks, or from what their own decode saw before a pass (`decoded`)",
    )
    parser.add_argument("--masks", type=int, default=2, help="masks or states per picture, each with an update")
    parser.add_argument("--rows", type=int, default=192, help="pictures per forward pass; more are split")
    parser.add_argument("--cache", default="none", help="of the decodes: none, auto, or the name of a policy")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.01, help="weight of the divergence from the starting model")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    parser.add_argument(
        "--keep",
        type=float,
        default=1.0,
        help="share of the change that is saved: weights between the first and the last",
    )
    parser.add_argument("--bf16", action="store_true", help="decode in bfloat16 and learn under autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--track", action="append", default=[], choices=TRACKERS, help="send numbers there too; repeatable"
    )
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument(
        "--fallback", action="store_true", help="go on from the checkpoint before a damaged one, if there is one"
    )
    options = parsed(parser, arguments)

    return exit_status(lambda: tune(options))


def check_options(options: argparse.Namespace) -> None:
    """Raise `ValueError` for the first option that cannot work, before anything is read or written."""
    counts = (options.steps, options.prompts_per_step, options.checkpoint_every, options.rows)
    if min(counts) < 1 or (options.passes is not None and options.passes < 1):
        raise ValueError("--steps, --prompts-per-step, --passes, --rows and --checkpoint-every must be at least 1")
    whole = {"steps": (1, 10**12), "prompts_per_step": (1, 2**20), "checkpoint_every": (1, 10**12), "rows": (1, 2**20)}
    whole |= {"passes": (1, 2**20), "group": (2, 2**16), "masks": (1, 2**16), "lora": (0, 2**16), "seed": (0, 2**40)}
    for name, (low, high) in (whole | {"lr": (1e-30, 1e3), "beta": (0, 1e9)}).items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected a number from {low:g} to {high:g}")
    if not 0 < options.keep <= 1:
        raise ValueError(f"--keep is {options.keep}; expected a share above 0 and at most 1")
    if options.kinds is not None and not (all(0 <= k < 1e9 for k in options.kinds) and sum(options.kinds) > 0):
        raise ValueError(f"--kinds is {options.kinds}; expected four shares, none negative and not all 0")
    output, model = Path(os.path.realpath(options.output)), Path(os.path.realpath(options.model))
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(options.output)!r} is a file or a device; name a folder to write to")
    if model.is_dir() and (model == output or model.is_relative_to(output) or output.is_relative_to(model)):
        raise ValueError(
            f"OUTPUT {str(options.output)!r} and MODEL {options.model!r} lie inside each other; name another output folder"
        )
    if options.reward != "oracle" and options.prompts is None:
        raise ValueError("--prompts is missing; name a text file with one prompt a line")
    if options.reward != "oracle" and options.kinds is not None:
        raise ValueError(f"--kinds {options.kinds} goes with --reward oracle only; leave it out")
    if options.reward == "oracle" and options.prompts is not None:
        raise ValueError("--prompts does not go with --reward oracle, which has its own; leave it out")


def tune(options: argparse.Namespace) -> None:
    import torch

    from unidiff.decoding.cache.config import choose_cache
    from unidiff.evaluation.benchmark.cells import model_hash
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.train.config import LoraConfig, OptimiserConfig
    from unidiff.train.lora import add_adapters, merge_adapters
    from unidiff.train.reward import RewardConfig, RewardTuner, keep_share

    check_options(options)
    pipe = as_decoded(UniDiffPipeline.from_pretrained(options.model), options)
    content = model_hash(pipe)
    reward, prompts = find_reward(options, pipe)
    texts: list[str] = []
    model, settings = pipe.transformer, pipe.settings

    def score(finished):
        codes = finished.ids[:, settings.text_length :].unflatten(1, settings.grid) - settings.vocabulary.image[0]
        repeated = [text for text in texts for _ in range(options.group)]
        return reward(repeated, pipe.images.decode(codes).cpu())

    torch.manual_seed(options.seed)  # adapters are drawn
    add_adapters(model, LoraConfig(rank=options.lora, alpha=2.0 * options.lora))
    optimiser = OptimiserConfig(lr=options.lr, weight_decay=0.0)
    sampler = settings.sampler("text_to_image")
    batch, _ = prompt_rows(pipe, [prompts(0)] * max(1, min(options.rows, options.prompts_per_step * options.group)))
    cache = choose_cache(options.cache, None, batch, sampler, model).config
    assert cache is not None
    config = RewardConfig(
        group=options.group, masks=options.masks, states=options.states, beta=options.beta, rows=options.rows,
        cache=cache, seed=options.seed, bf16=options.bf16,
    )  # fmt: skip
    tuner = RewardTuner(model, settings.vocabulary, sampler, score, config, optimiser)
    with locked(options.output, "reward tuning"):
        run(tuner, pipe, prompts, texts, options, content)
        merge_adapters(model)
        keep_share(model, tuner.reference, options.keep)
        pipe.save_pretrained(options.output / "pipeline")


def run(
    tuner: RewardTuner,
    pipe: UniDiffPipeline,
    prompts: Prompts,
    texts: list[str],
    options: argparse.Namespace,
    content: str,
) -> None:
    """To the last step or the next signal, from the newest checkpoint; `texts` always holds the prompts of the step.

    Args:
        content: a hash of the pipeline that the run starts from.
    """
    from dataclasses import asdict

    from unidiff.train.run.checkpoint import load_checkpoint, save_checkpoint
    from unidiff.train.run.logs import RunLog
    from unidiff.train.run.loop import StopOnSignals

    folder, count = options.output / "checkpoints", options.prompts_per_step
    # what may change between two parts of a run: names of places, as their content is compared
    free = ("model", "output", "steps", "checkpoint_every", "track", "keep", "fallback", "prompts")
    about = {name: str(value) for name, value in vars(options).items() if name not in free}
    about |= {"the content of MODEL": content, "the content of --prompts": content_of(options.prompts)}
    found = load_checkpoint(folder, "about", options.fallback, "--fallback")
    if found is not None:
        tuner.restore(found, about)
        print(f"resumed at step {tuner.steps} from {folder}")
    stopped: list[bool] = []
    options.output.mkdir(parents=True, exist_ok=True)
    log = RunLog(options.output, tuner.steps, options.track, about=about)
    try:
        with StopOnSignals(lambda: stopped.append(True)):
            while tuner.steps < options.steps and not stopped:
                first = tuner.steps * count
                texts[:] = [prompts(first + number) for number in range(count)]
                report = tuner.step(*prompt_rows(pipe, texts))
                log.write(tuner.steps, "reward", asdict(report))
                print(f"step {tuner.steps}  reward {report.reward:.3f}  divergence {report.divergence:.4f}", flush=True)
                if tuner.steps % options.checkpoint_every == 0 or tuner.steps == options.steps or stopped:
                    save_checkpoint(folder, tuner.checkpoint(about), keep=2)
    finally:
        log.close()
    if stopped:
        print(f"stopped at step {tuner.steps}; run the same command to go on")


def as_decoded(pipe: UniDiffPipeline, options: argparse.Namespace) -> UniDiffPipeline:
    """The pipeline with the passes and the guidance of the run as its own, so that it is saved with them."""
    from dataclasses import replace

    from unidiff.pipelines.options import DecodeOptions

    settings = pipe.settings
    asked = DecodeOptions(steps=options.passes, guidance_scale=options.guidance_scale)
    sampler = asked.apply(settings.sampler("text_to_image"))
    settings = replace(settings, samplers={**settings.samplers, "text_to_image": sampler})
    return type(pipe)(pipe.transformer, pipe.image_tokenizer, pipe.text_tokenizer, settings)


def prompt_rows(pipe: UniDiffPipeline, texts: list[str]):
    """Rows `[P, L]` with given text and a hidden picture, and what guidance hides of them."""
    from unidiff.families.layout import TaskInputs

    request = pipe.layout.request("text_to_image", TaskInputs(len(texts), texts))
    return request.batch, request.condition(request.config.guidance.hide)


def find_reward(options: argparse.Namespace, pipe: UniDiffPipeline) -> tuple[PictureReward, Prompts]:
    """The reward that `--reward` names, and prompts for it."""
    if options.reward == "oracle":
        return WORLDS["emoji"].reward(pipe, _ORACLE_SEED + options.seed, options.kinds)
    check_regular(options.prompts)
    with reading(options.prompts, "prompts (a text in UTF-8, one prompt a line)"):
        lines = [line.strip() for line in options.prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{options.prompts} holds no prompts")
    module, _, name = options.reward.partition(":")
    if not name:
        raise ValueError(f"--reward is {options.reward!r}; expected 'oracle' or MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever that module does
        raise ValueError(f"--reward {options.reward!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(function):
        raise ValueError(f"--reward {options.reward!r} is no function but {type(function).__name__}")

    def checked(texts: list[str], pictures: Tensor) -> Tensor:
        import torch

        try:
            return torch.as_tensor(function(texts, pictures))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"the reward {options.reward!r} failed in {where.filename} line {where.lineno} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error

    return checked, lambda number: lines[number % len(lines)]


def content_of(path: Path | None) -> str:
    """What a file is known by later."""
    return "" if path is None else str(file_stamp(path)["hash"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
