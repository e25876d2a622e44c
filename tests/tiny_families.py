"""One tiny model per released family, loaded from a state dict under released names, with requests that fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from ddit_parts import MODEL as DUAL
from ddit_parts import T5
from muddit_parts import CLIP, MODEL, lively_, tiny_clip, tiny_model
from PIL import Image
from reference.batches import llada_batch, lumina_batch, lumina_pair, mdlm_batch, unidisc_batch
from reference.mmada_prompts import MMaDAPrompts, mmada_batch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from unidiff.decoding import Guidance, ModalityDecoding, SamplerConfig
from unidiff.families.ddit.denoiser import DualDenoiser, T5Text
from unidiff.families.dream import DREAM
from unidiff.families.dynin import DYNIN, dynin_vocabulary
from unidiff.families.dynin import SPECIALS as DYNIN_SPECIALS
from unidiff.families.dynin.rows import DyninLayout
from unidiff.families.layout import TaskInputs
from unidiff.families.llada import LLADA
from unidiff.families.llada2 import LLADA2, llada2_sampler
from unidiff.families.llada2_uni import LLADA2_UNI
from unidiff.families.llada2_uni.rows import uni_image_sampler
from unidiff.families.llada_moe import LLADA_MOE
from unidiff.families.llada_v import LLADA_V
from unidiff.families.llada_v.rows import PICTURE, LladaVLayout
from unidiff.families.mdlm import MDLM
from unidiff.families.mmada import MMADA, SPECIALS, MMaDALayout, mmada_vocabulary
from unidiff.families.muddit.denoiser import MudditDenoiser
from unidiff.families.parallel import JointSettings
from unidiff.families.unidisc import UNIDISC
from unidiff.models.dual_mmdit import DualMMDiT
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

M = TypeVar("M", bound=MaskedTransformer)
STEPS = 6
UNIDISC_CONFIG = {
    "model": {
        "hidden_size": 24,
        "n_blocks": 2,
        "n_heads": 2,
        "norm_type": "rms",
        "qk_norm": True,
        "modality_embed": True,
        "sandwich_normalization": True,
        "rope_2d": True,
        "dropout": 0.0,
        "text_vocab_size": 21,
        "image_vocab_size": 12,
    }
}
MDLM_CONFIG = {"hidden_dim": 24, "n_blocks": 2, "n_heads": 2, "cond_dim": 8, "vocab_size": 20, "dropout": 0.0}
LLADA_CONFIG = {
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "mlp_hidden_size": 40,
    "vocab_size": 44,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "mask_token_id": 36,
    "eos_token_id": 30,
    "pad_token_id": 30,
    "eot_token_id": 37,
    "block_group_size": 2,
}
DREAM_CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 44,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "mask_token_id": 36,
    "pad_token_id": 30,
    "eos_token_id": 30,
}
LLADA_MOE_CONFIG, LLADA2_CONFIG = LLADA_MOE.tiny.config, LLADA2.tiny.config
MMADA_CONFIG = {
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "new_vocab_size": 60,
}
LUMINA_IDS = {"newline": 24, "boi": 25, "eoi": 26, "answer": 27, "end_answer": 28}


@dataclass(frozen=True)
class TinyFamily:
    """A loaded model and requests.

    Attributes:
        batch: three rows, of different lengths where the family knows padding.
        config: a sampler configuration with guidance.
        unconditional: rows of the unconditional stream where they are not the batch with tokens hidden.
    """

    name: str
    model: Any
    vocabulary: Vocabulary
    batch: TokenBatch
    config: SamplerConfig
    unconditional: TokenBatch | None = None


def lively(kwargs: dict[str, Any], seed: int = 0) -> MaskedTransformer:
    """A network whose every weight is random, norms and biases too, in float64."""
    return lively_weights(MaskedTransformer(**kwargs), seed)


def lively_weights(model: M, seed: int = 0) -> M:
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise * 0.35 if parameter.ndim > 1 else 1 + 0.25 * noise)
    return model


def _ids(rows: int, length: int, low: int, high: int, seed: int = 1) -> Tensor:
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def _decoding(guidance: float = 2.0, **text: Any) -> SamplerConfig:
    return SamplerConfig(
        ModalityDecoding(**{"steps": STEPS, "block_length": 4, "schedule": "fixed", **text}),
        ModalityDecoding(steps=STEPS, choice_temperature=1.0),
        Guidance(guidance),
        stop_at_eos=False,
    )


def unidisc() -> TinyFamily:
    """Eight text tokens, then a 3 x 3 image; the first row draws, the second writes, the third fills holes in both."""
    model, vocabulary = UNIDISC.load(UNIDISC.export(lively(UNIDISC.settings(UNIDISC_CONFIG))), UNIDISC_CONFIG)
    text, image = _ids(3, 8, 0, vocabulary.text[1]), _ids(3, 9, *vocabulary.image, 2)
    modality = torch.cat((torch.zeros_like(text), torch.ones_like(image)), 1)
    attended = torch.ones_like(modality)
    attended[0, 6:8] = 0  # padding of the static layout is seen and never a target
    given = torch.zeros_like(modality, dtype=torch.bool)
    given[0, :8], given[1, 8:], given[2, ::3] = True, True, True
    batch = unidisc_batch(torch.cat((text, image), 1), modality, attended)
    batch = batch.replace(given=batch.given | given).hide_targets(vocabulary)
    return TinyFamily("unidisc", model, vocabulary, batch, _decoding())


def mdlm() -> TinyFamily:
    """A row without any known token would be all alike: its ties would be broken by rounding."""
    model, vocabulary = MDLM.load(MDLM.export(lively(MDLM.settings(MDLM_CONFIG))), MDLM_CONFIG)
    batch = mdlm_batch(_ids(3, 14, 0, vocabulary.text[1]))
    given = torch.arange(14) < torch.tensor([[3], [1], [6]])
    return TinyFamily("mdlm", model, vocabulary, batch.replace(given=given).hide_targets(vocabulary), _decoding())


def llada(seed: int = 0) -> TinyFamily:
    """Prompts of 3, 5 and 6 tokens before answers of 12, padding on the left, as in batches for generation."""
    model, vocabulary = LLADA.load(
        LLADA.export(lively(LLADA.settings(LLADA_CONFIG), seed), {"block_group_size": 2, "fused": True}), LLADA_CONFIG
    )
    return TinyFamily("llada", model, vocabulary, llada_rows([3, 5, 6], vocabulary), _decoding(temperature=0.0))


def dream() -> TinyFamily:
    """As LLaDA, but the logits at a token predict the next one."""
    model, vocabulary = DREAM.load(DREAM.export(lively(DREAM.settings(DREAM_CONFIG))), DREAM_CONFIG)
    return TinyFamily("dream", model, vocabulary, llada_rows([3, 5, 6], vocabulary), _decoding(temperature=0.0))


def llada_v() -> TinyFamily:
    """LLaDA that sees: prompts with one picture, with two and without, before answers of 12."""
    model, vocabulary = LLADA_V.load(
        LLADA_V.export(lively_weights(LLADA_V.make(LLADA_V.tiny.config))), LLADA_V.tiny.config
    )
    noise = [torch.randint(0, 256, (h, w, 3), generator=torch.Generator().manual_seed(h)) for h, w in ((9, 5), (4, 16))]
    shown = [Image.fromarray(pixels.to(torch.uint8).numpy()) for pixels in noise]
    layout = LladaVLayout(vocabulary, str.split, SamplerConfig(), network=model)
    prompts = [[1, PICTURE, 2, 3], [4, PICTURE, 5, PICTURE], [6, 7]]
    with torch.no_grad():
        rows = [layout.prompt(ids, shown[: ids.count(PICTURE)]) for ids in prompts]
    rows = [[*row, Span.masked_text(12, vocabulary)] for row in rows]
    return TinyFamily("llada_v", model, vocabulary, TokenBatch.from_spans(rows, left=True), _decoding(temperature=0.0))


def llada_moe() -> TinyFamily:
    """LLaDA with experts, loaded from stacked ones; a dense layer first, half of every head turned."""
    model, vocabulary = LLADA_MOE.load(
        LLADA_MOE.export(lively(LLADA_MOE.settings(LLADA_MOE_CONFIG)), {"experts": "stacked"}), LLADA_MOE_CONFIG
    )
    return TinyFamily("llada_moe", model, vocabulary, llada_rows([3, 5, 6], vocabulary), _decoding(temperature=0.0))


def llada2() -> TinyFamily:
    """Block-causal, with experts and token editing: prompts of 3, 5 and 6 tokens, answers to the end of a block of 4."""
    model, vocabulary = LLADA2.load(LLADA2.export(lively(LLADA2.settings(LLADA2_CONFIG))), LLADA2_CONFIG)
    prompts = [Span.text(_ids(1, n, 0, 29, n)[0], True) for n in (3, 5, 6)]
    rows = [[p, Span.masked_text(-p.size % 4 + 12, vocabulary)] for p in prompts]
    config = llada2_sampler(vocabulary, 4, threshold=0.6, edit_threshold=0.3, edit_passes=2)
    config = replace(config, guidance=Guidance(2.0), stop_at_eos=False)
    return TinyFamily("llada2", model, vocabulary, TokenBatch.from_spans(rows, left=True), config)


def llada2_uni() -> TinyFamily:
    """Pictures of 2 x 4 codes behind prompts of 3, 5 and 6 tokens, guided with rescaling, away from shorter ones."""
    config = LLADA2_UNI.tiny.config
    model, vocabulary = LLADA2_UNI.load(LLADA2_UNI.export(lively(LLADA2_UNI.settings(config))), config)
    rows: list[list[list[Span]]] = [[], []]
    for n in (3, 5, 6):
        rest = [Span.masked_image((2, 4), vocabulary), Span.masked_image((1, -n % 4 or 4), vocabulary)]
        prompt, none = (Span.text(_ids(1, size, 0, 29, n)[0], True) for size in (n, 2))
        padding = Span(torch.full((n - 2,), vocabulary.mask_id), Modality.TEXT, True, exists=False)
        rows[0].append([prompt, *rest])
        rows[1].append([padding, none, *rest])
    batch, other = (TokenBatch.from_spans(stream, left=True) for stream in rows)
    return TinyFamily("llada2_uni", model, vocabulary, batch, uni_image_sampler(4, 3, 2.0, threshold=0.6), other)


def llada_rows(prompts: list[int], vocabulary: Vocabulary, answer: int = 12, seed: int = 5) -> TokenBatch:
    """Rows of prompts of the given lengths and a masked answer, aligned on the right."""
    length = max(prompts) + answer
    ids, start = _ids(len(prompts), length, 0, 29, seed), length - answer
    attended = torch.arange(length) >= start - torch.tensor(prompts)[:, None]
    given = (torch.arange(length) < start).expand_as(ids)
    return llada_batch(ids, given, attended).hide_targets(vocabulary)


def mmada() -> TinyFamily:
    """Images of 2 x 2 codes, with MMaDA's own unconditional rows; the second row is partly known."""
    vocabulary = mmada_vocabulary(60, 41, 16, 40, {name: 20 + i for i, name in enumerate(SPECIALS)})
    state = MMADA.export(lively(MMADA.settings(MMADA_CONFIG)))
    model, _ = MMADA.load(state, MMADA_CONFIG, vocabulary=vocabulary)
    codes = torch.tensor([[-1, -1, -1, -1], [-1, 2, -1, -1], [-1, -1, -1, -1]])
    ids = torch.where(codes < 0, vocabulary.image_mask, codes + vocabulary.image[0])
    prompts = MMaDAPrompts(vocabulary, text_length=6)
    batch, other = (
        mmada_batch(rows.ids, vocabulary, rows.visible)
        for rows in (
            prompts.text_to_image(((1, 2), (3, 4, 5), (6,)), ids),
            prompts.text_to_image([[]] * 3, ids),
        )
    )
    return TinyFamily("mmada", model, vocabulary, batch, _decoding(), other)


def parallel() -> TinyFamily:
    """MMaDA's network as MMaDA-Parallel-M: prompts of 1, 2 and 4 words; 2 x 2 codes and six words are decoded together."""
    vocabulary = mmada_vocabulary(60, 41, 16, 40, {name: 20 + i for i, name in enumerate(SPECIALS)})
    model, _ = MMADA.load(MMADA.export(lively(MMADA.settings(MMADA_CONFIG))), MMADA_CONFIG, vocabulary=vocabulary)
    joint = JointSettings(STEPS, max(2, STEPS // 2), 1.0, text_guidance=1.0)
    layout = MMaDALayout(vocabulary, lambda text: [int(word) for word in text.split()], side=2, joint=joint)
    codes = _ids(3, 4, 0, 16, 4).view(3, 2, 2)
    request = layout.edit(TaskInputs(3, ["1", "2 3", "4 5 6 7"], codes=codes, told=True, longest=6))
    config = replace(request.config, stop_at_eos=False)
    return TinyFamily("parallel", model, vocabulary, request.batch, config, request.unconditional[0])


def dynin() -> TinyFamily:
    """Pictures of 2 x 2 codes that are changed and answered in words, by instructions of three lengths."""
    vocabulary = dynin_vocabulary(70, 49, 16, 3, 48, {name: 10 + i for i, name in enumerate(DYNIN_SPECIALS)})
    config = {**MMADA_CONFIG, "new_vocab_size": 70}
    model, _ = DYNIN.load(DYNIN.export(lively(DYNIN.settings(config))), config, vocabulary=vocabulary)
    layout = DyninLayout(vocabulary, lambda text: [int(i) for i in text.split()], text_length=6)
    codes = _ids(3, 4, 0, 16).view(3, 2, 2)
    inputs = TaskInputs(3, ["1 2", "3 4 5", "6"], codes=codes, told=True, longest=6)
    request = layout.edit(inputs)
    return TinyFamily("dynin", model, vocabulary, request.batch, _decoding(), request.unconditional[0])


def lumina_vocabulary() -> Vocabulary:
    return Vocabulary(60, (0, 36), (36, 60), 35, specials={"eos": 34, **LUMINA_IDS})


def lumina() -> TinyFamily:
    """A 3 x 2 image between newlines behind prompts of one length, and the unconditional prompt of another."""
    vocabulary = lumina_vocabulary()
    config = {**LLADA_CONFIG, "vocab_size": 60, "mask_token_id": 35, "n_kv_heads": 4}
    model, _ = LLADA.load(LLADA.export(lively(LLADA.settings(config))), config, vocabulary=vocabulary)
    ids = lumina_ids(_ids(3, 5, 0, 24), (3, 2))
    batch, other = lumina_pair(ids, _ids(3, 2, 0, 24, 7), 7, vocabulary)
    return TinyFamily("lumina", model, vocabulary, batch, _decoding(), other)


def lumina_ids(prompt: Tensor, grid: tuple[int, int], codes: Tensor | None = None) -> Tensor:
    """`[B, P]` prompts, answer and image marks, rows of codes (hidden if None) and newlines, closing marks."""
    batch, (height, width) = len(prompt), grid
    codes = torch.full((batch, height, width), 35) if codes is None else codes
    newline = torch.full((batch, height, 1), LUMINA_IDS["newline"])
    lines = torch.cat((codes, newline), -1).flatten(1)
    marks = [torch.full((batch, 1), LUMINA_IDS[name]) for name in ("answer", "boi", "eoi", "end_answer")]
    return torch.cat((prompt, *marks[:2], lines, *marks[2:]), 1)


def muddit_vocabulary() -> Vocabulary:
    text, codes, rows = CLIP["vocab_size"], MODEL["codebook_size"], MODEL["vocab_size"]
    return Vocabulary(
        text + 1 + rows, (0, text), (text + 1, text + 1 + codes), text, text + rows, {"bos": text - 2, "eos": text - 1}
    )


def muddit() -> TinyFamily:
    """The MM-DiT: ten words, half of them known, and 4 x 6 codes, a line of them known; rows of one layout."""
    vocabulary = muddit_vocabulary()
    empty = torch.tensor([46, 47, *[0] * 8])
    model = MudditDenoiser(tiny_model(), tiny_clip(), vocabulary, STEPS, empty_prompt=empty)
    known = torch.zeros(4, 6, dtype=torch.bool)
    known[0] = True
    words, codes = _ids(3, 10, 0, 48), _ids(3, 24, *vocabulary.image, 3).view(3, 4, 6)
    rows = [[Span.text(w, torch.arange(10) < 5), Span.image(c, known)] for w, c in zip(words, codes, strict=True)]
    batch = TokenBatch.from_spans(rows).hide_targets(vocabulary)
    return TinyFamily("muddit", model, vocabulary, batch, _decoding(block_length=None))


def ddit() -> TinyFamily:
    """The words of D-DiT: ten, half of them known, in front of pictures of 3 x 4 patches; rows of one layout."""
    model = lively_(DualMMDiT(vocab_size=40, **DUAL), 1)
    vocabulary = Vocabulary(40, (0, 40), (40, 40), 39, specials={"eos": 1})
    torch.manual_seed(0)
    encoder = T5Text(T5EncoderModel(T5Config(vocab_size=44, **T5)))
    g = torch.Generator().manual_seed(4)
    words, pictures = _ids(3, 10, 2, 39), torch.randn(3, 3, 4, 4, generator=g)
    known = torch.arange(10) < 5
    rows = [[Span.text(w, known), Span.continuous(p, Modality.IMAGE)] for w, p in zip(words, pictures, strict=True)]
    batch = TokenBatch.from_spans(rows).hide_targets(vocabulary)
    config = replace(_decoding(block_length=None), guidance=Guidance(2.0, hide="text"))
    return TinyFamily("ddit", DualDenoiser(model, encoder, vocabulary), vocabulary, batch, config)


FAMILIES: dict[str, Callable[[], TinyFamily]] = {
    make.__name__: make
    for make in (
        *(unidisc, mdlm, llada, llada_v, dream, llada_moe, llada2, llada2_uni, mmada, parallel, dynin, lumina),
        muddit,
        ddit,
    )
}
_MADE: dict[str, TinyFamily] = {}


def family(name: str) -> TinyFamily:
    """A family, made once per process; nothing changes it."""
    if name not in _MADE:
        _MADE[name] = FAMILIES[name]()
    return _MADE[name]


def lumina_rows(prompts: list[Tensor], vocabulary: Vocabulary, grid: tuple[int, int]) -> TokenBatch:
    """Prompts of any lengths before images of one size, aligned on the right with padding on the left."""
    rows = [lumina_ids(prompt[None], grid)[0] for prompt in prompts]
    length = max(len(row) for row in rows)
    valid = torch.stack([torch.arange(length) >= length - len(row) for row in rows])
    padded = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0)) for row in rows])
    return lumina_batch(padded, vocabulary, valid)
