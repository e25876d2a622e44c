"""Likelihoods of evaluation: the mask-count NELBO, the mean NLL over uniformly random generation orders, and how text fits.

Its variance is far below that of random times (on the toy 0.02 against 1.36). Targets decide what is bounded: everything for
the joint NELBO, one modality with the other given for a conditional one. The text part of a joint NELBO bounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff.diffusion.noise import NoisyBatch, keyed_uniform, mask_count
from unidiff.diffusion.objective import joint_elbo, masked_nll
from unidiff.models.denoiser import Denoiser
from unidiff.tokens import Modality, TokenBatch, Vocabulary

Scorer = Callable[[TokenBatch, TokenBatch, Tensor], Tensor]
"""`(x_t, x0, where bool [B, L]) -> [B, L]`: -log p(x0_i | x_t) in nats at `where`, 0 elsewhere."""


def model_scorer(
    model: Denoiser, vocabulary: Vocabulary, count: int = 512, time: Callable[[Tensor], Tensor] | None = None
) -> Scorer:
    """Score with a model, through the modality's slice of its head, `count` positions at a time.

    Args:
        time: for a time-conditioned model: from the share of a row's targets that is masked, `[B]`, to the network's
            time input, for instance `lambda r: schedule.sigma(schedule.inverse_rate(r))`.
    """

    def score(x_t: TokenBatch, x0: TokenBatch, where: Tensor) -> Tensor:
        moment = None
        if time is not None:
            unknown = x0.targets & (x_t.ids == x_t.mask_ids(vocabulary))
            moment = time(unknown.sum(1) / x0.targets.sum(1).clamp_min(1))
        where_to_look = x_t.modality, x_t.positions, x_t.attention_mask()
        hidden = model.hidden(x_t.ids, *where_to_look, moment, **x_t.continuous())
        return masked_nll(hidden, model.head, where, x0, vocabulary, count)

    return score


def against_blind(score: Scorer, vocabulary: Vocabulary, unseen: Callable[[TokenBatch], Tensor]) -> Scorer:
    """What sight of some tokens changes: -log p(x0_i | x_t) minus the same with `unseen(x_t)`, bool `[B, L]`, hidden as well.

    Its NELBO is an estimate of minus the pointwise mutual information of targets and unseen tokens: the difference of two
    bounds, by the same masks, so no bound itself.
    """

    def difference(x_t: TokenBatch, x0: TokenBatch, where: Tensor) -> Tensor:
        return score(x_t, x0, where) - score(x_t.hide(unseen(x_t), vocabulary), x0, where)

    return difference


@dataclass(frozen=True)
class Nelbo:
    """Estimated NELBO per row, in nats; divide by the counts for nats per token.

    Attributes:
        text_draws, image_draws: float64 `[samples, B]`, what each draw of masks gave for the targets of the two modalities.
        count_text, count_image: int64 `[B]`, targets.
    """

    text_draws: Tensor
    image_draws: Tensor
    count_text: Tensor
    count_image: Tensor

    @property
    def samples(self) -> int:
        """Draws of each row."""
        return len(self.text_draws)

    @property
    def draws(self) -> Tensor:
        """float64 `[samples, B]`: both modalities together."""
        return self.text_draws + self.image_draws

    @property
    def text(self) -> Tensor:
        """float64 `[B]`, the part of the texts; with `image` it bounds -log p(targets | given)."""
        return self.text_draws.mean(0)

    @property
    def image(self) -> Tensor:
        """float64 `[B]`, the part of the pictures."""
        return self.image_draws.mean(0)

    @property
    def total(self) -> Tensor:
        """float64 `[B]`, the bound."""
        return self.text + self.image

    @property
    def variance(self) -> Tensor:
        """float64 `[B]`, of `total`; see `variance_of_mean`."""
        return variance_of_mean(self.draws)

    @property
    def error(self) -> Tensor:
        """float64 `[B]`: half of the width of the 95 % interval of `total`; NaN for a single draw."""
        return half_width(self.draws)

    def __add__(self, other: Nelbo) -> Nelbo:
        """Chain rule: the NELBO of one set of targets, then of another given the first, from as many draws."""
        return Nelbo(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @classmethod
    def cat(cls, parts: Sequence[Nelbo]) -> Nelbo:
        """Rows of several estimates of as many draws, in the host's memory."""
        names = vars(parts[0])
        return cls(**{name: torch.cat([getattr(part, name).cpu() for part in parts], -1) for name in names})


def variance_of_mean(draws: Tensor) -> Tensor:
    """Variance of the mean over draws `[samples, ...]` from the differences of neighbours; NaN for a single draw.

    Right for draws that are stratified in their order too (Wolter 2007, Introduction to Variance Estimation, 8.2).
    """
    number = len(draws)
    if number < 2:
        return torch.full_like(draws[0], torch.nan)
    return draws.diff(dim=0).square().sum(0) / (2 * number * (number - 1))


def half_width(draws: Tensor) -> Tensor:
    """Half of the width of the 95 % interval of the mean over draws `[samples, ...]` (Student's t); NaN for a single draw.

    Draws of two rows by the same masks may be subtracted first: the interval is then that of the difference. The degrees of
    freedom are Satterthwaite's (1946), 2 (sum d^2)^2 / sum d^4 of the differences d of neighbours: draws that hide few
    tokens weigh more than others and differ more, so that few of many draws may decide. At most those of equal draws.
    """
    number = len(draws)
    if number < 2:
        return torch.full_like(draws[0], torch.nan)
    steps = draws.diff(dim=0)
    steps = steps / steps.abs().amax(0).clamp_min(torch.finfo(draws.dtype).tiny)  # their size does not matter
    second, fourth = steps.square().sum(0), steps.pow(4).sum(0)
    freedom = (2 * second.square() / fourth.clamp_min(1)).clamp(1, 2 * (number - 1) ** 2 / (3 * number - 4))
    return student_t95(freedom) * variance_of_mean(draws).sqrt()


def student_t95(freedom: Tensor) -> Tensor:
    """The .975 quantile of Student's t, by its expansion around the normal one (Abramowitz and Stegun 1964, 26.7.5)."""
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum((term / freedom**power for power, term in enumerate(terms, 1)), torch.zeros_like(freedom))


@torch.no_grad()
def average_nelbo(score: Scorer, batch: TokenBatch, draws: Iterable[tuple[NoisyBatch, Tensor]]) -> Nelbo:
    """Mean over draws of (x_t, weight `[B]`), at least one, of weight times the summed NLL of the masked targets."""
    text, image, terms = [], [], None
    for noisy, weight in draws:
        nll = score(noisy.batch, batch, noisy.masked).double()
        terms = joint_elbo(nll, weight.double(), batch)
        text.append(terms.row_text)
        image.append(terms.row_image)
    if terms is None:
        raise ValueError("a NELBO needs at least one draw; ask for samples >= 1")
    return Nelbo(torch.stack(text), torch.stack(image), terms.count_text, terms.count_image)


def mask_count_nelbo(
    score: Scorer,
    batch: TokenBatch,
    vocabulary: Vocabulary,
    keys: Tensor,
    seed: int = 0,
    samples: int = 8,
    stream: int = 0,
) -> Nelbo:
    """(n/k) times the NLL of a random k-subset of the n targets, k uniform on 1..n, stratified over the draws.

    Args:
        keys: int64 `[B]`, one per row (a global sample index): draws depend on it, not on the batch.
        samples: draws per row, one forward pass each.
        stream: keeps several estimates of the same rows independent.
    """

    def draws() -> Iterator[tuple[NoisyBatch, Tensor]]:
        place = batch.targets.cumsum(1)  # 1 for the first target, wherever padding puts it
        n = place[:, -1]
        for j in range(samples):
            u = keyed_uniform(seed, keys, (stream << 20) + j, batch.shape[1] + 1)  # [B, L + 1]
            k = 1 + torch.floor(n * ((j + u[:, 0]) / samples)).long()
            k = torch.minimum(k, n)  # rounding may reach n + 1; rows without targets have k = 0
            yield mask_count(batch, k, vocabulary, u.gather(1, place)), n / k.clamp_min(1)

    return average_nelbo(score, batch, draws())


def nelbo_in_parts(
    score: Scorer,
    rows: TokenBatch,
    vocabulary: Vocabulary,
    keys: Tensor,
    seed: int = 0,
    samples: int = 8,
    stream: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    tick: Callable[[int], object] = lambda rows: None,
) -> Nelbo:
    """`mask_count_nelbo` of `batch_size` rows at a time on a device; results do not depend on either.

    Args:
        tick: called with how many more rows are done.
    """
    parts = []
    for place in torch.arange(len(rows.ids)).split(batch_size):
        part, own = rows.rows(place).to(device), keys[place].to(device)
        parts.append(mask_count_nelbo(score, part, vocabulary, own, seed, samples, stream))
        tick(len(place))
    return Nelbo.cat(parts)


SCORED: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "text": lambda words, picture: (words,),
    "image": lambda words, picture: (picture,),
    "both": lambda words, picture: (words | picture,),
    "each": lambda words, picture: (words, picture),
}
"""What a score is of: (words, picture), bool `[B, L]`, to sets of targets, each explained by all other tokens. `each` is
log p(text | image) + log p(image | text), a pseudo-likelihood of two blocks (Besag 1975, The Statistician 24).
"""


SCORE_STREAM = 11
"""Masks of scores: rows of one seed are hidden alike wherever they are scored."""


def nelbo_of_parts(score: Scorer, rows: TokenBatch, parts: Sequence[Tensor], *args: Any, **more: Any) -> Nelbo:
    """The sum over sets of targets of the NELBO of each given all other tokens, by the same draws.

    Args:
        parts: bool `[B, L]` each. The others: of `nelbo_in_parts`.
    """
    first, *others = (nelbo_in_parts(score, rows.replace(given=~part), *args, **more) for part in parts)
    return sum(others, first)


def without_eos_fill(batch: TokenBatch, eos_id: int) -> TokenBatch:
    """Make the fill after the first end-of-text token of each sample invisible and uncounted, as if it were cropped.

    With the fill (the batch as it is) the text's length is part of what is modelled; report both.
    """
    eos = batch.is_modality(Modality.TEXT) & (batch.ids == eos_id)
    rows, length = batch.shape
    place = torch.arange(length, device=eos.device).expand(rows, length)
    sample = batch.sample_ids.clamp_min(0)  # padding has no end of text
    none = place.new_full((rows, int(sample.max()) + 1), length)
    first = none.scatter_reduce(1, sample, torch.where(eos, place, length), "amin").gather(1, sample)  # [B, L]
    fill = eos & (place > first)
    return batch.replace(
        valid=batch.valid & ~fill, given=batch.given | fill, sample_ids=batch.sample_ids.masked_fill(fill, -1)
    )


@torch.no_grad()
def fit_score(
    score: Scorer, vocabulary: Vocabulary, batch: TokenBatch, targets: Tensor, parts: int | Tensor = 2
) -> Tensor:
    """Conditional pseudo-log-likelihood of the target tokens given all others, nats, float32 `[B]`.

    The mean over two kinds of hiding: all target tokens at once, and each of `parts` interleaved parts with the others
    known (in the spirit of Salazar et al. 2020, arXiv 1910.14659, at a fixed price of `parts + 1` forward passes). What
    is hidden depends on places only, so that rows of one request compare fairly: the same words score higher beside the
    picture that shows them.

    Args:
        batch: complete rows `[B, L]`. targets: bool `[B, L]`; a row without any scores 0.
        parts: at least 2, of all rows or int64 `[B]`.
    """
    number_of = torch.as_tensor(parts, device=batch.ids.device).expand(len(batch.ids))
    least, most = number_of.aminmax()
    if least < 2:
        raise ValueError(f"parts is {int(least)}; expected at least 2")
    part = (targets.long().cumsum(1) - 1) % number_of[:, None]  # [B, L]
    masks, total = batch.mask_ids(vocabulary), torch.zeros(len(batch.ids), device=batch.ids.device)
    for hidden in (targets, *(targets & (part == number) for number in range(int(most)))):
        x_t = batch.replace(ids=torch.where(hidden, masks, batch.ids))
        total -= 0.5 * torch.where(hidden, score(x_t, batch, hidden), 0).float().sum(1)
    return total
