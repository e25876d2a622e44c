"""How likely a model finds texts and pictures: the mask-count NELBO of rows that are known in full, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from unidiff.diffusion.likelihood import Scorer, model_scorer, nelbo_in_parts
from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.pipelines.decode import columns_of, row_seeds, texts_of
from unidiff.pipelines.options import RowGenerator, flag, one_of, whole
from unidiff.tokens import Modality, TokenBatch, Vocabulary

OF = ("text", "image", "both")
_STREAM = 11


@dataclass
class ScoreOutput(BaseOutput):
    """Log-likelihoods of B rows in nats; more is likelier.

    Attributes:
        log_prob: float64 `[B]`, a lower bound of log p (minus the estimated NELBO), or a difference of two such bounds.
        low, high: float64 `[B]`, its 95 % interval: what the draws of masks leave open, not how loose the bound is.
        text, image: float64 `[B]`, the parts of the two modalities.
        count_text, count_image: int64 `[B]`, tokens that were scored; end-of-text counts.
        seeds: int64 `[B]`, of the masks.
    """

    log_prob: Tensor
    low: Tensor
    high: Tensor
    text: Tensor
    image: Tensor
    count_text: Tensor
    count_image: Tensor
    seeds: Tensor

    @property
    def per_token(self) -> Tensor:
        """float64 `[B]`, nats per token that was scored."""
        return self.log_prob / (self.count_text + self.count_image)

    @property
    def bits_per_token(self) -> Tensor:
        """float64 `[B]`: the code length that the bound promises, bits per token."""
        return -self.per_token / torch.log(torch.tensor(2.0, dtype=torch.float64))


@torch.no_grad()
def score_of(
    pipe: Any,
    images: Any = None,
    texts: str | Sequence[str] | None = None,
    prompt: str | Sequence[str] | None = None,
    of: str | None = None,
    pmi: bool = False,
    samples: int = 16,
    generator: RowGenerator = 0,
    batch_size: int = 64,
    resize: bool = False,
) -> ScoreOutput:
    """How likely the model finds texts and pictures, in nats, each row with a 95 % interval.

    The mask-count bound: the mean NLL over random orders of generation, with counts of masked tokens spread evenly.

    Args:
        images, texts: one or a list each, as for `inpaint`; one entry goes with as many as the other has.
        prompt: what texts go on from, which is not scored; of models of text alone.
        of: "text" (words given the picture), "image" (the picture given words), "both" (together); the other modality
            is hidden where it was not given. None: what was given.
        pmi: how much likelier the other modality makes it: log p(text | image) - log p(text), so that plain captions
            are not preferred. `of` is "text" where nothing else is asked for.
        samples: masks per row, each a forward pass; at least 2.
        generator: an int or generator hides the same places in all rows, which compares them best; a list has a
            seed for each row, for means over many.
        batch_size: rows at once; results do not depend on it. resize: as for `caption`.

    Raises:
        ValueError: nothing to score, or as for `inpaint`.
    """
    if of is not None:
        one_of(of, "of", OF)
    flag(pmi, "pmi")
    whole(samples, "samples", 2, 100_000)
    whole(batch_size, "batch_size", 1, 100_000)
    given = [name for name, value in (("text", texts), ("image", images)) if value is not None]
    if not given:
        raise ValueError("nothing to score; give images, texts or both")
    if prompt is not None and pipe.images is not None:
        raise ValueError("prompt is for models of text alone; give the caption as texts")
    of = of or (given[0] if pmi or len(given) == 1 else "both")
    if of not in given and (of != "both" or len(given) == 1):
        raise ValueError(f"of is {of!r}, but only {given[0]}s were given; give images and texts")
    if pmi and (of == "both" or len(given) == 1):
        raise ValueError("pmi is of one modality beside the other; give images and texts, and of='text' or 'image'")
    said = None if texts is None else texts_of(texts, "text")
    asked = None if prompt is None else texts_of(prompt, "prompt", empty=True)
    codes = None if images is None else pipe._read(images, resize, "image").codes
    rows = columns_of(1, image=codes, text=said, prompt=asked)
    count = len(next(iter(rows.values())))
    several = isinstance(generator, list | tuple)
    seeds = row_seeds(generator, count if several else 1).expand(count)
    # 1. rows that are known in full, of which some tokens are to be explained by the others
    layout, vocabulary = pipe.layout, pipe.vocabulary
    inputs = TaskInputs(count, rows.get("text"), turns=rows.get("prompt"), codes=rows.get("image"))
    request: DecodeRequest = layout.known(inputs)
    end = vocabulary.specials.get("eos", -1)
    words = request.words | (request.batch.is_modality(Modality.TEXT) & (request.batch.ids == end))
    targets = {"text": words, "image": request.picture, "both": words | request.picture}[of]
    if not bool(targets.any(1).all()):
        raise ValueError(f"{layout.family} writes rows in which {of!r} cannot be scored; ask for another")
    batch = request.batch.replace(given=~targets)
    # 2. how well the model explains them, beside the other modality or without sight of it
    model = layout.prepared(pipe, request, request.config, seeds).model
    judge = model_scorer(model, vocabulary, time=lambda share: share)
    if pmi:
        judge = _against_blind(judge, vocabulary, Modality.IMAGE if of == "text" else Modality.TEXT)
    how = 0, samples, _STREAM, batch_size, pipe._execution_device
    with pipe.progress_bar(total=count) as bar:
        found = nelbo_in_parts(judge, batch, vocabulary, seeds, *how, bar.update)
    bound, error = -found.total, found.error
    ends = bound - error, bound + error
    return ScoreOutput(bound, *ends, -found.text, -found.image, found.count_text, found.count_image, seeds)


def _against_blind(judge: Scorer, vocabulary: Vocabulary, other: Modality) -> Scorer:
    """What sight of the other modality changes, by the same masks."""

    def score(x_t: TokenBatch, x0: TokenBatch, where: Tensor) -> Tensor:
        return judge(x_t, x0, where) - judge(x_t.hide(x_t.is_modality(other), vocabulary), x0, where)

    return score
