"""The model of a run: drawn or warm-started, with adapters or without, and how its blocks run."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from unidiff.errors import read_json, reading
from unidiff.files import replacing_folder
from unidiff.models.config import TransformerConfig
from unidiff.models.experts import list_experts, stack_experts
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipelines.owned import check_replaceable, others_in_adapter
from unidiff.schema import check_arguments, differences
from unidiff.tokens import Vocabulary
from unidiff.train.config import LORA_TARGETS, LoraConfig, TrainConfig
from unidiff.train.data.source import TokenSource
from unidiff.weights.adapter import peft_for, save_adapter
from unidiff.weights.files import check_dtype, check_finite, check_shapes, open_checkpoint

_SILENT = ("embed_row.weight", "embed_column.weight")
"""Parts that change nothing until they are trained: weights without them can be warm-started from."""
_LOOSE = ("attention", "block_length", "dropout", "grid_embeddings")  # what a person changes on purpose
_ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_KEPT = ("mm", "addmm", *(f"_scaled_dot_product_{name}" for name in _ATTENTION))
"""What the backward pass does not compute again where recomputation is `selective`."""
_NETWORK = r"feed_forward\.(shared\.|experts\.\d+\.)?"  # of a layer, or one of a mixture's
_PLACES = (r"attention\.qkv", r"attention\.out", rf"{_NETWORK}up", rf"{_NETWORK}down")
LAYERS = dict(zip(LORA_TARGETS, _PLACES, strict=True))
"""Regular expressions of their places in a block."""
_LOG = logging.getLogger(__name__)


def build_model(config: TrainConfig, vocab_size: int) -> MaskedTransformer:
    """The model of `config.model`, drawn from `config.seed`, or warm-started from `checkpoint.init_from`; with adapters
    where `config.lora` asks for them.

    Raises:
        ValueError: an unknown or ill-typed model setting, or weights that do not fit or are not finite.
        FileNotFoundError: `init_from` holds no safetensors file.
    """
    check_names(config, {field.name for field in fields(TransformerConfig)}, ("vocab_size",))
    check_arguments(TransformerConfig, config.model, "model.")
    torch.manual_seed(config.seed)
    model = MaskedTransformer(vocab_size=vocab_size, **config.model)
    blockwise = model.settings.block_length is not None
    if (config.data.pack or blockwise) and model.settings.timed:
        raise ValueError("data.pack and block_causal need a model without time_conditioning: a row has several times")
    if config.data.pack and blockwise:
        raise ValueError("data.pack and block_causal attention do not go together; set data.pack=0")
    if config.checkpoint.init_from:
        _load_start(model, Path(config.checkpoint.init_from))
    model = model.float().train()
    add_adapters(model, config.lora)
    return model


def check_names(config: TrainConfig, known: Collection[str], of_data: Collection[str]) -> None:
    """Raise `ValueError` for a setting of the model that there is not (`known`), or that comes from the data."""
    names = set(known) - set(of_data)
    if unknown := sorted(set(config.model) - names):
        near = difflib.get_close_matches(unknown[0], names, 1)
        hint = f"did you mean model.{near[0]}?" if near else f"there are {', '.join(sorted(names))}"
        hint = "it comes from the data, leave it out" if unknown[0] in of_data else hint
        raise ValueError(f"model.{unknown[0]} is unknown; {hint}")


def _load_start(model: MaskedTransformer, folder: Path) -> None:
    """Take over the weights in `folder`; see `build_model`."""
    where, files = f"checkpoint.init_from = {str(folder)!r}", sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{where} holds no .safetensors file")
    weights = {name: value for name, value in model.state_dict().items() if name in _SILENT}  # zeros
    taken: set[str] = set()
    for path in files:
        found = {name: value.read() for name, value in open_checkpoint(path).items()}
        if twice := sorted(taken & found.keys()):
            raise ValueError(f"{where} holds {twice[0]} in two files; leave one model there")
        for name, value in found.items():
            check_dtype(f"{name} of {path}", value)
        check_finite(found, str(path))
        weights, taken = weights | found, taken | found.keys()
    _say_differences(model, folder / "config.json")
    check_shapes(where, model.state_dict(), weights)
    model.load_state_dict(weights)


def _say_differences(model: MaskedTransformer, path: Path) -> None:
    """Log what the weights were trained with and this model does otherwise, though they may fit: heads, positions, norms."""
    if not path.is_file():
        return
    theirs = read_json(path, "the config of a transformer")
    names = sorted(key for key in model.config if not key.startswith("_") and key in theirs and key not in _LOOSE)
    if changed := differences(theirs, model.config, names):
        _LOG.warning("the weights in %s were trained with %s", path.parent, "; ".join(changed))


def set_up_blocks(model: MaskedTransformer, recompute: str, compiled: bool) -> None:
    """Make the blocks compute less memory-hungry or faster; names and values of parameters do not change. In place.

    Args:
        recompute: see `TrainConfig.activation_checkpointing`.
        compiled: compile each block; equal blocks share the compiled code.
    """
    context = partial(create_selective_checkpoint_contexts, [getattr(torch.ops.aten, name).default for name in _KEPT])
    options = {"context_fn": context} if recompute == "selective" else {}
    for block in model.blocks:
        # The instance's own `forward`, not a wrapping module: a wrapper would rename the parameters.
        if recompute != "none":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
        if compiled:
            block.forward = torch.compile(block.forward)


def check_start(init_from: str, source: TokenSource) -> None:
    """Raise ValueError where the starting weights' folder says that its ids mean something else than the data's."""
    path = Path(init_from) / "vocabulary.json"
    if init_from and path.is_file():
        with reading(path, "a vocabulary"):
            start = Vocabulary.from_dict(read_json(path))
        check_ids(start, source, f"{str(path)!r} is")


def check_ids(start: Vocabulary, source: TokenSource, what: str) -> None:
    """Raise ValueError where ids of the starting weights mean something else in the data. `what` opens the sentence."""
    data = source.vocabulary
    names = ("size", "text", "image", "mask_id", "image_mask")
    pairs = [(n, getattr(data, n), getattr(start, n)) for n in names]
    pairs += [(n, data.specials.get(n, i), i) for n, i in start.specials.items()]
    if changed := [f"{name} is {ours}, not {theirs}" for name, ours, theirs in pairs if ours != theirs]:
        raise ValueError(
            f"{what} another vocabulary than the data's, where {changed[0]}; encode the data with the tokenizers of these "
            "weights"
        )


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put low-rank adapters of `config.rank` into every block and freeze all else. In place; rank 0 leaves the model as it is.

    The model keeps its class: peft replaces the layers, so training, averages and checkpoints know nothing of it. Fresh
    adapters change no output: one of their two factors is zero. The other is drawn from torch's global generator. Every expert
    of a mixture gets its own, as a layer of its own.

    Raises:
        ValueError: peft is not installed, a target that no block has, or DoRA on weights with a row of zeros.
    """
    if config.rank == 0:
        return
    names = list(config.targets or LAYERS)
    if unknown := [name for name in names if name not in LAYERS]:
        raise ValueError(f"lora.targets has {unknown[0]!r}; expected some of {', '.join(LAYERS)}")
    peft = peft_for("lora.rank is set")
    if {"up", "down"} & set(names):
        list_experts(model)
    if config.dora:
        _check_columns(model, names)
    layers = "|".join(LAYERS[name] for name in names)
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_dora=config.dora,
        target_modules=rf"blocks\.\d+\.({layers})",
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def export_adapter(model: nn.Module, folder: Path, share: float = 1.0) -> None:
    """Write a model's adapters as a folder of peft, which appears whole or not at all; `share` as in `save_adapter`.

    Raises ValueError for weights that are not finite, or a folder that holds something else than an adapter.
    """
    check_replaceable(folder, others_in_adapter, "LoRA adapter")
    with replacing_folder(folder) as temporary:
        save_adapter(model, temporary, share)


def merge_adapters(model: nn.Module) -> None:
    """Fold adapters into the weights and remove them. In place; a model without adapters stays as it is."""
    adapted = [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    for name, layer in adapted:
        layer.merge()
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, layer.get_base_layer())
    if adapted:
        stack_experts(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _check_columns(model: nn.Module, names: list[str]) -> None:
    """DoRA divides by the length of every output's weights."""
    for name, layer in model.named_modules():
        chosen = any(re.search(rf"\.{LAYERS[n]}$", name) for n in names)
        if chosen and not layer.weight.is_meta and bool((layer.weight == 0).all(1).any()):
            raise ValueError(
                f"lora.dora needs trained weights, {name} has outputs that are all zero; set checkpoint.init_from"
            )
