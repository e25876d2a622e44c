"""How likely a model finds texts and pictures: the mask-count NELBO of rows that are known in full, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from unidiff.diffusion.likelihood import SCORE_STREAM, SCORED, against_blind, half_width, model_scorer, nelbo_of_parts
from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.pipelines.decode import columns_of, row_seeds, texts_of
from unidiff.pipelines.inputs import as_list
from unidiff.pipelines.options import RowGenerator, flag, kind_of, one_of, whole
from unidiff.tokens import Modality
from unidiff.tokens.text import notes_on

_NATS_PER_BIT = math.log(2)


class Difference(NamedTuple):
    """How much more one row scores than another, float64 `[N]` in nats, and its 95 % interval."""

    value: Tensor
    low: Tensor
    high: Tensor


@dataclass
class ScoreOutput(BaseOutput):
    """Log-likelihoods of B rows in nats; more is likelier.

    Intervals are of 95 %: what the draws of masks leave open, not how loose the bound is.

    Attributes:
        log_prob: float64 `[B]`, a lower bound of log p (minus the estimated NELBO), or a difference of two such bounds.
        low, high: float64 `[B]`, its interval.
        text, image: float64 `[B]`, the parts of the two modalities.
        count_text, count_image: int64 `[B]`, tokens that were scored; end-of-text counts.
        seeds: int64 `[B]`, of the masks.
        text_draws, image_draws: float64 `[samples, B]`, what each draw of masks gave; the parts are their means.
    """

    log_prob: Tensor
    low: Tensor
    high: Tensor
    text: Tensor
    image: Tensor
    count_text: Tensor
    count_image: Tensor
    seeds: Tensor
    text_draws: Tensor
    image_draws: Tensor

    @property
    def draws(self) -> Tensor:
        """float64 `[samples, B]`, what each draw of masks gave; `log_prob` is their mean."""
        return self.text_draws + self.image_draws

    @property
    def error(self) -> Tensor:
        """float64 `[B]`, nats: half of the width of the interval."""
        return self.high - self.log_prob

    @property
    def text_error(self) -> Tensor:
        """float64 `[B]`, nats: `text` is open by plus or minus this."""
        return half_width(self.text_draws)

    @property
    def image_error(self) -> Tensor:
        """float64 `[B]`, nats: `image` is open by plus or minus this."""
        return half_width(self.image_draws)

    @property
    def per_token(self) -> Tensor:
        """float64 `[B]`, nats per token that was scored."""
        return self.log_prob / (self.count_text + self.count_image)

    @property
    def per_token_error(self) -> Tensor:
        """float64 `[B]`: `per_token` is open by plus or minus this."""
        return self.error / (self.count_text + self.count_image)

    @property
    def bits_per_token(self) -> Tensor:
        """float64 `[B]`: the code length that the bound promises, bits per token."""
        return -self.per_token / _NATS_PER_BIT

    @property
    def bits_per_token_error(self) -> Tensor:
        """float64 `[B]`: `bits_per_token` is open by plus or minus this."""
        return self.per_token_error / _NATS_PER_BIT

    def difference(self, first: Sequence[int] | Tensor, second: Sequence[int] | Tensor) -> Difference:
        """log p of rows `first` minus that of rows `second`, `[N]` each.

        Draw by draw, so where both were hidden alike (one seed) the interval is that of common random numbers (Owen 2013,
        Monte Carlo theory, methods and examples, 8.6): far narrower than the two apart.
        """
        draws = self.draws[:, torch.as_tensor(first)] - self.draws[:, torch.as_tensor(second)]
        value, error = draws.mean(0), half_width(draws)
        return Difference(value, value - error, value + error)


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
    codes: Tensor | None = None,
) -> ScoreOutput:
    """How likely the model finds texts and pictures, in nats, each row with a 95 % interval; words that it does not know are
    named in a warning.

    The mask-count bound: the mean NLL over random orders of generation, with counts of masked tokens spread evenly.

    Args:
        images, texts: one or a list each, as for `inpaint`; one entry goes with as many as the other has.
        prompt: what texts go on from, which is not scored; of models of text alone.
        of: "text" (words given the picture), "image" (the picture given words), "both" (together), "each" (each given the
            other, log p(text | image) + log p(image | text), two passes a draw, the best judge of pictures that were
            drawn for words); the other modality is hidden where it was not given. None: what was given.
        pmi: how much likelier the other modality makes it: log p(text | image) - log p(text), so that plain captions
            are not preferred (pointwise mutual information; Holtzman et al. 2021, arXiv 2104.08315, eq. 3). `of` is "text"
            where nothing else is asked for. With models of text alone: beside the prompt, and with a hidden one.
        samples: masks per row, each a forward pass; at least 2.
        generator: an int or generator hides the same places in all rows, which compares them best; a list has a
            seed for each row, for means over many.
        batch_size: rows at once; results do not depend on it. resize: as for `caption`.
        codes: int64 `[B, h, w]` in place of images: those of a decode (`out.codes`) as they were drawn. Pictures of them
            need not be read as the same codes again.

    Raises:
        ValueError: nothing to score, or as for `inpaint`.
    """
    if of is not None:
        one_of(of, "of", tuple(SCORED))
    flag(pmi, "pmi")
    whole(samples, "samples", 2, 100_000)
    whole(batch_size, "batch_size", 1, 100_000)
    seen = _codes_of(pipe, images, codes, resize)
    given = [name for name, value in (("text", texts), ("image", seen)) if value is not None]
    if not given:
        raise ValueError("nothing to score; give images, texts or both")
    if prompt is not None and pipe.images is not None:
        raise ValueError("prompt is for models of text alone; give the caption as texts")
    of = of or (given[0] if pmi or len(given) == 1 else "both")
    if len(given) == 1 and of != given[0]:
        raise ValueError(f"of is {of!r}, but only {given[0]}s were given; give images and texts")
    if pmi and prompt is None and (of not in given or len(given) == 1):
        raise ValueError("pmi is of one modality beside the other; give images and texts, and of='text' or 'image'")
    said = None if texts is None else texts_of(texts, "text")
    asked = None if prompt is None else texts_of(prompt, "prompt", empty=True)
    notes_on([*(said or ()), *(asked or ())], pipe.texts)
    rows = columns_of(1, image=seen, text=said, prompt=asked)
    count = len(next(iter(rows.values())))
    several = isinstance(generator, list | tuple)
    seeds = row_seeds(generator, count if several else 1).expand(count)
    # 1. rows that are known in full, of which some tokens are to be explained by the others
    layout, vocabulary = pipe.layout, pipe.vocabulary
    inputs = TaskInputs(count, rows.get("text"), turns=rows.get("prompt"), codes=rows.get("image"))
    request: DecodeRequest = layout.known(inputs)
    end = vocabulary.specials.get("eos", -1)
    words = request.words | (request.batch.is_modality(Modality.TEXT) & (request.batch.ids == end))
    targets = SCORED[of](words, request.picture)
    if not all(bool(part.any(1).all()) for part in targets):
        raise ValueError(f"{layout.family} writes rows in which {of!r} cannot be scored; ask for another")
    # 2. how well the model explains them, beside the other modality or without sight of it
    model = layout.prepared(pipe, request, request.config, seeds).model
    judge = model_scorer(model, vocabulary, time=lambda share: share)
    if pmi:
        other = Modality.IMAGE if of == "text" else Modality.TEXT
        alone = prompt is not None
        unseen = lambda x_t: x_t.given & x_t.valid if alone else x_t.is_modality(other)  # noqa: E731
        judge = against_blind(judge, vocabulary, unseen)
    own = seeds, 0, samples, SCORE_STREAM, batch_size, pipe._execution_device
    with pipe.progress_bar(total=len(targets) * count) as bar:
        found = nelbo_of_parts(judge, request.batch, targets, vocabulary, *own, bar.update)
    bound, error = -found.total, found.error
    parts = -found.text, -found.image, found.count_text, found.count_image
    return ScoreOutput(bound, bound - error, bound + error, *parts, seeds, -found.text_draws, -found.image_draws)


def _codes_of(pipe: Any, images: Any, codes: Tensor | None, resize: bool) -> Tensor | None:
    """int64 `[B, h, w]` of pictures or codes, None for neither; a picture that comes several times is read once."""
    if codes is None:
        if images is None:
            return None
        items = as_list(images, "image")
        first: dict[int, int] = {}  # place of each picture among those that are read
        places = [first.setdefault(id(item), len(first)) for item in items]
        once = [items[places.index(place)] for place in range(len(first))]
        known: Tensor = pipe._read(once, resize, "image").codes
        return known[places]
    if images is not None:
        raise ValueError("images and codes both say what the pictures are; give one of them")
    if pipe.images is None:
        raise ValueError(f"{pipe.layout.family} knows no pictures; leave codes out")
    if not isinstance(codes, Tensor) or codes.ndim != 3 or codes.dtype != torch.int64:
        found = f"{codes.dtype} {list(codes.shape)}" if isinstance(codes, Tensor) else kind_of(codes)
        raise ValueError(f"codes are {found}; expected int64 [B, h, w], as the codes of a result")
    return codes.cpu()
