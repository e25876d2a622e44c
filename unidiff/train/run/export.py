"""A trained model as a folder: weights that are all finite, the vocabulary, and what the rows were."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from unidiff.files import flush_to_disk, replacing_folder
from unidiff.models.trained_on import TrainedOn
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Vocabulary
from unidiff.train.run.run_folder import check_replaceable


def write_export(
    folder: Path, model: MaskedTransformer, vocabulary: Vocabulary, trained: TrainedOn, started_from: str = ""
) -> None:
    """Write `folder` for `MaskedTransformer.from_pretrained`, with `vocabulary.json`; it appears whole or not at all.

    Args:
        trained: what the rows were. started_from: folder of the starting weights, if any.

    Raises:
        ValueError: weights that are not finite, or a folder that holds something else than an export.
        OSError: a full or read-only disk and the like.
    """
    check_finite_weights(model)
    check_replaceable(folder)
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        (temporary / "vocabulary.json").write_text(json.dumps(vocabulary.to_dict(), indent=1), encoding="utf-8")
        trained.save(temporary, started_from=started_from or None)
        for path in temporary.iterdir():
            flush_to_disk(path)


def check_finite_weights(model: torch.nn.Module) -> None:
    """Raise ValueError that names the first weights with NaN or infinity in them."""
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            hint = "lower optimiser.lr"
            if value.dtype == torch.float16:
                hint = "set checkpoint.export_dtype=bfloat16, or " + hint
            raise ValueError(
                f"the averaged weights {name} are not finite in {str(value.dtype)[6:]}, so nothing is exported; {hint}"
            )
