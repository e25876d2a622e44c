"""The commands that make models: training, fine-tuning, reward tuning, and what a run costs. Torch is imported inside."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from unidiff.cli.common import Device, world_of
from unidiff.config import load_config, top_keys
from unidiff.files import check_writable, file_stamp, replace_text
from unidiff.process import pick_device, set_up_process
from unidiff.train.config import read_config
from unidiff.world import WORLDS

Settings = Annotated[list[str] | None, typer.Argument(help="key=value, for instance steps=100.", show_default=False)]
Config = Annotated[str, typer.Argument(help="YAML file, or the name of one of `unidiff configs list`.")]
Base = Annotated[str, typer.Argument(help="Pipeline folder, `emoji`, or a hub name.")]
_SMOKE = ["model={hidden_size: 64, num_layers: 2, num_heads: 2}", "batch_size=4", "data.text_length=16", "data.grid=4"]
_SMOKE += ["data.vocabulary=unidisc-magvit", "objective.chunk=32"]
_ORACLE_SEED = 7_310_000  # scenes of their own: EmojiEval's are seeded from 0
_FREE = ("model", "output", "steps", "checkpoint_every", "track", "keep", "fallback", "prompts", "device")
"""What may change between two parts of a reward run; of places the content is compared."""


def train(config: Config, settings: Settings = None) -> None:
    """Train a masked diffusion transformer on text and image tokens.

    Run the same command again to continue from the newest checkpoint. The averaged weights land in OUTPUT/model, those
    that were best on held-out rows in OUTPUT/model-best, and with their tokenizers in OUTPUT/pipeline, which the other
    commands take. OUTPUT/report.html shows the run. Several processes share a run, each with a slice of the batch, under torchrun:

    torchrun --nproc-per-node 8 -m unidiff train emoji parallel.mode=fsdp

    Any number of processes can continue the run of any other number.
    """
    set_up_process(os.environ)
    run = read_config(config, settings or [])
    from unidiff.train.pretrain import pretrain

    raise typer.Exit(pretrain(run, os.environ))


def finetune(model: Base, settings: Settings = None) -> None:
    """Train a finished model on, whole or through low-rank adapters, and save it as a pipeline again.

    unidiff finetune MODEL [CONFIG] data.train=TOKENS output=FOLDER [lora.rank=16] [key=value ...]

    MODEL may also be a folder with a transformer alone. Its architecture and tokenizers are taken over; settings are
    those of `unidiff train`. Run the same command again to continue from the newest checkpoint. The averaged weights,
    adapters folded in, land in OUTPUT/model, and with the model's tokenizers in OUTPUT/pipeline. Works under torchrun.
    """
    set_up_process(os.environ)
    words = list(settings or [])
    run = read_config(words.pop(0) if words and "=" not in words[0] else None, words)
    from unidiff.hub import locate
    from unidiff.train.finetune import finetune as tune

    raise typer.Exit(tune(locate(model), run, os.environ))


def plan(
    config: Config,
    settings: Settings = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    memory: Annotated[float | None, typer.Option(help="GiB of one GPU that the run may fill.")] = None,
    tflops: Annotated[
        float | None, typer.Option(help="TFLOP/s that one GPU keeps up in training; `unidiff benchmark` measures it.")
    ] = None,
) -> None:
    """Say what a run would need before it is started: memory per GPU, operations, days, and how to spread it.

    No data and no GPU is needed. The config of a transformer must declare data.vocabulary and data.grid, that of an image
    tokenizer data.image_size. That of a dual model names tokenizer.image, too.
    """
    for name, value in (("memory", memory), ("tflops", tflops)):
        if value is not None and not 0 < value < 1e12:
            raise ValueError(f"--{name} is {value}; expected a number above 0")
    if "out" in top_keys(config):
        from unidiff.train.image_tokenizer.config import ImageTokenizerConfig
        from unidiff.train.image_tokenizer.plan import plan_tokenizer

        lines = plan_tokenizer(load_config(ImageTokenizerConfig, config, settings or [])).lines(gpus, memory, tflops)
    else:
        run = read_config(config, settings or [])
        from unidiff.train.networks import NETWORKS

        lines = NETWORKS[run.network].plan(run, gpus).lines(gpus, memory, tflops)
    for line in lines:
        typer.echo(line)


def benchmark(
    what: Annotated[str, typer.Argument(help="`smoke`, or a config that declares data.vocabulary and data.grid.")] = (
        "smoke"
    ),
    settings: Settings = None,
    head_only: Annotated[bool, typer.Option("--head-only", help="Compare the two heads and stop.")] = False,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all numbers to this file.")] = None,
) -> None:
    """Measure training on this machine: tokens per second, where a step's time goes, memory, use of the matmul peak.

    Tokens are random; nothing is downloaded or written unless --json names a file. Where a batch does not fit into the
    free memory, fewer rows are measured, and the output says so.
    """
    set_up_process(os.environ)
    check_writable(json_path)
    if not 1 <= steps <= 10_000:
        raise ValueError(f"--steps is {steps}; expected a number from 1 to 10,000")
    smoke = what == "smoke"
    config = read_config(None if smoke else what, [*(_SMOKE if smoke else []), *(settings or [])])
    from unidiff.train.cost.report import measure_training

    report = measure_training(config, what, steps, head_only, typer.echo)
    if json_path:
        replace_text(json_path, json.dumps(report, indent=1) + "\n")


def reward(
    model: Base,
    output: Annotated[Path, typer.Argument(help="Folder of the run.")],
    reward: Annotated[
        str, typer.Option(help="MODULE:FUNCTION of prompts and pictures, or `oracle`, EmojiEval's exact reader.")
    ],
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line; not for --reward oracle.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 100,
    prompts_per_step: Annotated[int, typer.Option(help="Prompts of a step.")] = 8,
    group: Annotated[int, typer.Option(help="Pictures per prompt.")] = 8,
    passes: Annotated[
        int | None, typer.Option(help="Of each decode; fewer are faster, and leave more to be rewarded for.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Of the decodes, by default the model's own; 1 is none: then what decodes is what is tuned, in half "
            "the time."
        ),
    ] = None,
    kinds: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="With --reward oracle: shares of scenes of one object, several of a kind, pairs and groups."),
    ] = None,
    states: Annotated[
        str,
        typer.Option(
            help="Pictures are scored under `random` masks, or from what their own decode saw before a pass (`decoded`)."
        ),
    ] = "random",
    masks: Annotated[int, typer.Option(help="Masks or states per picture, each with an update.")] = 2,
    rows: Annotated[int, typer.Option(help="Pictures per forward pass; more are split.")] = 192,
    cache: Annotated[str, typer.Option(help="Of the decodes: none, auto, or the name of a policy.")] = "none",
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-5,
    beta: Annotated[float, typer.Option(help="Weight of the divergence from the starting model.")] = 0.01,
    lora: Annotated[int, typer.Option(help="Rank of adapters; 0 trains all weights.")] = 0,
    keep: Annotated[
        float, typer.Option(help="Share of the change that is saved: weights between the first and the last.")
    ] = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Decode in bfloat16 and learn under autocast.")] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of decodes and masks.")] = 0,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Send numbers there too; repeatable."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Go on from the checkpoint before a damaged one, if there is one.")
    ] = False,
) -> None:
    """Tune a text-to-image pipeline towards a reward (UniGRPO).

    FUNCTION(prompts, pictures) gets a list of texts and float pictures [B, 3, H, W] in [0, 1], and returns a number for
    each (`--reward my_rewards:brightness`). `oracle` is 1 where EmojiEval's exact reader finds in the picture what the
    text says; its prompts are then scenes of the generator, seeded apart from EmojiEval's. OUTPUT gets `metrics.jsonl`,
    `checkpoints` and `pipeline`, which draws with the passes and the guidance of the run. Run the same command again to
    continue from the newest checkpoint; a killed and continued run ends with the weights of an uninterrupted one.
    """
    options: dict[str, Any] = {**locals(), "track": track or [], "kinds": kinds and list(kinds)}
    set_up_process(os.environ)
    oracle = reward == "oracle"
    if not oracle and prompts is None:
        raise ValueError("--prompts is missing; name a text file with one prompt a line")
    if not oracle and kinds is not None:
        raise ValueError(f"--kinds {list(kinds)} goes with --reward oracle only; leave it out")
    if oracle and prompts is not None:
        raise ValueError("--prompts does not go with --reward oracle, which has its own; leave it out")
    if kinds is not None and not (all(0 <= k < 1e9 for k in kinds) and sum(kinds) > 0):
        raise ValueError(f"--kinds is {list(kinds)}; expected four shares, none negative and not all 0")

    from unidiff.evaluation.benchmark.measure import model_hash
    from unidiff.pipeline import UniDiffPipeline
    from unidiff.train.reward import RewardConfig
    from unidiff.train.reward_run import check_places, prompts_of, reward_of, tune_pipeline

    names = {field.name for field in fields(RewardConfig)}
    run = RewardConfig(**{name: value for name, value in options.items() if name in names})
    check_places(output, model)
    pipe = UniDiffPipeline.from_pretrained(model).to(pick_device(device))
    if prompts is None:
        rewarded, asked = WORLDS[world_of(model)].reward(pipe, _ORACLE_SEED + seed, options["kinds"])
    else:
        rewarded, asked = reward_of(reward), prompts_of(prompts)
    about = {name: str(value) for name, value in options.items() if name not in _FREE}
    about["the content of MODEL"] = model_hash(pipe)
    about["the content of --prompts"] = "" if prompts is None else str(file_stamp(prompts)["hash"])
    tune_pipeline(pipe, output, rewarded, asked, run, about)
