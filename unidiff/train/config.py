"""Settings of a training run: frozen dataclasses filled from one YAML file, and checked before anything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from unidiff.config import load_config
from unidiff.models.trained_on import FORMER_TASKS, TASKS
from unidiff.schema import Between, Positive, check_value, field_types

if TYPE_CHECKING:
    from unidiff.diffusion.schedules import Schedule

TokenWeight = Literal["elbo", "inverse_rate", "softmin", "ce"]
NetworkName = Literal["masked", "dual"]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
LoraTarget = Literal["qkv", "out", "up", "down"]
TRACKERS, LORA_TARGETS = get_args(TrackerName), get_args(LoraTarget)
Count = Annotated[int, Between(1, 2**20)]
Steps = Annotated[int, Between(1, 10**12)]
Interval = Annotated[int, Between(0, 10**12)]
Tokens = Annotated[int, Between(1, 2**24)]
Share = Annotated[float, Between(0, 1)]
BelowOne = Annotated[float, Between(0, 1 - 2**-40)]
Amount = Annotated[float, Between(0, 1e30)]


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. See `unidiff.train.data.source` for the formats.

    `train` and `validation` are token tables (`.safetensors`), or webdataset shards, pre-tokenised or raw: a folder, a
    brace pattern or a URL; several weighted sets as `a.tar@3::b.tar@1`. Raw shards are encoded once, into OUTPUT/tokens.
    With `vocabulary`, `grid` and `text_length`, `unidiff plan` and `unidiff benchmark` work before there is data.
    """

    train: str = ""
    validation: str = ""  # held-out rows; empty takes the last `validation_rows` rows away from `train`
    validation_rows: Annotated[int, Between(0, 2**40)] = 256  # rows scored at every validation
    # [[fraction of the run, highest level], ...]; needs `levels` in the table; empty: all rows always
    curriculum: list[Any] = field(default_factory=list)
    crop_fill: Share = 0.0  # probability that a row's EOS fill is cut to a random length (the rest is batch padding)
    # of raw shards: side of the square picture in pixels; 0: the size that `unidiff shards` gave them, else 256
    image_size: Annotated[int, Between(0, 2**14)] = 0
    text_length: Tokens = 64  # of raw shards: tokens of the text span
    vocabulary: str = ""  # name of the layout that the data must have (`named_vocabulary`); empty: whatever it has
    grid: Annotated[int, Between(0, 2**12)] = 0  # side of the code grid that the data must have; 0: whatever it has
    allow_missing: bool = False  # raw shards that do not exist are counted in OUTPUT/skipped.json in place of refused
    # token shards of interleaved documents (`unidiff encode --documents`), which are trained on as `generate` is
    documents: str = ""
    document_share: Share = 0.5  # of the samples
    # samples of a batch share rows of this many tokens, each attending to itself only; 0 gives each its own row
    pack: Annotated[int, Between(0, 2**24)] = 0


@dataclass(frozen=True)
class TokenizerConfig:
    """Folders of the tokenizers, needed only for sample sheets and for raw shards."""

    image: str = ""
    text: str = ""


@dataclass(frozen=True)
class TaskConfig:
    """One task of the mixture.

    Args:
        rate: how the mask rate r is drawn from u ~ U(0, 1): `uniform` r = u (the ELBO's own), `beta` r ~ Beta(beta, 1)
            = u^(1/beta), or by a schedule of `unidiff.diffusion.schedules`: `cosine` r = cos(pi u / 2), `high`
            r = 1 - 0.5 u^2 (between one half and all), ...
        loss: weight of a masked token: `elbo` 1 / (r p(r)), unbiased for the NELBO whatever `rate` is;
            `inverse_rate` 1 / r (Muddit); `softmin` 1 / (r + (1 - r) / 5) (UniDisc's softmin_snr = 5); `ce` 1.
        per_sample: weigh a row by the text length over its number of targets, so that short and long answers count the same
            (LLaDA's instruction tuning); otherwise every target token does.
    """

    weight: Amount = 0.0  # share of rows, relative to the other tasks
    rate: str = "uniform"
    beta: Annotated[float, Between(1e-30, 1e6)] = 2.0
    loss: TokenWeight = "ce"
    scale: Amount = 1.0  # factor of this task's loss
    per_sample: bool = False
    dropout: Share = 0.0  # probability that the condition is hidden entirely (guidance training); `generate` has none

    @property
    def rates(self) -> Schedule:
        """The schedule whose `draw_rate` gives mask rates."""
        from unidiff.diffusion.schedules import get_schedule  # with torch, which recipes load after `set_up_process`

        if self.rate == "beta":
            return get_schedule("polynomial", power=1 / self.beta)
        return get_schedule("linear" if self.rate == "uniform" else self.rate)


@dataclass(frozen=True)
class TasksConfig:
    """The mixture. `generate` hides text and image at one shared rate; `text_to_image`, `caption` and `answer` hide one
    modality given the rest; `text` is captions beside a picture that is wholly hidden."""

    renamed: ClassVar[Mapping[str, str]] = FORMER_TASKS
    generate: TaskConfig = field(default_factory=lambda: TaskConfig(weight=1.0, loss="elbo"))
    text_to_image: TaskConfig = field(default_factory=TaskConfig)
    caption: TaskConfig = field(default_factory=TaskConfig)
    answer: TaskConfig = field(default_factory=TaskConfig)
    text: TaskConfig = field(default_factory=TaskConfig)


@dataclass(frozen=True)
class ObjectiveConfig:
    """Modality weights of the training loss (validation always uses 1), and masked positions per call of the head, whose
    fixed number keeps bf16 memory level on a CPU; nothing is dropped.

    Args:
        balance_weight: of the loss that keeps experts equally busy, see `unidiff.models.experts.balance_loss`; for models
            with experts.
    """

    text_weight: Amount = 1.0
    image_weight: Amount = 1.0
    chunk: Tokens = 1024
    balance_weight: Amount = 0.01


@dataclass(frozen=True)
class OptimiserConfig:
    """`adamw`, or `muon`: Muon on the matrices inside the blocks and AdamW on embeddings, head, norms and biases."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    muon_lr: Amount = 0.0  # 0: as lr; Muon's update is scaled to AdamW's size
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.98
    eps: Positive = 1e-8
    weight_decay: Amount = 0.01
    momentum: BelowOne = 0.95
    clip: Positive = 1.0
    state_bits: Literal[8, 32] = 32  # of AdamW's two moments; 8 (torchao) takes about a quarter of the bytes


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate: linear warm-up, then `cosine`, `wsd` (flat, then 1 - sqrt decay over `decay` of the run) or `constant`."""

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Interval = 100
    decay: Share = 0.2
    floor: Share = 0.0


@dataclass(frozen=True)
class EMAConfig:
    decay: Share = 0.999
    warmup: Positive = 10.0  # decay at update n is min(decay, (1 + n) / (warmup + n))


@dataclass(frozen=True)
class LoggingConfig:
    """Intervals are in steps; 0 turns a thing off."""

    every: Interval = 20
    validate_every: Interval = 500
    validation_draws: Count = 2
    sample_every: Interval = 500  # sheets in OUTPUT/samples, also at the end; needs tokenizers
    sample_steps: Count = 16
    sample_guidance: Annotated[float, Between(-1e6, 1e6)] = 1.0
    prompts: list[str] = field(default_factory=list)  # of sheets; empty: the captions of held-out rows
    sweep_rows: Annotated[int, Between(0, 4096)] = (
        16  # held-out captions that are drawn in several ways at the end; 0: off
    )
    # where numbers and sample sheets go besides `metrics.jsonl`
    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    project: str = "unidiff"  # in W&B and trackio; the run itself is named after `output`
    progress: bool = True
    report: bool = True  # OUTPUT/report.html: curves, sheets and settings on one page, written anew as the run goes
    # matrix products of one device, in 10^12 operations per second, measured by `unidiff benchmark`; with it the log has
    # `mfu`, the share of that peak in useful work
    peak_tflops: Amount = 0.0


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run.

    Args:
        best: a number of the validation report, for instance `joint_nelbo`: a validation that lowers it is followed by a
            checkpoint, which is kept, is named in `checkpoints/best` and exported to OUTPUT/model-best. `auto`: the NELBO
            of what is trained, where there is validation. Empty: off.
        changed: what to do when the checkpoint was made with other settings or data that decide what is learnt
            (`unidiff.train.run.resume.FIXED`): `refuse`, or `allow` and go on with the new ones.
    """

    every: Interval = 500  # steps; 0 turns it off
    minutes: Amount = 0.0  # of wall time; 0 turns it off
    keep: Count = 3  # newest checkpoints kept
    best: str = "auto"
    background: bool = True  # several processes write while training goes on
    resume: bool = True  # go on from the newest checkpoint in OUTPUT; false refuses a folder that holds any
    changed: Literal["refuse", "allow"] = "refuse"
    fallback: bool = False  # where the newest checkpoint is damaged, go on from the newest whole one before it
    init_from: str = ""  # a weights folder to start from
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of the exported average


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes (`torchrun`) share a run; one process ignores it.

    `ddp` is a whole model per process; `fsdp` shards weights, gradients and optimiser state over them, and only then do the
    other settings matter.
    """

    mode: Literal["ddp", "fsdp"] = "ddp"
    replicas: Count = 1  # groups that each shard one copy of the model (hybrid sharding, one group per machine)
    reshard: bool = True  # free a block's gathered weights after its forward pass and gather them again for backward
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # in which weights are gathered
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # in which gradients are summed


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft) on the linear layers of the blocks; everything else stays frozen."""

    rank: Annotated[int, Between(0, 2**16)] = 0  # inner width; 0 trains the whole model
    alpha: Positive = 16.0  # the update is scaled by alpha / rank
    dropout: BelowOne = 0.0  # on the adapters' input
    dora: bool = False  # learn the columns' magnitudes apart (DoRA)
    targets: list[LoraTarget] = field(default_factory=list)  # layers inside a block; empty takes all four


@dataclass(frozen=True)
class TrainConfig:
    """One file, one run. `model` holds `MaskedTransformer` arguments; `vocab_size` comes from the data.

    Args:
        network: what is trained: `masked`, a `MaskedTransformer`, or `dual`, a `DualTransformer`, whose arguments `model` holds
            then: flow matching of image latents beside masked text (docs/dual.md).
        attention_kernel: of packed, padded or doubled rows: `sdpa` with a mask of every pair of tokens, or `flex`
            (FlexAttention), which skips what no query may see; CUDA only, since torch has no backward of it for CPUs.
        activation_checkpointing: what the backward pass computes again: `none`, `selective` (all but matrix products and
            attention) or `full` (whole blocks).
        spike_factor: a step is skipped when its loss exceeds so many times the moving average of the losses before, as
            it is when loss or gradient are not finite; 0 turns it off.
    """

    output: str = "out/run"
    seed: Annotated[int, Between(-(2**62), 2**62)] = 0
    steps: Steps = 1000
    batch_size: Count = 64  # rows of one forward pass, over all processes
    accumulate: Count = 1  # such passes per step
    precision: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    network: NetworkName = "masked"
    threads: Annotated[int, Between(0, 1024)] = 0
    compile: bool = False  # `torch.compile` every block
    attention_kernel: Literal["sdpa", "flex"] = "sdpa"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    max_bad_steps: Steps = 20  # a run ends after so many skipped steps in a row
    spike_factor: Amount = 0.0
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: dict[str, Any] = field(default_factory=dict)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    @property
    def rows_per_step(self) -> int:
        """Samples one optimiser step consumes."""
        return self.batch_size * self.accumulate


def read_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Load and check a run's settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown key, a wrong type, or a value outside its range; the message names it.
    """
    config = load_config(TrainConfig, path, overrides)
    check_config(config)
    return config


def leaves(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, annotation) of every setting in nested dataclasses, in their order."""
    for own, annotation in field_types(type(settings)).items():  # type: ignore[arg-type]
        value, name = getattr(settings, own), f"{prefix}{own}"
        if is_dataclass(annotation):
            check_value(value, annotation, name)
            yield from leaves(value, f"{name}.")
        else:
            yield name, value, annotation


def check_config(config: TrainConfig) -> None:
    """Raise ValueError with one sentence for the first setting that makes no sense."""
    for name, value, annotation in leaves(config):
        check_value(value, annotation, name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise ValueError(f"{name} = {text!r} has a NUL character; leave it out")
    _check_lists(config)
    _check_together(config)


def _check_lists(config: TrainConfig) -> None:
    for name, found in (("logging.trackers", config.logging.trackers), ("lora.targets", config.lora.targets)):
        if len(set(found)) < len(found):
            raise ValueError(f"{name} = {found} names something twice; leave one out")
    from unidiff.diffusion.schedules import SCHEDULES  # late, since it needs torch, whose threads a run sets first

    rates = ("uniform", "beta", *SCHEDULES)
    for task in TASKS:
        if (rate := getattr(config.tasks, task).rate) not in rates:
            raise ValueError(f"tasks.{task}.rate = {rate!r} is unknown; expected one of {', '.join(rates)}")
    starts = []
    for entry in config.data.curriculum:
        if not (isinstance(entry, list) and len(entry) == 2):
            raise ValueError(f"data.curriculum entry {entry!r} is not of the form [fraction, highest level]")
        check_value(entry[0], Share, f"data.curriculum: the fraction in {entry}")
        check_value(entry[1], int, f"data.curriculum: the level in {entry}")
        starts.append(entry[0])
    if starts and (starts[0] != 0 or starts != sorted(set(starts))):
        raise ValueError(f"data.curriculum = {config.data.curriculum} must begin with fraction 0 and go up from there")


def _check_together(config: TrainConfig) -> None:
    if not config.output.strip():
        raise ValueError("output is empty; name the folder of the run, for instance output=out/run")
    if config.steps * config.rows_per_step >= 2**62:
        raise ValueError(
            f"steps = {config.steps} of {config.rows_per_step} samples are more than can be numbered; lower steps"
        )
    if config.parallel.replicas > 1 and config.parallel.mode != "fsdp":
        raise ValueError(f"parallel.replicas = {config.parallel.replicas} needs parallel.mode=fsdp")
    if config.data.documents and not 0 < config.data.document_share < 1:
        raise ValueError(f"data.document_share = {config.data.document_share} must lie between 0 and 1, without them")
    if config.spike_factor != 0 and config.spike_factor <= 1:
        raise ValueError(f"spike_factor = {config.spike_factor} must be above 1, or 0 to turn it off")
    if sum(getattr(config.tasks, t).weight for t in TASKS) <= 0:
        raise ValueError("no task has a weight above 0; set tasks.generate.weight or another")
    if config.objective.text_weight + config.objective.image_weight <= 0:
        raise ValueError("objective.text_weight and objective.image_weight are both 0; nothing would be learnt")
