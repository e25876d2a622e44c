"""The streamed cross-entropy: values and gradients of the plain formula, without its logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from unidiff.diffusion import gather_masked, masked_nll, streamed_nll
from unidiff.diffusion.objective import head_parts, parts_loss
from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Modality, Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary(200, (0, 90), (90, 200), mask_id=40)  # [MASK] inside the text slice


class Matrix:
    """A linear head and nothing else; called as `head`, it is the plain formula."""

    def __init__(self, width: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(VOCABULARY.size, width, generator=generator).to(dtype).requires_grad_()
        self.bias = torch.randn(VOCABULARY.size, generator=generator).to(dtype).requires_grad_() if bias else None

    def head_parameters(self):
        return self.weight, self.bias

    def head(self, hidden, start, stop):
        bias = None if self.bias is None else self.bias[start:stop]
        return torch.nn.functional.linear(hidden, self.weight[start:stop], bias)

    @property
    def leaves(self):
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def make_batch(seed: int, rows: int = 3) -> tuple[TokenBatch, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 40, (rows, 5), generator=generator)
    image = torch.randint(90, 200, (rows, 2, 3), generator=generator)
    batch = TokenBatch.from_spans([[Span.text(t), Span.image(i)] for t, i in zip(text, image, strict=True)])
    return batch, torch.rand(batch.shape, generator=generator) < 0.6


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr("unidiff.diffusion.streamed_nll.TILE_ELEMENTS", 200)
    monkeypatch.setattr("unidiff.diffusion.streamed_nll.TILE_MULTIPLE", 8)


@given(st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_equal_the_plain_formula(count, bias, weighed, seed):
    batch, masked = make_batch(seed)
    matrix = Matrix(6, bias, torch.float64, seed)
    hidden = torch.randn(*batch.shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hidden.requires_grad_()
    weights = torch.rand(batch.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    expected = masked_nll(hidden, matrix.head, masked, batch, VOCABULARY, count)
    if weighed:
        loss, nll = parts_loss(hidden, matrix, head_parts(masked, batch, VOCABULARY, count), weights)
        assert not nll.requires_grad
    else:
        nll = masked_nll(hidden, matrix, masked, batch, VOCABULARY, count)
        loss = (nll * weights).sum()
    torch.testing.assert_close(nll, expected, rtol=1e-12, atol=1e-12)
    assert not nll[~masked].any()
    if masked.any():
        total = (expected * weights).sum()
        torch.testing.assert_close(loss, total, rtol=1e-12, atol=1e-12)
        got, expected = (torch.autograd.grad(3 * value, [hidden, *matrix.leaves]) for value in (loss, total))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def parts_of(batch: TokenBatch, masked: torch.Tensor, count: int) -> tuple[streamed_nll.HeadPart, ...]:
    return tuple(gather_masked(masked, batch, VOCABULARY, m, count) for m in Modality)


def test_gradcheck():
    batch, masked = make_batch(3, rows=1)
    matrix = Matrix(3, True, torch.float64)
    parts = parts_of(batch, masked, 4)
    real = torch.cat([p.real.reshape(-1) for p in parts])

    def scored(hidden, weight, bias):
        return streamed_nll.streamed_nll(hidden, weight, bias, parts)[real]

    hidden = torch.randn(batch.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(scored, (hidden.requires_grad_(), matrix.weight, matrix.bias))


@pytest.mark.parametrize("tie_head", [True, False])
def test_a_transformer_gets_the_gradients_of_its_own_head(tie_head):
    torch.manual_seed(0)
    model = MaskedTransformer(VOCABULARY.size, 32, 1, 2, tie_head=tie_head, head_bias=True)
    batch, masked = make_batch(1)
    grads = []
    for head in (model, model.head):
        model.zero_grad()
        hidden = model.hidden(batch.ids, batch.modality, batch.positions)
        masked_nll(hidden, head, masked, batch, VOCABULARY, 8).sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and "output_bias" in grads[0]
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], rtol=1e-4, atol=1e-5)


def test_known_weights_save_the_second_set_of_logits(monkeypatch):
    batch, masked = make_batch(4)
    matrix = Matrix(4, True, torch.float64)
    hidden = torch.randn(*batch.shape, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden.requires_grad_()
    weights = torch.rand(batch.shape, generator=torch.Generator().manual_seed(1)).double()
    made = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(streamed_nll.F, "linear", lambda h, w, b=None: made.append(len(h) * len(w)) or linear(h, w, b))
    counts = []
    parts_loss(hidden, matrix, head_parts(masked, batch, VOCABULARY, 4), weights / 7)[0].backward()
    counts.append(sum(made))
    made.clear()
    (masked_nll(hidden, matrix, masked, batch, VOCABULARY, 4) * weights / 7).sum().backward()
    counts.append(sum(made))
    assert counts[1] == 2 * counts[0] > 0


@pytest.mark.parametrize("weighed", [True, False])
def test_bf16_autocast_stays_close_to_float32_and_keeps_float32_gradients(weighed):
    batch, masked = make_batch(5)
    matrix = Matrix(16, True, torch.float32)
    hidden = torch.randn(*batch.shape, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if weighed:
                parts = head_parts(masked, batch, VOCABULARY, 8)
                loss, nll = parts_loss(hidden, matrix, parts, torch.ones(batch.shape))
            else:
                nll = masked_nll(hidden, matrix, masked, batch, VOCABULARY, 8)
                loss = nll.sum()
        out.append((nll, *torch.autograd.grad(loss, [hidden, matrix.weight])))
    for exact, rounded in zip(*out, strict=True):
        assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
        error = (exact - rounded).detach().norm() / exact.detach().norm()
        assert float(error) < 0.02


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, head-sized parameters and gradients aside."""

    def __init__(self, aside: torch.Size) -> None:
        super().__init__()
        self.aside, self.elements = aside, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.shape != self.aside:
                self.elements = max(self.elements, x.numel())
        return out


def test_no_tensor_is_larger_than_a_tile_however_many_positions_are_masked():
    batch, masked = make_batch(0, rows=64)
    matrix = Matrix(2, False, torch.float32)
    hidden = torch.randn(*batch.shape, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with Largest(matrix.weight.shape) as largest:
        masked_nll(hidden, matrix, masked, batch, VOCABULARY, 16).sum().backward()
    positions = int(masked.sum())
    assert largest.elements <= max(hidden.numel(), 16 * 16) < 16 * positions
    with Largest(matrix.weight.shape) as plain:
        masked_nll(hidden, matrix.head, masked, batch, VOCABULARY, 16).sum().backward()
    assert plain.elements >= 16 * VOCABULARY.image_size


def test_a_frozen_head_gets_no_gradient_and_nothing_masked_gives_zeros():
    batch, masked = make_batch(2)
    matrix = Matrix(4, True, torch.float32)
    hidden = torch.randn(*batch.shape, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masked_nll(hidden, matrix, masked & False, batch, VOCABULARY).sum().backward()
    assert matrix.weight.grad is not None and not matrix.weight.grad.any() and not hidden.grad.any()
    frozen = Matrix(4, True, torch.float32)
    for leaf in frozen.leaves:
        leaf.requires_grad_(False)
    masked_nll(hidden, frozen, masked, batch, VOCABULARY).sum().backward()
    assert frozen.weight.grad is None and hidden.grad.any()


def test_a_target_outside_its_slice_is_refused():
    batch, _ = make_batch(2)
    broken = batch.replace(ids=torch.where(batch.modality == Modality.TEXT, 150, batch.ids))
    with pytest.raises(ValueError, match="masked text target lies outside"):
        masked_nll(torch.zeros(*batch.shape, 4), Matrix(4, False, torch.float32), broken.valid, broken, VOCABULARY)
