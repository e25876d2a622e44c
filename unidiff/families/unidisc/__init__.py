"""UniDisc."""

from unidiff.families.checkpoint.dit_names import DIT_KEY, has_images
from unidiff.families.family import Family, denoiser
from unidiff.families.unidisc.weights import load_unidisc, unidisc_state_dict, unidisc_vocabulary

UNIDISC = Family(
    name="unidisc",
    keys=(DIT_KEY, r"^blocks\.0\.attention\.attn_qkv\.weight$"),
    fits=has_images,
    load=denoiser(load_unidisc),
    export=lambda model, spelling: unidisc_state_dict(model),
    vocabulary=unidisc_vocabulary,
    image_tokenizer="llamagen",
)
