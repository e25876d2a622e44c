"""Systems to compare with: how each is imported, given random weights, and asked for the decode that ours makes too.

Weights are drawn into their network and read into ours by the family's own converter. All decodes are greedy, in float32.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unidiff.decoding import Guidance, ModalityDecoding, NoCache, RefreshPolicy, Sampler, SamplerConfig
from unidiff.decoding.cache import AdaptiveCache, BlockCausalCache, DualCache, MaxLogitCache, PrefixCache
from unidiff.evaluation.benchmark.against import Pair, PeerSystem, Program, Sizes
from unidiff.families.layout import lay_out
from unidiff.families.llada import CONFIG, LLADA, llada_settings
from unidiff.families.llada.rows import llada_sampler
from unidiff.families.lumina import LUMINA
from unidiff.families.unidisc import UNIDISC
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

SEED = 0
SHARPNESS, GUIDED = 4.0, 0.7
"""Deviations of the logits of random weights, the second where guidance spreads them: wide enough that rounding decides
nothing, and narrow enough that probabilities in float32 are not all 1."""


def fast_dllm(folder: Path, sizes: Sizes, device: torch.device) -> Iterator[Pair]:
    """Fast-dLLM on LLaDA: no cache, the prefix's and the dual one."""
    generate = importlib.import_module("generate")
    model = _llada(importlib.import_module("model.modeling_llada"), sizes, device)
    calls: dict[str, tuple[Callable[..., Any], RefreshPolicy]] = {
        "no cache": (generate.generate, NoCache()),
        "prefix": (generate.generate_with_prefix_cache, PrefixCache()),
        "dual": (generate.generate_with_dual_cache, DualCache()),
    }
    prompt, ours = _prompt(sizes, device), _answers(model, sizes, device)
    mask = ours.vocabulary.mask_id
    steps = sizes.passes * sizes.answer // sizes.block
    for name, (call, policy) in calls.items():
        asked = partial(call, model, prompt, steps, sizes.answer, sizes.block, mask_id=mask)

        def theirs(asked: Callable[[], Any] = asked) -> Tensor:
            # they compile attention, for a GPU
            with torch.compiler.set_stance("force_eager" if device.type == "cpu" else "default"):
                return asked()[0][:, sizes.prompt :]

        yield Pair(f"answer, {name}", theirs, ours.program(policy))


def dllm_cache(folder: Path, sizes: Sizes, device: torch.device) -> Iterator[Pair]:
    """dLLM-Cache on the network that its checkout holds, without the cache and with it."""
    _bare_package("mmada_models")  # whose own imports need more than its network
    generate = importlib.import_module("utils.generate_function").generate
    hooks, cache = (importlib.import_module(f"dllm_cache.{name}") for name in ("hooks", "cache"))
    model = _llada(importlib.import_module("mmada_models.modeling_llada"), sizes, device)
    prompt, ours = _prompt(sizes, device), _answers(model, sizes, device)
    everywhere = torch.ones_like(prompt)
    asked = partial(generate, prompt, everywhere, model, sizes.passes * sizes.answer // sizes.block)
    asked = partial(asked, gen_length=sizes.answer, block_length=sizes.block, mask_id=ours.vocabulary.mask_id)
    yield Pair("answer, no cache", asked, ours.program(NoCache()))
    cache.dLLMCache.new_instance(prompt_interval_steps=25, gen_interval_steps=7, transfer_ratio=0.25)
    hooks.register_cache_LLaDA(model, "model.transformer.blocks")
    for block in model.model.transformer.blocks:  # the hook does not know an argument that this network gives
        block.forward = partial(lambda forward, *given, block_mask=None, **more: forward(*given, **more), block.forward)
    upstream = AdaptiveCache(25, 7, 0.25, full_layers=(0,), compat="upstream")
    yield Pair("answer, adaptive", asked, ours.program(upstream))


def lumina(folder: Path, sizes: Sizes, device: torch.device) -> Iterator[Pair]:
    """Lumina-DiMOO: a guided picture, without a cache and with ML-Cache."""
    _bare_package("model")  # or `from model import` finds nothing
    network = importlib.import_module("model.modeling_xllmx_dimoo").LLaDAForMultiModalGeneration
    sys.modules["model"].LLaDAForMultiModalGeneration = network  # type: ignore[attr-defined]
    generate = importlib.import_module("generators.image_generation_generator").generate_image
    text, codes = sizes.text_ids, sizes.image_ids
    vocabulary = Vocabulary(text + codes, (0, text), (text, text + codes), text - 1, specials={"newline": text - 2})
    config = _llada_config(sizes, text + codes, vocabulary.mask_id)
    module = importlib.import_module("model.modeling_llada")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        model = _drawn(network(module.LLaDAConfig(**config)), vocabulary.mask_id, GUIDED).to(device)
    own, _ = LUMINA.load(model.state_dict(), config, vocabulary=vocabulary)
    begins, ends, words = [text - 3, text - 4], [text - 5, text - 6], _prompt(sizes, torch.device("cpu"))[0]
    image = Span(
        torch.full((sizes.grid, sizes.grid), vocabulary.image_mask), Modality.IMAGE, False, text - 2, read=True
    )
    rows = [[Span.text(p, True), Span.text(begins, True), image, Span.text(ends, True)] for p in (words, words[:4])]
    request = lay_out(rows[:1], SamplerConfig(), others=[rows[1:]], left=True)
    batch, (other,) = request.batch.to(device), [o.to(device) for o in request.unconditional]
    ids = batch.ids.masked_fill(request.picture.to(device), vocabulary.mask_id)
    decoding = ModalityDecoding(steps=sizes.steps, schedule="cosine", temperature=0.0)
    settings = SamplerConfig(image=decoding, guidance=Guidance(scale=5.0))
    for name, policy in {"no cache": NoCache(), "ML-Cache": MaxLogitCache(0.9, 0.3, 5, compat="upstream")}.items():

        def theirs(cached: bool = name != "no cache") -> Tensor:
            codes = generate(
                *(model, ids.clone()),
                seq_len=sizes.grid**2,
                newline_every=sizes.grid,
                timesteps=sizes.steps,
                mask_token_id=vocabulary.mask_id,
                newline_id=text - 2,
                temperature=0.0,
                cfg_scale=4.0,
                uncon_ids=words[None, :4],
                code_start=sizes.prompt + 2,
                codebook_size=sizes.image_ids,
                text_vocab_size=text,
                use_cache=cached,
            )
            return codes[0]

        sampler, seeds = Sampler(own, vocabulary, settings, policy), torch.zeros(1, dtype=torch.long)
        whole = partial(sampler, batch, seeds, unconditional=other)
        yield Pair(f"picture, {name}", theirs, lambda whole=whole: whole().batch.ids[batch.targets])  # type: ignore[misc]


def unidisc(folder: Path, sizes: Sizes, device: torch.device) -> Iterator[Pair]:
    """UniDisc's network: the best token of every position in one pass."""
    network = importlib.import_module("models.dit").DIT
    text, length = sizes.text_ids, sizes.prompt + sizes.grid**2
    shape: dict[str, Any] = {
        "hidden_size": sizes.width,
        "n_heads": sizes.heads,
        "n_blocks": sizes.layers,
        "cond_dim": 128,
    }
    shape |= {"length": length, "txt_length": sizes.prompt, "img_length": sizes.grid**2, "dropout": 0.0}
    shape |= {"image_vocab_size": sizes.image_ids, "text_vocab_size": text, "norm_type": "rms"}
    yes = ("modality_embed", "qk_norm", "sandwich_normalization", "full_attention", "use_spda_attn", "scale_by_sigma")
    no: tuple[str, ...] = (
        "tie_word_embeddings",
        "use_pretrained_img_emb",
        "rope_2d",
        "zero_linear_init",
        "use_attention_mask",
    )
    no += ("use_flex_attention", "use_kv_cache")
    shape |= dict.fromkeys(yes, True) | dict.fromkeys(no, False)
    settings: dict[str, Any] = {
        "model": shape,
        "trainer": {"multimodal_batches": True, "image_mode": "discrete", "compile_flag_pos_emb": True},
        "data": {"require_sample_ids": False},
        "parameterization": "subs",
        "time_conditioning": False,
    }
    ids = {"vocab_size": text + sizes.image_ids, "text_vocab_size": text, "mask_index": text - 1}
    how = {"attn_type": "flash", "force_varlen_attn": False, "force_optimized_native_attn": False}  # not what
    with contextlib.redirect_stdout(io.StringIO()):
        model = _drawn(network({**settings, "model": shape | how}, **ids, dtype=torch.float32), text - 1).to(device)
    own, vocabulary = UNIDISC.load(model.state_dict(), {**ids, "config": settings})
    assert vocabulary is not None  # a network of tokens
    words, picture = _prompt(sizes, device)[0], Span.masked_image((sizes.grid, sizes.grid), vocabulary)
    batch = TokenBatch.from_spans([[Span.text(words.cpu(), True), picture]]).to(device)

    @torch.no_grad()
    def theirs() -> Tensor:
        return model(batch.ids, modality=batch.modality).argmax(-1)

    @torch.no_grad()
    def ours() -> Tensor:
        return own(batch).argmax(-1)

    yield Pair("one pass of the network", theirs, ours)
    importlib.import_module("model_eval")  # their sampler; what it needs is told where it is missing


def block_refinement(folder: Path, sizes: Sizes, device: torch.device) -> Iterator[Pair]:
    """diffusers' block refinement (LLaDA2) on transformers' Llama with block-causal attention."""
    import diffusers

    if not (used := Path(diffusers.__file__).resolve()).is_relative_to(folder):
        raise ValueError(f"diffusers is loaded from {used.parent}; start with PYTHONPATH={folder / 'src'}")
    from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.text_ids,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.ffn,
        rms_norm_eps=1e-5,
    )
    mask = sizes.text_ids - 1
    llama = _drawn(LlamaForCausalLM(config), mask).to(device)
    names = {"self_attn.": "", "o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj"}
    names |= {"mlp.down_proj": "ff_out", "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm"}
    names |= {"model.layers": "model.transformer.blocks", "model.norm": "model.transformer.ln_f"}
    names |= {"model.embed_tokens": "model.transformer.wte", "lm_head": "model.transformer.ff_out"}
    weights = {}
    for name, value in llama.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    settings = _llada_config(sizes, sizes.text_ids, mask) | {"rope_theta": 10000.0}
    loaded, vocabulary = LLADA.load(weights, settings)
    assert vocabulary is not None  # a network of text
    own = MaskedTransformer(**llada_settings(settings), attention="block_causal", block_length=sizes.block)
    own.load_state_dict(loaded.state_dict())

    class Blocks(nn.Module):
        """Llama that sees its own block and earlier ones."""

        dtype = torch.float32

        def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            block = torch.arange(ids.shape[1], device=ids.device) // sizes.block
            seen = (block[:, None] >= block)[None, None]
            return llama(ids, attention_mask=seen, position_ids=position_ids)

    blocks: Any = Blocks()
    blocks.device = device
    pipe = LLaDA2Pipeline(blocks, BlockRefinementScheduler(block_length=sizes.block))
    pipe.set_progress_bar_config(disable=True)
    prompt = _prompt(sizes, device)
    asked = partial(pipe, input_ids=prompt, gen_length=sizes.answer, block_length=sizes.block, threshold=2.0)
    asked = partial(asked, num_inference_steps=sizes.passes, sampling_method="greedy", editing_threshold=None)
    asked = partial(asked, mask_token_id=mask, eos_early_stop=False, output_type="seq")
    ours = _Answers(own.to(device).eval(), vocabulary, prompt, sizes)
    for name, policy in {"no cache": NoCache(), "our block-causal cache": BlockCausalCache()}.items():
        yield Pair(f"answer, {name}", lambda: asked().sequences[:, -sizes.answer :], ours.program(policy))


SYSTEMS = (
    PeerSystem("Fast-dLLM", ("llada/generate.py", "v1/llada/generate.py"), ("llada", "v1/llada"), fast_dllm),
    PeerSystem("dLLM-Cache", ("dllm_cache/hooks/cache_hook_LLaDA.py",), (".",), dllm_cache),
    PeerSystem("Lumina-DiMOO", ("generators/image_generation_generator.py",), (".",), lumina),
    PeerSystem("UniDisc", ("models/dit.py",), (".",), unidisc),
    PeerSystem("diffusers", ("src/diffusers/__init__.py", "diffusers/__init__.py"), ("src", "."), block_refinement),
)


class _Answers:
    """Our decodes of the answer to a prompt, `sizes.passes` passes per block."""

    def __init__(self, model: MaskedTransformer, vocabulary: Vocabulary, prompt: Tensor, sizes: Sizes) -> None:
        spans = [[Span.text(row, True), Span.masked_text(sizes.answer, vocabulary)] for row in prompt.cpu()]
        config = llada_sampler(vocabulary, sizes.passes * sizes.answer // sizes.block, sizes.block)
        self.config = replace(config, stop_at_eos=False)
        self.model, self.vocabulary, self.batch = model, vocabulary, TokenBatch.from_spans(spans).to(prompt.device)

    def program(self, policy: RefreshPolicy) -> Program:
        sampler = Sampler(self.model, self.vocabulary, self.config, policy)
        seeds = torch.zeros(len(self.batch.ids), dtype=torch.long)
        return lambda: sampler(self.batch, seeds).batch.ids[self.batch.targets].view(len(seeds), -1)


def _answers(model: nn.Module, sizes: Sizes, device: torch.device) -> _Answers:
    config = _llada_config(sizes, sizes.text_ids, sizes.text_ids - 1)
    own, vocabulary = LLADA.load(model.state_dict(), config)
    assert vocabulary is not None  # a network of text
    return _Answers(own, vocabulary, _prompt(sizes, device), sizes)


def _llada_config(sizes: Sizes, ids: int, mask: int) -> dict[str, Any]:
    shape = dict(d_model=sizes.width, n_heads=sizes.heads, n_kv_heads=sizes.heads, n_layers=sizes.layers)
    shape |= dict(mlp_hidden_size=sizes.ffn, vocab_size=ids, embedding_size=ids, mask_token_id=mask)
    return {**CONFIG, **shape, "eos_token_id": 0, "pad_token_id": 0}


def _llada(module: ModuleType, sizes: Sizes, device: torch.device) -> Any:
    """A `LLaDAModelLM` of theirs with random weights."""
    config = module.LLaDAConfig(**_llada_config(sizes, sizes.text_ids, sizes.text_ids - 1))
    config.use_cache = False  # which transformers no longer sets for them
    return _drawn(module.LLaDAModelLM(config), sizes.text_ids - 1).to(device)


def _prompt(sizes: Sizes, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(1, sizes.text_ids - 8, (1, sizes.prompt), generator=generator).to(device)


@torch.no_grad()
def _drawn(model: Any, mask: int, sharpness: float = SHARPNESS) -> Any:
    """The network with random weights that tell positions and tokens apart, and never speak for [MASK]."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []  # matrices with a row for every id: the last one is the head
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1 + (not name.endswith("bias")))
            continue
        value.copy_(torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5)
        rows += [value] if value.shape[0] > mask else []
    rows[-1] *= sharpness
    rows[-1][mask] = 0
    return model.eval().requires_grad_(False)


def _bare_package(name: str) -> None:
    """The folder of that name as a package whose own `__init__` is not run."""
    package = ModuleType(name)
    package.__path__ = [str(place) for entry in sys.path if (place := Path(entry) / name).is_dir()][:1]
    if not package.__path__:
        raise ModuleNotFoundError(f"no folder {name!r}", name=name)
    sys.modules[name] = package
