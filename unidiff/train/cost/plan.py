"""What a run would cost before it is started: parameters, operations, memory per GPU for every way to spread it, and time.

Layers count as in `unidiff.models.denoiser.LayerFlops`: 2 L N for L tokens and N weights of linear layers, and attention 4 D
for each visible query-key pair and layer. The head adds 2 D n per position that the loss needs, n the size of its slice. The
backward pass counts twice the forward pass. Operations done again (recomputed logits, activation checkpoints) are not
counted: utilisation measures useful work.

Memory is counted, not measured: weights, gradients, AdamW state and the moving average in float32, what autograd keeps of
the blocks under bf16 autocast, and the head's pieces. Allocator waste, kernels' workspaces and the system's share are not
in it: leave a tenth of the memory free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unidiff.diffusion.streamed_nll import TILE_ELEMENTS
from unidiff.errors import first_line
from unidiff.families.family import named_vocabulary
from unidiff.models.config import TransformerConfig
from unidiff.models.experts import idle_weights
from unidiff.models.trained_on import TASKS
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary
from unidiff.train.config import TaskConfig, TrainConfig

GIB = 2**30
GPUS_PER_MACHINE = 8


@dataclass(frozen=True)
class ModelSize:
    """Weights of a model by place."""

    total: int
    active: int  # total without the experts that a token does not pass
    block_linear: int  # of the linear layers inside all blocks, as many as one token passes through
    matrices: int  # of two dimensions inside blocks
    stacked: int  # of experts, which are stacked matrices
    pair_flops: int  # attention of one query to one key, all layers together, forward
    blocks: int  # everything inside blocks
    embedding: int  # of tokens and modalities
    head: int  # output matrix and bias, 0 where it is the embedding
    hidden_size: int
    num_layers: int


def model_size(settings: Mapping[str, Any], vocab_size: int) -> ModelSize:
    """Count a `MaskedTransformer` without making its weights. Raises ValueError for arguments that it does not take."""
    try:
        with torch.device("meta"):
            model = MaskedTransformer(vocab_size=vocab_size, **settings)
    except TypeError as error:  # an unknown name
        raise ValueError(f"model settings: {first_line(error).partition('() ')[2] or error}") from error
    embeddings = [m.weight.numel() for m in (model.embed_tokens, model.embed_modality) if m is not None]
    outputs = [p.numel() for p in (model.output_weight, model.output_bias) if p is not None]
    return ModelSize(
        total=(total := sum(p.numel() for p in model.parameters())),
        active=total - idle_weights(model),
        matrices=sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2),
        stacked=sum(p.numel() for p in model.blocks.parameters() if p.ndim == 3),
        block_linear=sum(layer.token for layer in model.traits.layers) // 2,  # a weight: a product and a sum per token
        pair_flops=sum(layer.pair for layer in model.traits.layers),
        blocks=sum(p.numel() for p in model.blocks.parameters()),
        embedding=sum(embeddings),
        head=sum(outputs),
        hidden_size=model.config.hidden_size,
        num_layers=len(model.blocks),
    )


@dataclass(frozen=True)
class TrainingRow:
    """Tokens of one row and what the loss needs of them."""

    text: int
    image: int
    text_slice: int  # size of the head's slice
    image_slice: int
    hidden_share: float = 0.5  # mean share of positions that are masked; 1/2 for uniform times
    pairs: int | None = None  # visible query-key pairs per layer; None for every pair of the row
    copies: int = 1  # how often each token passes through the blocks: 2 in block diffusion, clean and noisy

    @property
    def length(self) -> int:
        return self.text + self.image


@dataclass(frozen=True)
class RowFlops:
    """Operations of one row, forward and backward together."""

    blocks: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.blocks + self.attention + self.head


def row_flops(size: ModelSize, row: TrainingRow) -> RowFlops:
    """Training operations of one row; see the module's formulas."""
    pairs = row.length**2 if row.pairs is None else row.pairs
    scored = row.hidden_share * (row.text * row.text_slice + row.image * row.image_slice)
    return RowFlops(
        blocks=3 * 2 * row.length * row.copies * size.block_linear,
        attention=3 * size.pair_flops * pairs,
        head=3 * 2 * size.hidden_size * scored,
    )


def block_causal_pairs(length: int, block_length: int) -> int:
    """Query-key pairs of one sample in which a query sees its own block and earlier ones."""
    whole, rest = divmod(length, block_length)
    return block_length**2 * whole * (whole + 1) // 2 + rest * length


@dataclass(frozen=True)
class Layout:
    """One way to spread a run, with its bytes per GPU."""

    mode: str  # "ddp" or "fsdp"
    replicas: int  # groups with fsdp (hybrid sharding), else 1
    checkpointing: bool  # whether blocks are computed again in the backward pass
    weights: int  # parameters, gradients, optimiser state, moving average, bf16 copies, gathered blocks
    activations: int  # what the backward pass needs of the blocks
    head: int  # pieces of logits and of the head's gradient

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.head

    @property
    def settings(self) -> str:
        """The settings that choose it."""
        replicas = f" parallel.replicas={self.replicas}" if self.replicas > 1 else ""
        again = " activation_checkpointing=full" if self.checkpointing else ""
        return f"parallel.mode={self.mode}{replicas}{again}"


@dataclass(frozen=True)
class Plan:
    """Everything `unidiff plan` prints."""

    size: ModelSize
    row: TrainingRow
    flops: RowFlops  # of a row
    rows_per_step: int
    rows_per_gpu: int  # of one forward pass
    steps: int
    state_bytes: int  # parameters, gradients, optimiser state and moving average, unsharded
    layouts: tuple[Layout, ...]  # from the fastest to the most frugal

    @property
    def step_flops(self) -> float:
        return self.flops.total * self.rows_per_step

    def days(self, gpus: int, flops_per_second: float) -> float:
        """Days of the whole run at a rate that each GPU keeps up (measure it with `unidiff benchmark`)."""
        return self.steps * self.step_flops / (gpus * flops_per_second) / 86400

    def fitting(self, memory_bytes: float) -> Layout | None:
        """The first layout that fits, or None."""
        return next((layout for layout in self.layouts if layout.total <= memory_bytes), None)

    def lines(self, gpus: int, memory: float | None, tflops: float | None) -> Iterator[str]:
        """The plan for a person. memory: GiB of one GPU. tflops: TFLOP/s that one GPU keeps up."""
        size, row, parts = self.size, self.row, self.flops
        active = f", {size.active / 1e6:.1f} M active for a token" if size.active < size.total else ""
        yield (f"parameters   {size.total / 1e6:.1f} M: blocks {size.blocks / 1e6:.1f}, embeddings "
               f"{size.embedding / 1e6:.1f}, head {size.head / 1e6:.1f}{active}")  # fmt: skip
        yield (f"rows         {row.text} text + {row.image} image tokens; {self.rows_per_step} rows, "
               f"{self.rows_per_step * row.length} tokens per step; {self.rows_per_gpu} rows per GPU and pass")  # fmt: skip
        shares = [100 * part / parts.total for part in (parts.blocks, parts.attention, parts.head)]
        yield (f"operations   {self.step_flops / 1e12:.2f} TFLOP per step: blocks {shares[0]:.0f} %, attention "
               f"{shares[1]:.0f} %, head {shares[2]:.0f} %")  # fmt: skip
        yield f"state        {self.state_bytes / GIB:.2f} GiB: weights, gradients, optimiser, moving average"
        yield f"{'GiB per GPU':35s} weights  activations    head   total"
        for layout in self.layouts:
            numbers = [x / GIB for x in (layout.weights, layout.activations, layout.head, layout.total)]
            yield f"  {layout.settings:60s}"[:62] + " ".join(f"{n:9.2f}" for n in numbers)
        if memory is not None and (fitting := self.fitting(memory * GIB)):
            yield f"fits         {memory:g} GiB with {fitting.settings}"
        elif memory is not None:
            yield f"fits         nothing in {memory:g} GiB; lower batch_size and raise accumulate, or use more GPUs"
        if tflops is not None:
            days = self.days(gpus, tflops * 1e12)
            yield f"time         {days:.2f} days for {self.steps} steps on {gpus} GPUs"


def make_plan(config: TrainConfig, gpus: int) -> Plan:
    """Count a run. Raises ValueError without a declared vocabulary and grid, or for a batch that the GPUs cannot share."""
    rows, vocabulary = rows_per_gpu(config, gpus), declared_vocabulary(config)
    size = model_size(config.model, vocabulary.size)
    row = row_shape(config, vocabulary)
    ways = [(mode, replicas, again) for mode, replicas in _modes(config, gpus) for again in (False, True)]
    layouts = tuple(_layout(config, size, row, rows, gpus, *way) for way in ways)
    state = state_bytes(config, size)
    return Plan(size, row, row_flops(size, row), config.rows_per_step, rows, config.steps, state, layouts)


def rows_per_gpu(config: TrainConfig, gpus: int) -> int:
    """Rows of one pass. Raises ValueError for a batch that the GPUs cannot share."""
    if not 1 <= gpus <= 2**20:
        raise ValueError(f"--gpus is {gpus}; expected a number from 1 to {2**20}")
    if config.batch_size % gpus:
        raise ValueError(f"batch_size = {config.batch_size} must be a multiple of the {gpus} GPUs; it counts all rows")
    return config.batch_size // gpus


def declared_vocabulary(config: TrainConfig) -> Vocabulary:
    """The layout that `data.vocabulary` names. Raises ValueError when it or `data.grid` is not set."""
    if not config.data.vocabulary or not config.data.grid:
        raise ValueError(
            "the config declares no data.vocabulary and data.grid; set both, for instance data.vocabulary=unidisc-vq16 data.grid=16"
        )
    return named_vocabulary(config.data.vocabulary)


def row_shape(config: TrainConfig, vocabulary: Vocabulary) -> TrainingRow:
    """A mean row of the task mixture: targets of each task, half of them hidden at uniform rates (1 - 2/pi off it with cosine)."""
    text, image = config.data.text_length, config.data.grid**2
    # one share of all positions, weighted by what each modality's slice of the head costs
    text_cost, image_cost = text * vocabulary.text_size, image * vocabulary.image_size
    tasks: dict[str, TaskConfig] = {name: getattr(config.tasks, name) for name in TASKS}
    hidden = 0.0
    for name, task in tasks.items():
        cost = text_cost * (name != "text_to_image") + image_cost * (name in ("generate", "text_to_image"))
        hidden += mean_rate(task) * task.weight * cost
    hidden /= sum(task.weight for task in tasks.values()) * (text_cost + image_cost)
    row = TrainingRow(text, image, vocabulary.text_size, vocabulary.image_size, hidden)
    if config.model.get("attention") == "block_causal":  # clean and noisy tokens each see about the same pairs
        row = replace(row, pairs=2 * block_causal_pairs(row.length, config.model["block_length"]), copies=2)
    return row


def mean_rate(task: TaskConfig) -> float:
    """Mean share of targets that a task hides."""
    middles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    return float(task.rates.draw_rate(middles).mean())


def state_bytes(config: TrainConfig, size: ModelSize) -> int:
    """float32 weights, gradients and average (12 bytes a parameter) and optimiser state (8, of Muon's matrices 4).

    AdamW's state in 8 bits takes 2 bytes and the scales of its blocks, two float32 per 256 values.
    With adapters only they have gradients and state; their number is 2 rank (inputs + outputs) per layer.
    """
    moments = 8 if config.optimiser.state_bits == 32 else 2 + 8 / 256
    if config.lora.rank:
        trained = adapter_parameters(config)
        return 8 * size.total + round((12 + moments) * trained)  # frozen weights are averaged too
    matrices = size.matrices if config.optimiser.name == "muon" else 0
    return 12 * size.total + round(moments * (size.total - matrices)) + 4 * matrices


def adapter_parameters(config: TrainConfig) -> int:
    """Weights of low-rank adapters on the linear layers of every block, those of all experts among them."""
    c, rank = TransformerConfig(1, **config.model), config.lora.rank
    d, q, kv = c.hidden_size, c.head_dim * c.num_heads, c.head_dim * c.kv_heads
    wanted: Sequence[str] = config.lora.targets or ["qkv", "out", "up", "down"]

    def weights(name: str, inputs: int, outputs: int) -> int:
        return (rank * (inputs + outputs) + (outputs if config.lora.dora else 0)) if name in wanted else 0

    def network(inner: int) -> int:
        return weights("up", d, 2 * inner if c.activation == "swiglu" else inner) + weights("down", inner, d)

    mixture = c.num_experts * network(c.expert_size or 0) + (
        network(c.shared_expert_size) if c.shared_expert_size else 0
    )
    feed = sum(mixture if c.has_experts(layer) else network(c.inner_size) for layer in range(c.num_layers))
    return feed + c.num_layers * (weights("qkv", d, q + 2 * kv) + weights("out", q, d))


def block_activation_bytes(model: Mapping[str, Any], bf16: bool = True) -> int:
    """Bytes that autograd keeps of one token in one block (fused attention and norms), a mean where blocks differ.

    The residual stream and the inputs of norms are float32, the inputs of matmuls bf16 under autocast.
    """
    low = 2 if bf16 else 4
    c = TransformerConfig(1, **model)
    d, q, kv = c.hidden_size, c.head_dim * c.num_heads, c.head_dim * c.kv_heads
    norms = 2 * 4 * d  # residual stream before attention and before the feed-forward
    matmuls = 2 * low * d  # inputs of qkv and up
    attention = low * (q + 2 * kv) + low * (q + kv) + low * q  # qkv (v is a view of it), rotated q and k, the output
    if bf16 and c.qk_norm != "none":
        attention += 4 * (q + kv)  # float32 copies of the two norms' inputs
    # gate, up, silu(gate), product | up, gelu(up)
    dense = low * c.inner_size * (4 if c.activation == "swiglu" else 2)
    # scores | of each expert of a token: input, the same as above, output before and after it is brought back
    mixture = 4 * (d + 2 * c.num_experts) + 4 * low * c.shared_expert_size
    mixture += low * c.experts_per_token * (3 * d + 4 * (c.expert_size or 0))
    mixed = sum(map(c.has_experts, range(c.num_layers)))
    feed_forward = (mixed * mixture + (c.num_layers - mixed) * dense) // c.num_layers
    sandwich = 2 * 4 * d if c.sandwich_norm else 0
    dropout = 2 * d if c.dropout else 0  # bool masks
    return norms + matmuls + attention + feed_forward + sandwich + dropout


def _modes(config: TrainConfig, gpus: int) -> list[tuple[str, int]]:
    modes = [("ddp", 1)]
    if config.optimiser.state_bits == 8:
        return modes  # whole tensors only
    if gpus > GPUS_PER_MACHINE and gpus % GPUS_PER_MACHINE == 0:
        modes.append(("fsdp", gpus // GPUS_PER_MACHINE))
    return [*modes, ("fsdp", 1)] if gpus > 1 else modes


def _layout(
    config: TrainConfig, size: ModelSize, row: TrainingRow, rows: int, gpus: int, mode: str, replicas: int, again: bool
) -> Layout:
    low = 2 if config.precision == "bf16" else 0
    one_block = size.blocks // size.num_layers
    if mode == "ddp":
        copied = size.matrices + size.stacked if size.stacked else size.block_linear
        weights = state_bytes(config, size) + low * copied  # autocast's copies live until the backward pass
    else:
        gathered = 2 * 4 * one_block + 2 * 4 * (size.total - size.blocks)  # two blocks; embeddings, head, gradients
        weights = state_bytes(config, size) // (gpus // replicas) + gathered + low * one_block
    kept = block_activation_bytes(config.model, bf16=config.precision == "bf16")
    inputs = 4 * size.hidden_size * size.num_layers  # of the blocks
    activations = rows * row.length * row.copies * (inputs + kept if again else kept * size.num_layers)
    head = 3 * 4 * TILE_ELEMENTS + 4 * max(size.head, size.embedding)
    return Layout(mode, replicas, again, weights, activations, head)
