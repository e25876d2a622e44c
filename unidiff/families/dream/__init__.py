"""Dream, and DiffuCoder and Dream-Coder, which have its network."""

from unidiff.families.dream.weights import dream_state_dict, dream_vocabulary, load_dream
from unidiff.families.family import Family, config_names, copied_head, denoiser

DREAM = Family(
    name="dream",
    keys=(r"^model\.layers\.0\.self_attn\.q_proj\.bias$", r"^model\.layers\.0\.mlp\.gate_proj\.weight$"),
    fits=lambda config: config_names(config, "DreamModel", model_type="Dream"),
    load=denoiser(load_dream),
    export=lambda model, spelling: dream_state_dict(model, bool(spelling.get("copies"))),
    vocabulary=dream_vocabulary,
    spelling=lambda names, config: copied_head(names, bool(config.get("tie_word_embeddings")), "lm_head.weight"),
)
