"""Which text belongs to which picture, by likelihood: Winoground's scores, multiple choice, retrieval.

What is compared with each other is hidden at the same places (common random numbers), so differences are far surer than the
scores; every one has a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import half_width
from unidiff.evaluation.report import Estimate
from unidiff.pipelines.decode import row_seeds
from unidiff.pipelines.inputs import as_list
from unidiff.pipelines.options import RowGenerator, one_of
from unidiff.pipelines.score import Difference

LENGTHS: Mapping[str, Callable[[str, int], float]] = {
    "sum": lambda text, tokens: 1.0,
    "token": lambda text, tokens: float(tokens),
    "character": lambda text, tokens: float(len(text)),
    "byte": lambda text, tokens: float(len(text.encode())),
}
"""What a choice's log-likelihood is divided by: (text, tokens that were scored). As lm-evaluation-harness does: `sum` is its
`acc`, `character` its `acc_norm`; `token` is the mean of Brown et al. 2020 (arXiv 2005.14165, 2.4).
"""


@dataclass(frozen=True)
class MatchScores:
    """Scores of G groups of n pictures and n texts, of which number i belong together; float64 `[G, n, n]` by picture and text.

    Attributes:
        draws: float64 `[samples, G, n, n]`, nats, what each draw of masks gave.
    """

    draws: Tensor

    @property
    def scores(self) -> Tensor:
        """float64 `[G, n, n]`, nats."""
        return self.draws.mean(0)

    @property
    def text(self) -> Estimate:
        """Winoground's text score (Thrush et al. 2022, arXiv 2204.03162, eq. 1): every picture prefers its own text."""
        return Estimate.share(self._first(2).all(1).tolist())

    @property
    def image(self) -> Estimate:
        """Its image score (eq. 2): every text prefers its own picture."""
        return Estimate.share(self._first(1).all(1).tolist())

    @property
    def group(self) -> Estimate:
        """Its group score (eq. 3): both."""
        return Estimate.share((self._first(1) & self._first(2)).all(1).tolist())

    def margins(self, rivals: str = "text") -> Difference:
        """Score of each pair minus that of the nearest rival, `[G, n]`: the same picture with other texts, or the same text
        with other pictures (`image`). Where the interval holds 0, more draws may change which one wins.
        """
        one_of(rivals, "rivals", ("text", "image"))
        axis = 2 if rivals == "text" else 1
        others = self._others(axis)  # [G, n]
        own = self.draws.diagonal(dim1=2, dim2=3)  # [samples, G, n]
        draws = own - self.draws.gather(axis + 1, others.unsqueeze(axis).expand(len(self.draws), -1, -1, -1)).squeeze(
            axis + 1
        )
        value, error = draws.mean(0), half_width(draws)
        return Difference(value, value - error, value + error)

    def _others(self, axis: int) -> Tensor:
        """int64 `[G, n]`: the best of the others along texts (2) or pictures (1)."""
        own = torch.eye(self.draws.shape[-1], dtype=torch.bool)
        return self.scores.masked_fill(own, -torch.inf).argmax(axis)

    def _first(self, axis: int) -> Tensor:
        """bool `[G, n]`: a pair scores more than all its rivals; a tie is no find."""
        own = torch.eye(self.draws.shape[-1], dtype=torch.bool)
        return self.scores.diagonal(dim1=1, dim2=2) > self.scores.masked_fill(own, -torch.inf).amax(axis)


def match(
    pipe: Any,
    images: Sequence[Any],
    texts: Sequence[Sequence[str]],
    of: str = "text",
    pmi: bool = False,
    samples: int = 16,
    generator: RowGenerator = 0,
    batch_size: int = 64,
    resize: bool = False,
) -> MatchScores:
    """Score every picture of each group with every text of it.

    Args:
        images: for each group n pictures, as of `pipe.score`. texts: for each group n texts.
        of: "text", log p(text | image); "image", log p(image | text); "both", log p(text, image); "each", the sum of the first two.
            Along texts, "text" prefers plain captions and "image" does not; along pictures it is the other way round.
        pmi: minus log p of the same without sight of the other, which takes that preference away.
        samples: draws of masks, the same for a whole group. generator: as for `pipe.score`, a seed for each group.

    Raises:
        ValueError: groups without or with unlike numbers of pictures and texts, or as of `pipe.score`.
    """
    groups = [as_list(group, "image") for group in images]
    sizes = {len(group) for group in [*groups, *texts]}
    if not groups or len(groups) != len(texts) or len(sizes) != 1:
        raise ValueError(
            f"{len(groups)} groups of pictures and {len(texts)} of texts hold {sorted(sizes)} entries; give as many of each"
        )
    (n,) = sizes
    seeds = row_seeds(generator, len(groups)).repeat_interleave(n * n).tolist()
    shown = [image for group in groups for image in group for _ in range(n)]
    said = [text for group in texts for _ in range(n) for text in group]
    found = pipe.score(shown, said, None, of, pmi, samples, seeds, batch_size, resize)
    return MatchScores(found.draws.unflatten(1, (len(groups), n, n)))


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of the choices of N questions.

    Attributes:
        scores: float64 of every choice, a list for each question, in nats divided as asked.
        best: int64 `[N]`, the choice that scores highest.
        margin: float64 `[N]` each, by how much it does so, and the 95 % interval of that.
    """

    scores: list[list[float]]
    best: Tensor
    margin: Difference

    def accuracy(self, right: Sequence[int]) -> Estimate:
        """The share of questions whose `right` choice scores more than all others; a tie is no find."""
        pairs = zip(self.scores, right, strict=True)
        return Estimate.share(all(own[r] > o for n, o in enumerate(own) if n != r) for own, r in pairs)


def multiple_choice(
    pipe: Any,
    choices: Sequence[Sequence[str]],
    images: Any = None,
    prompts: str | Sequence[str] | None = None,
    normalise: str = "sum",
    of: str = "text",
    pmi: bool = False,
    samples: int = 16,
    generator: RowGenerator = 0,
    batch_size: int = 64,
    resize: bool = False,
) -> ChoiceScores:
    """Which of several texts goes best with a picture, or behind a prompt.

    Args:
        choices: for each question at least two texts.
        images: a picture for each question. prompts: in place of pictures, for models of text alone.
        normalise: what a log-likelihood is divided by, see `LENGTHS`: "sum" (nothing), "token", "character" or "byte".
        of, pmi: as for `pipe.score`. samples: draws of masks, the same for all choices of a question.
        generator: as for `pipe.score`, a seed for each question.

    Raises:
        ValueError: a question with less than two choices, other numbers of pictures or prompts, or as of `pipe.score`.
    """
    one_of(normalise, "normalise", tuple(LENGTHS))
    if not choices or min(map(len, choices)) < 2:
        raise ValueError("every question needs at least two choices, and there must be one; give a list for each")
    counts = [len(own) for own in choices]
    rows = [place for place, count in enumerate(counts) for _ in range(count)]
    given = {"images": as_list(images, "image") if images is not None else None, "prompt": prompts}
    for name, values in given.items():
        if values is not None and (isinstance(values, str) or len(values) != len(choices)):
            raise ValueError(f"{len(choices)} questions need as many {name.removesuffix('s')}s; give one for each")
    columns = {name: values and [values[place] for place in rows] for name, values in given.items()}
    seeds = row_seeds(generator, len(choices))[rows].tolist()
    how = {"of": of, "pmi": pmi, "samples": samples, "generator": seeds, "batch_size": batch_size, "resize": resize}
    texts = [text for own in choices for text in own]
    found = pipe.score(texts=texts, **columns, **how)
    tokens = (found.count_text + found.count_image).tolist()
    lengths = torch.tensor([LENGTHS[normalise](*pair) for pair in zip(texts, tokens, strict=True)], dtype=torch.float64)
    draws = (found.draws / lengths).split(counts, 1)  # [samples, C] each
    order = [own.mean(0).argsort(descending=True, stable=True) for own in draws]
    gaps = torch.stack([own[:, place[0]] - own[:, place[1]] for own, place in zip(draws, order, strict=True)], 1)
    value, error = gaps.mean(0), half_width(gaps)
    scores = [own.mean(0).tolist() for own in draws]
    return ChoiceScores(
        scores, torch.stack([place[0] for place in order]), Difference(value, value - error, value + error)
    )
