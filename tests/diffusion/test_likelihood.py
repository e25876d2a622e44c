"""NELBO estimators against exact enumeration, on a two-modality denoiser that fits no joint distribution."""

import math

import pytest
import torch
from reference.enumeration import all_masks, exact_block_nelbo, leave_one_out_sums, mask_moments
from reference.loss_weights import cosine_count, cosine_count_weight
from reference.nelbo import block_batches, block_nelbo, condition_on, leave_one_out_nelbo, log_prob_scorer, time_nelbo

from unidiff.diffusion import get_schedule, keyed_uniform, mask_count
from unidiff.diffusion.likelihood import average_nelbo, mask_count_nelbo, model_scorer, student_t95, without_eos_fill
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(3, 4)
N = 2000
MIX = torch.randn(32, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # 4 positions x 8 ids


def log_probs(x_t):
    """float64 log-probabilities that depend on every visible token, each modality over its own slice."""
    size, length = VOCABULARY.size, x_t.shape[1]
    seen = torch.nn.functional.one_hot(x_t.ids, size).double()
    logits = (seen.flatten(1) @ MIX).view(-1, length, size)
    out = torch.full_like(logits, -torch.inf)
    for modality in Modality:
        start, stop = VOCABULARY.range_of(modality)
        part = logits[..., start:stop].log_softmax(-1)
        where = (x_t.modality == modality)[..., None]
        out[..., start:stop] = torch.where(where, part, out[..., start:stop])
    return out


SCORER = log_prob_scorer(log_probs)
ROW = [Span.text([0, 2]), Span.image(torch.tensor([[5, 7]]))]


def rows(n=N):
    return TokenBatch.from_spans([ROW]).rows(torch.zeros(n, dtype=torch.long))


def within(values, expected, sigmas=4.0):
    error = float(values.std()) / len(values) ** 0.5
    assert error > 0
    assert abs(float(values.mean()) - float(expected)) < sigmas * error


def test_estimators_are_unbiased():
    exact = mask_moments(SCORER, rows(1), VOCABULARY).nelbo()[0]
    keys, linear = torch.arange(N), get_schedule("linear")
    within(mask_count_nelbo(SCORER, rows(), VOCABULARY, keys, seed=1, samples=1).total, exact)
    within(mask_count_nelbo(SCORER, rows(), VOCABULARY, keys, seed=2, samples=3).total, exact)
    within(time_nelbo(SCORER, rows(), VOCABULARY, linear, keys, seed=3, samples=1).total, exact)
    cosine = get_schedule("cosine")
    within(time_nelbo(SCORER, rows(), VOCABULARY, cosine, keys, seed=4, samples=2).total, exact)
    within(leave_one_out_nelbo(SCORER, rows(), VOCABULARY, cosine, keys, seed=5, samples=2).total, exact)


def test_cosine_counts_with_their_exact_weight_are_unbiased():
    """Muddit's masking (exactly n positions, n from a cosine) is an unbiased NELBO under 1/(n P(n)), not under 1/r."""
    exact = mask_moments(SCORER, rows(1), VOCABULARY).nelbo()[0]
    u = keyed_uniform(9, torch.arange(N), 0, 5)
    count = cosine_count(u[:, 0], 4)
    noisy = mask_count(rows(), count, VOCABULARY, u[:, 1:])
    within(average_nelbo(SCORER, rows(), [(noisy, cosine_count_weight(count, 4))]).total, exact)
    compat = average_nelbo(SCORER, rows(), [(noisy, 4 / count.clamp_min(1))]).total
    assert abs(float(compat.mean() - exact)) > 3 * float(compat.std()) / N**0.5


def test_modality_parts_are_unbiased():
    """The parts have their own exact values: the NLL of the text (image) positions alone, averaged over orders."""
    one = rows(1)

    def only(modality):
        return lambda x_t, x0, where: SCORER(x_t, x0, where) * (x0.modality == modality)

    estimate = mask_count_nelbo(SCORER, rows(), VOCABULARY, torch.arange(N), seed=6, samples=1)
    text = mask_moments(only(Modality.TEXT), one, VOCABULARY).nelbo()[0]
    image = mask_moments(only(Modality.IMAGE), one, VOCABULARY).nelbo()[0]
    within(estimate.text, text)
    within(estimate.image, image)
    assert estimate.count_text[0] == 2 and estimate.count_image[0] == 2


def test_the_text_part_of_the_joint_is_not_the_conditional():
    batch = rows()
    given_image = condition_on(batch, Modality.IMAGE)
    exact = mask_moments(SCORER, given_image.rows([0]), VOCABULARY).nelbo()[0]
    estimate = mask_count_nelbo(SCORER, given_image, VOCABULARY, torch.arange(N), seed=7, samples=1)
    within(estimate.total, exact)
    assert not estimate.image.any() and estimate.count_image[0] == 0
    joint = mask_count_nelbo(SCORER, batch, VOCABULARY, torch.arange(N), seed=7, samples=1)
    assert abs(float(joint.text.mean() - exact)) > 0.05


def test_block_nelbo():
    batch, keys = rows(), torch.arange(N)
    plain = mask_moments(SCORER, rows(1), VOCABULARY).nelbo()[0]
    blocks = torch.tensor([0, 0, 1, 1])
    exact = exact_block_nelbo(SCORER, rows(1), blocks, VOCABULARY)[0]
    assert abs(float(exact - plain)) > 0.01
    within(block_nelbo(SCORER, batch, blocks, VOCABULARY, keys, seed=8, samples=1).total, exact)
    torch.testing.assert_close(exact_block_nelbo(SCORER, rows(1), torch.zeros(4).long(), VOCABULARY)[0], plain)
    # one position per block: the autoregressive NLL, without any randomness
    autoregressive = block_nelbo(SCORER, rows(2), torch.arange(4), VOCABULARY, keys[:2], samples=1).total
    by_hand = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        x_t = rows(1).ids.clone()
        x_t[0, i:] = VOCABULARY.mask_id
        by_hand -= log_probs(rows(1).replace(ids=x_t))[0, i, rows(1).ids[0, i]]
    torch.testing.assert_close(autoregressive, by_hand.expand(2))


def test_blocks_follow_given_tokens():
    batch = rows(1).replace(given=torch.tensor([[True, False, False, False]]))
    first, second = block_batches(batch, torch.tensor([0, 0, 1, 1]), VOCABULARY)
    assert first.targets.tolist() == [[False, True, False, False]]
    assert first.ids.tolist() == [[0, 2, VOCABULARY.mask_id, VOCABULARY.mask_id]]
    assert second.targets.tolist() == [[False, False, True, True]] and torch.equal(second.ids, batch.ids)


def test_leave_one_out_equals_the_masked_form_pointwise():
    one = rows(1)
    moments, sums = mask_moments(SCORER, one, VOCABULARY), leave_one_out_sums(SCORER, one, VOCABULARY)[0]
    for alpha in (0.15, 0.5, 0.85):
        k = torch.arange(5).double()
        left = (sums * alpha ** (4 - k) * (1 - alpha) ** k).sum() / alpha
        torch.testing.assert_close(left, moments.expected_sum(alpha)[0] / (1 - alpha))


def test_draws_depend_on_the_key_and_not_on_the_batch():
    keys = torch.tensor([11, 12, 13, 14])
    whole = mask_count_nelbo(SCORER, rows(4), VOCABULARY, keys, samples=2).total
    part = mask_count_nelbo(SCORER, rows(2), VOCABULARY, keys[1:3], samples=2).total
    assert torch.equal(whole[1:3], part) and len(whole.unique()) > 1


def test_every_draw_and_every_block_has_its_own_noise():
    seen = []

    def record(x_t, x0, where):
        seen.append(where)
        return where.double()

    mask_count_nelbo(record, rows(400), VOCABULARY, torch.arange(400), samples=8)
    pairs = [
        (a, b) for i, a in enumerate(seen) for b in seen[:i] if bool((a.sum(1) == 2).all() & (b.sum(1) == 2).all())
    ]
    assert len(pairs) == 1  # 8 draws, 4 counts: each count twice
    same = float((pairs[0][0] == pairs[0][1]).all(1).double().mean())
    assert 0.08 < same < 0.26  # independent subsets agree once in six
    seen.clear()
    block_nelbo(record, rows(400), torch.tensor([0, 0, 1, 1]), VOCABULARY, torch.arange(400), samples=2)
    first, second = seen[0][:, :2], seen[2][:, 2:]  # one of two positions, in either block
    assert 0.4 < float((first == second).all(1).double().mean()) < 0.6


def test_stratified_counts_reach_every_count_once():
    """With as many draws as targets each count occurs exactly once, so a count-only loss has no variance."""

    def by_count(x_t, x0, where):
        return where * where.sum(1, keepdim=True).double()

    result = mask_count_nelbo(by_count, rows(50), VOCABULARY, torch.arange(50), samples=4)
    torch.testing.assert_close(result.total, torch.full((50,), sum(4 / k * k * k for k in range(1, 5)) / 4).double())


def test_variance_is_that_of_the_mean():
    keys = torch.arange(500)
    estimate = time_nelbo(SCORER, rows(500), VOCABULARY, get_schedule("polynomial", power=0.5), keys, samples=16)
    assert float(estimate.variance.mean()) == pytest.approx(float(estimate.total.var()), rel=0.35)
    single = time_nelbo(SCORER, rows(2), VOCABULARY, get_schedule("linear"), keys[:2], samples=1)
    assert bool(single.variance.isnan().all())


def test_rows_without_targets_cost_nothing():
    batch = rows(2)
    batch = batch.replace(given=torch.tensor([[True] * 4, [False] * 4]))
    result = mask_count_nelbo(SCORER, batch, VOCABULARY, torch.arange(2), samples=3)
    assert result.total[0] == 0 and result.total[1] > 0


def test_no_draws_is_an_error():
    with pytest.raises(ValueError, match="at least one draw"):
        average_nelbo(SCORER, rows(1), [])


def test_enumeration_refuses_what_it_cannot_visit():
    unlike = rows(2).replace(given=torch.tensor([[True, False, False, False], [False] * 4]))
    with pytest.raises(ValueError, match="same target positions"):
        list(all_masks(unlike))
    long = TokenBatch.from_spans([[Span.text([0] * 17)]])
    with pytest.raises(ValueError, match="2\\^17"):
        list(all_masks(long))


def test_model_scorer_equals_the_full_log_probabilities():
    torch.manual_seed(0)
    model = MaskedTransformer(vocab_size=VOCABULARY.size, hidden_size=32, num_layers=1, num_heads=2).eval()
    batch = rows(3).pad_to(6)

    def full(x_t):
        logits = model(x_t)
        out = torch.full_like(logits, -torch.inf)
        for modality in Modality:
            start, stop = VOCABULARY.range_of(modality)
            where = (x_t.modality == modality)[..., None]
            part = logits[..., start:stop].log_softmax(-1)
            out[..., start:stop] = torch.where(where, part, out[..., start:stop])
        return out

    keys = torch.arange(3)
    sliced = mask_count_nelbo(model_scorer(model, VOCABULARY, count=4), batch, VOCABULARY, keys, samples=3)
    dense = mask_count_nelbo(log_prob_scorer(full), batch, VOCABULARY, keys, samples=3)
    torch.testing.assert_close(sliced.total, dense.total, rtol=1e-5, atol=1e-5)
    assert 0.5 * math.log(3) < float(sliced.total.mean()) / 4 < 3 * math.log(4)


def test_time_conditioned_models_hear_the_masked_share():
    heard = []

    class Model:
        def hidden(self, ids, modality, positions, attention_mask, time=None):
            heard.append(time)
            return torch.zeros(*ids.shape, 2)

        def head(self, hidden, start, stop):
            return hidden.new_zeros(len(hidden), stop - start)

    scorer = model_scorer(Model(), VOCABULARY, time=lambda share: 10 * share)
    result = mask_count_nelbo(scorer, rows(3).pad_to(6), VOCABULARY, torch.arange(3), samples=4)
    for row in torch.stack(heard, 1).tolist():
        assert row == [2.5, 5.0, 7.5, 10.0]
    # uniform guesses: each estimate is one draw's n/k times its masked positions, text ln 3 and image ln 4
    assert float(result.total.mean()) == pytest.approx(2 * math.log(3) + 2 * math.log(4), rel=0.15)


def test_without_eos_fill():
    eos = 2
    batch = TokenBatch.from_packed(
        [
            [[Span.text([0, 1, eos, eos, eos]), Span.image(torch.tensor([[4, 5]]))]],
            [[Span.text([eos, eos]), Span.image(torch.tensor([[4]]))], [Span.text([1, eos, eos])]],
        ]
    )
    cropped = without_eos_fill(batch, eos)
    assert cropped.valid.tolist() == [
        [True, True, True, False, False, True, True],
        [True, False, True, True, True, False, False],
    ]
    assert not bool((cropped.targets & ~cropped.valid).any()) and torch.equal(cropped.ids, batch.ids)
    mask = cropped.attention_mask()
    assert mask is not None and not bool(mask[0, 0, :, 3].any())
    moments = [mask_moments(lambda x, y, w: w.double(), b.rows([0]), VOCABULARY).nelbo()[0] for b in (batch, cropped)]
    assert [round(float(m), 9) for m in moments] == [7, 5]


@pytest.mark.parametrize("samples", [16, 32])
def test_intervals_hold_what_they_promise(samples):
    exact = mask_moments(SCORER, rows(1), VOCABULARY).nelbo()[0]
    found = mask_count_nelbo(SCORER, rows(), VOCABULARY, torch.arange(N), seed=3, samples=samples)
    held = (found.total - exact).abs() <= found.error
    assert 0.92 <= float(held.double().mean()) <= 0.98
    assert bool(mask_count_nelbo(SCORER, rows(2), VOCABULARY, torch.arange(2), samples=1).error.isnan().all())


def test_the_quantile_of_students_t():
    """Table values."""
    for freedom, value in ((5, 2.571), (10, 2.228), (30, 2.042), (1e9, 1.960)):
        assert float(student_t95(torch.tensor(freedom))) == pytest.approx(value, abs=2e-3)
