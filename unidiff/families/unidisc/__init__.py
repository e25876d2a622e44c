"""UniDisc."""

from unidiff.families.checkpoint.dit import DIT_KEY, TINY_SHAPE, has_images
from unidiff.families.family import Family, Tiny
from unidiff.families.unidisc.published import RELEASES
from unidiff.families.unidisc.rows import UniDiscLayout
from unidiff.families.unidisc.weights import unidisc_keymap, unidisc_settings, unidisc_vocabulary

_TINY = {
    **TINY_SHAPE,
    "norm_type": "rms",
    "qk_norm": True,
    "modality_embed": True,
    "text_vocab_size": 17,
    "image_vocab_size": 12,
}

UNIDISC = Family(
    name="unidisc",
    keys=(DIT_KEY, r"^blocks\.0\.attention\.attn_qkv\.weight$"),
    fits=has_images,
    settings=unidisc_settings,
    keymap=unidisc_keymap,
    vocabulary=unidisc_vocabulary,
    vocabularies={
        "unidisc-vq16": unidisc_vocabulary({"vocab_size": 48385, "model": {}}),
        "unidisc-magvit": unidisc_vocabulary({"vocab_size": 40193, "model": {}}),
    },
    image_tokenizer="llamagen",
    releases=RELEASES,
    unstated=("cond_dim", "dropout"),
    tiny=Tiny({"model": _TINY}, (0.845297, 1.50554, 0.790528, -1.35141)),
    layout=UniDiscLayout.of,
)
