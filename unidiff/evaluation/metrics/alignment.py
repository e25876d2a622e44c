"""CLIPScore: how near pictures are to their captions for a CLIP model in a local folder (Hessel et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unidiff.errors import few
from unidiff.evaluation.metrics.base import Metric, Numbers
from unidiff.evaluation.networks.folder import load_from_folder
from unidiff.evaluation.report import Estimate
from unidiff.evaluation.results.base import Results
from unidiff.evaluation.results.captions import Captions, read_captions
from unidiff.evaluation.results.pictures import PictureSet


class ClipJudge:
    """A CLIP model of transformers. Raises `FileNotFoundError` or `ValueError`: no folder of one."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        import transformers

        what = "a CLIP model of transformers"
        self.model = load_from_folder(transformers.AutoModel, folder, what, use_safetensors=True).to(device).eval()
        self.processor = load_from_folder(transformers.AutoProcessor, folder, what)
        if not hasattr(self.model, "get_text_features"):
            raise ValueError(
                f"{str(folder)!r} holds {type(self.model).__name__}, which knows no texts; expected {what}"
            )
        self.longest = self.model.config.text_config.max_position_embeddings
        self.device = device

    @torch.inference_mode()
    def score(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> tuple[Tensor, int]:
        """100 max(cos, 0) of each pair, float64 `[B]`, and how many captions were cut."""
        texts = self.processor(text=list(captions), return_tensors="pt", padding=True)
        cut = int((texts["attention_mask"].sum(1) > self.longest).sum())
        inputs = self.processor(
            text=list(captions), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
        )
        words = _unit(self.model.get_text_features(**inputs.to(self.device)))
        shown = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        seen = _unit(self.model.get_image_features(**shown))
        return 100 * (words * seen).sum(1).clamp_min(0).cpu(), cut


def _unit(found: Any) -> Tensor:
    """Features `[B, D]`, which newer versions return in an object, with length 1 in float64."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(features.double(), dim=1)


def clip_scores(judge: ClipJudge, pictures: PictureSet, captions: Captions, results: Results) -> Tensor:
    """The score of every picture, float64 `[N]`; where it has several captions, their mean.

    Raises:
        ValueError: pictures without a caption.
    """
    said = {name: captions.of_picture(name) for name in pictures.names}
    if missing := [name for name, words in said.items() if not words]:
        raise ValueError(f"{len(missing)} of {len(said)} pictures have no caption: {few(missing)}")
    pairs = [(number, words) for number, name in enumerate(pictures.names) for words in said[name] or ()]
    scores, cut = [], 0
    results.tick(0, len(pairs))
    shown: dict[int, Image.Image] = {}
    for start in range(0, len(pairs), results.batch_size):
        part = pairs[start : start + results.batch_size]
        shown = {number: shown.get(number) or pictures.read(number) for number, _ in part}
        found, more = judge.score([shown[number] for number, _ in part], [words for _, words in part])
        scores.append(found)
        cut += more
        results.tick(len(part), len(pairs))
    if cut:
        results.notes.append(f"{cut} captions are longer than the {judge.longest} tokens of this CLIP and were cut")
    results.about["captions"], results.about["captions_cut"] = len(pairs), cut
    rows = torch.tensor([number for number, _ in pairs])
    sums = torch.zeros(len(pictures), dtype=torch.float64).index_add_(0, rows, torch.cat(scores))
    return sums / rows.bincount(minlength=len(pictures))


def _clipscore(results: Results) -> Numbers:
    assert isinstance(results.network, str | Path)
    pictures = PictureSet.of(results.made, "made")
    captions = read_captions(results.path("made" if results.against is None else "against"))
    judge = ClipJudge(Path(results.network), results.device)
    scores = clip_scores(judge, pictures, captions, results)
    results.about |= {"network": Path(results.network).name, "made_pictures": pictures.census()}
    results.keys += pictures.names
    results.notes += [remark] if (remark := pictures.remark()) else []
    return {"clipscore": Estimate.mean(scores.numpy())}


CLIPSCORE = Metric(
    "clipscore",
    None,
    _clipscore,
    "a folder of pictures",
    "their captions, where these are not in that folder (optional)",
    "the folder of a CLIP model",
)
