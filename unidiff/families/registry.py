"""The registry of released families: how each is recognised, loaded and written back. A new family is one entry here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unidiff.families.checkpoint.config_keys import section
from unidiff.families.dream.weights import dream_state_dict, dream_vocabulary, load_dream
from unidiff.families.image_tokenizers.llamagen import CONFIG_KEYS, llamagen_state_dict, load_llamagen
from unidiff.families.image_tokenizers.magvit import load_magvit, magvit_state_dict
from unidiff.families.image_tokenizers.vq_model import load_vq_model, vq_model_state_dict
from unidiff.families.llada.weights import llada_state_dict, llada_vocabulary, load_llada
from unidiff.families.mdlm.weights import load_mdlm, mdlm_state_dict, mdlm_vocabulary
from unidiff.families.mmada.weights import load_mmada, mmada_vocabulary
from unidiff.families.muddit.weights import load_muddit, muddit_state_dict, muddit_vocabulary
from unidiff.families.unidisc.weights import load_unidisc, unidisc_state_dict, unidisc_vocabulary
from unidiff.tokens.vocabulary import Vocabulary

Config = Mapping[str, Any]
Loader = Callable[..., tuple[Any, Vocabulary | None]]
Layout = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One released family.

    Args:
        name: short name.
        keys: regular expressions; weights are this family's when each finds some name (without prefixes).
        fits: whether a config is this family's.
        load: `(state, config, dtype=, device=, vocabulary=)` to (model or image tokenizer, vocabulary or None).
        export: (model or image tokenizer, layout) to weights under released names.
        vocabulary: id layout of a config; None for image tokenizers.
        image_tokenizer: name of the family whose codes it reads.
        layout: (names, config) to what else `export` needs: spellings of the same weights that occur.
        needs_config: whether the config is more than a default.
        constants: released names of buffers that the architecture fixes.
    """

    name: str
    keys: tuple[str, ...]
    fits: Callable[[Config], bool]
    load: Loader
    export: Callable[[Any, Layout], dict[str, Tensor]]
    vocabulary: Callable[[Config], Vocabulary] | None = None
    image_tokenizer: str | None = None
    layout: Callable[[Iterable[str], Config], Layout] = lambda names, config: {}
    needs_config: bool = True
    constants: tuple[str, ...] = ()

    def has_keys(self, names: Iterable[str]) -> bool:
        """Whether weights of these names are this family's."""
        return all(self._found(names))

    def has_some_keys(self, names: Iterable[str]) -> bool:
        """Whether weights of these names may be a part of this family's."""
        return any(self._found(names))

    def _found(self, names: Iterable[str]) -> list[bool]:
        names = list(names)
        return [any(re.search(mark, name) for name in names) for mark in self.keys]


LLADA_KEYS = (r"transformer\.wte\.weight$", r"transformer\.(blocks\.0|block_groups\.0\.0)\.ff_proj\.weight$")
MMDIT_KEYS = (r"^transformer_blocks\.0\.attn\.add_q_proj\.weight$", r"^mlm_layer\.conv1\.weight$")
DIT_KEY = r"^(backbone\.)?vocab_embed\.embedding$"


def _denoiser(load: Loader) -> Loader:
    """For families whose config alone fixes the vocabulary."""

    def call(state: Config, config: Config, *, vocabulary: Vocabulary | None = None, **kwargs: Any) -> Any:
        model, implied = load(state, config, **kwargs)
        if vocabulary is not None and vocabulary != implied:
            raise ValueError("the config of this family fixes the vocabulary; leave the argument out")
        return model, implied

    return call


def _tokenizer(load: Callable[..., Any]) -> Loader:
    def call(state: Config, config: Config, *, vocabulary: Vocabulary | None = None, **kwargs: Any) -> Any:
        return load(state, config or None, **kwargs), None

    return call


def _load_lumina(state: Config, config: Config, *, vocabulary: Vocabulary | None = None, **kwargs: Any) -> Any:
    return load_llada(state, config, vocabulary=vocabulary or Vocabulary.named("lumina"), **kwargs)


def _llada_layout(names: Iterable[str], config: Config) -> Layout:
    names = list(names)
    grouped = any("transformer.block_groups." in name for name in names)
    layout = {
        "block_group_size": (config.get("block_group_size") or 1) if grouped else None,
        "fused": any(name.endswith(".att_proj.weight") for name in names),
    }
    return {**layout, **_copies(names, bool(config.get("weight_tying")), "transformer.ff_out.weight")}


def _copies(names: Iterable[str], tied: bool, head: str) -> Layout:
    """A tied head that lies in the file all the same is written back as well."""
    return {"copies": True} if tied and any(re.search(rf"(^|\.){re.escape(head)}$", name) for name in names) else {}


def _dream_layout(names: Iterable[str], config: Config) -> Layout:
    return _copies(names, bool(config.get("tie_word_embeddings")), "lm_head.weight")


def _llada_export(model: Any, layout: Layout) -> dict[str, Tensor]:
    fused, copies = bool(layout.get("fused")), bool(layout.get("copies"))
    return llada_state_dict(model, layout.get("block_group_size"), fused, copies)


def _is(config: Config, *architectures: str, model_type: str | None = None) -> bool:
    listed = config.get("architectures")
    named = [*(listed if isinstance(listed, list | tuple) else ()), config.get("_class_name")]
    return any(name in architectures for name in named) or (
        model_type is not None and config.get("model_type") == model_type
    )


def _dit(config: Config) -> Config:
    """The `model` section of an upstream experiment configuration, empty without one."""
    return section(config, "config", "model") or section(config, "model")


def _has_images(config: Config) -> bool:
    return any(key in _dit(config) for key in ("image_vocab_size", "img_length", "modality_embed"))


def _is_mmada(config: Config) -> bool:
    return _is(config, "MMadaModelLM", model_type="mmada") or "new_vocab_size" in config


def _is_lumina(config: Config) -> bool:
    return _is(config, "LLaDAForMultiModalGeneration")


def _is_llada(config: Config) -> bool:
    return "d_model" in config and "n_layers" in config and not _is_mmada(config) and not _is_lumina(config)


def _is_muddit(config: Config) -> bool:
    if "_class_name" in config:
        return _is(config, "SymmetricTransformer2DModel")
    return "axes_dims_rope" in config and "tokenizer_vocab_size" in config


def _is_meissonic(config: Config) -> bool:
    if "_class_name" in config:
        return _is(config, "Transformer2DModel")
    return "axes_dims_rope" in config and "tokenizer_vocab_size" not in config


def _is_mdlm(config: Config) -> bool:
    return _is(config, "MDLM", model_type="mdlm") or ("n_blocks" in _dit(config) and not _has_images(config))


_MUDDIT: dict[str, Any] = {
    "load": _denoiser(load_muddit),
    "export": lambda model, layout: muddit_state_dict(model),
    "vocabulary": muddit_vocabulary,
    "image_tokenizer": "vq_model",
}
_LLADA: dict[str, Any] = {"keys": LLADA_KEYS, "export": _llada_export, "layout": _llada_layout}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "unidisc",
            (DIT_KEY, r"^blocks\.0\.attention\.attn_qkv\.weight$"),
            _has_images,
            _denoiser(load_unidisc),
            lambda model, layout: unidisc_state_dict(model),
            unidisc_vocabulary,
            "llamagen",
        ),
        Family(
            "mdlm",
            (DIT_KEY, r"^(backbone\.)?blocks\.0\.attn_qkv\.weight$"),
            _is_mdlm,
            _denoiser(load_mdlm),
            lambda model, layout: mdlm_state_dict(model),
            mdlm_vocabulary,
            constants=("backbone.rotary_emb.inv_freq",),
        ),
        Family(
            name="mmada",
            fits=_is_mmada,
            load=load_mmada,
            image_tokenizer="magvit",
            needs_config=False,
            vocabulary=lambda config: mmada_vocabulary(),
            **_LLADA,
        ),
        Family(
            name="lumina",
            fits=_is_lumina,
            load=_load_lumina,
            image_tokenizer="vq_model",
            vocabulary=lambda config: Vocabulary.named("lumina"),
            **_LLADA,
        ),
        Family(name="llada", fits=_is_llada, load=load_llada, vocabulary=llada_vocabulary, **_LLADA),
        Family(
            "dream",
            (r"^model\.layers\.0\.self_attn\.q_proj\.bias$", r"^model\.layers\.0\.mlp\.gate_proj\.weight$"),
            lambda config: _is(config, "DreamModel", model_type="Dream"),
            _denoiser(load_dream),
            lambda model, layout: dream_state_dict(model, bool(layout.get("copies"))),
            dream_vocabulary,
            layout=_dream_layout,
        ),
        Family(name="muddit", keys=(*MMDIT_KEYS, r"^text_decoder\.1\.weight$"), fits=_is_muddit, **_MUDDIT),
        Family(name="meissonic", keys=MMDIT_KEYS, fits=_is_meissonic, **_MUDDIT),
        Family(
            "llamagen",
            (r"^encoder\.conv_blocks\.0\.res\.0\.", r"^quantize\.embedding\.weight$"),
            lambda config: bool(config) and set(config) <= set(CONFIG_KEYS),
            _tokenizer(load_llamagen),
            lambda images, layout: llamagen_state_dict(images),
            needs_config=False,
        ),
        Family(
            "magvit",
            (r"^encoder\.down\.0\.block\.0\.", r"^decoder\.up\.0\.block\.0\."),
            lambda config: "codebook_dim" in config and "encoder" in config,
            _tokenizer(load_magvit),
            lambda images, layout: magvit_state_dict(images),
            needs_config=False,
            constants=("quantize.embedding", "quantize.power_vals"),
        ),
        Family(
            "vq_model",
            (r"^encoder\.down_blocks\.0\.resnets\.0\.", r"^quantize\.embedding\.weight$"),
            lambda config: _is(config, "VQModel") or "num_vq_embeddings" in config,
            _tokenizer(load_vq_model),
            lambda images, layout: vq_model_state_dict(images),
        ),
    )
}


def family_named(name: str) -> Family:
    """A family by its name; `ValueError` for another."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; expected one of {sorted(FAMILIES)}")
    return FAMILIES[name]


def recognise(config: Config, names: Iterable[str]) -> Family:
    """The family of a config (may be empty) and of weight names without prefixes.

    Raises:
        ValueError: none, a config and weights of different families, or several that only a config tells apart.
    """
    names = list(names)
    by_keys = [family for family in FAMILIES.values() if family.has_keys(names)]
    by_config = [family for family in FAMILIES.values() if config and family.fits(config)]
    if both := [family for family in by_keys if family in by_config]:
        return both[0]
    if not by_keys and (part := [family for family in by_config if family.has_some_keys(names)]):
        return part[0]  # loading will say what is missing
    keys, listed = _list(by_keys), ", ".join(names[:3])
    if by_config and names:
        raise ValueError(
            f"the config describes {_list(by_config)}, but the weights are those of {keys or 'no known family'} "
            f"({listed}, ...); put the config and the weights of one model together"
        )
    if config and by_keys:
        only = [f for f in by_keys if not f.needs_config]
        hint = f"its config has no marks of that family ({', '.join(sorted(config)[:4])}, ...)"
        raise ValueError(
            f"the weights are those of {keys}, but {hint}; name the family, for instance {(only or by_keys)[0].name!r}"
        )
    if len(by_keys) == 1:
        return by_keys[0]
    if by_keys:
        raise ValueError(
            f"the weights may be those of {keys}, which only a config.json tells apart; add it, or name the family"
        )
    raise ValueError(
        f"no known family has weights named {listed or 'like that'}, ...; expected one of {sorted(FAMILIES)}"
    )


def _list(families: Iterable[Family]) -> str:
    return " or ".join(family.name for family in families)
