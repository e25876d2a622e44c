"""MaskedTransformer: every option, batches, packing, block-causal visibility, initialisation."""

from __future__ import annotations

import json

import pytest
import torch

from unidiff.models.transformer import MaskedTransformer
from unidiff.tokens import Span, TokenBatch, Vocabulary

VOCABULARY = Vocabulary.unified(20, 12)
SMALL = dict(vocab_size=VOCABULARY.size, hidden_size=32, num_layers=2, num_heads=4)
OPTIONS = [
    {},
    dict(norm="layer", qk_norm="head", qk_norm_type="layer"),
    dict(norm="layer_bias", norm_eps=1e-5, qk_norm="width", qk_norm_type="layer_bias"),
    dict(qk_norm="head", num_kv_heads=2),
    dict(qk_norm="width", num_kv_heads=1, activation="gelu"),
    dict(activation="gelu_tanh", linear_bias=True),
    dict(activation="gelu", linear_bias=True, ffn_bias=False, ffn_size=48),
    dict(rope="1d", rope_theta=500.0, modality_embedding=False),
    dict(rope="2d", rope_linear_factor=2.0),
    dict(sandwich_norm=True, tie_head=True),
    dict(tie_head=True, head_bias=True, dropout=0.2),
    dict(time_conditioning=True, cond_dim=16),
    dict(time_conditioning=True, time_tokens="image", sandwich_norm=True, attention_gate=False),
    dict(time_conditioning=True, constant_time=0.0, time_scale=1000.0),
    dict(attention="block_causal", block_length=4, num_kv_heads=2),
]


def batch_of_two() -> TokenBatch:
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(0, 20, (n,), generator=generator) for n in (5, 3)]
    image = torch.randint(21, 33, (2, 3), generator=generator)
    return TokenBatch.from_spans([[Span.text(text[0]), Span.image(image)], [Span.image(image.T), Span.text(text[1])]])


def perturbed(**options) -> MaskedTransformer:
    """A model in which every weight matters: zero-initialised parts are moved away from zero."""
    torch.manual_seed(1)
    model = MaskedTransformer(**{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_learns_and_survives_saving(options, tmp_path):
    model = perturbed(**options)
    batch = batch_of_two()
    time = torch.tensor([0.3, 0.8])
    logits = model(batch, time)
    assert logits.shape == (*batch.shape, VOCABULARY.size)
    assert logits.dtype == torch.float32
    model.train()(batch, time)[batch.valid].log_softmax(-1)[:, 0].sum().backward()
    unused = {"embed_time"} if model.config.constant_time is not None else set()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()) or name.split(".")[0] in unused, f"{name} does not reach the loss"
    model.eval().save_pretrained(tmp_path)
    loaded = MaskedTransformer.from_pretrained(tmp_path)
    said, read = ({k: v for k, v in one.config.items() if k[0] != "_"} for one in (model, loaded))
    said = json.loads(json.dumps(said))  # a file knows no tuples
    assert said == read
    torch.testing.assert_close(loaded(batch, time), logits, rtol=0, atol=0)


def test_options_change_the_function():
    batch, time = batch_of_two(), torch.tensor([0.3, 0.8])
    outputs = {}
    for options in (dict(), *(dict([item]) for item in dict(
        norm="layer", qk_norm="head", activation="gelu", rope="1d", rope_theta=100.0, rope_linear_factor=2.0,
        modality_embedding=False, sandwich_norm=True, tie_head=True, time_conditioning=True,
    ).items())):  # fmt: skip
        outputs[str(options)] = perturbed(**options)(batch, time)[batch.valid]
    names = list(outputs)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert (outputs[first] - outputs[second]).abs().max() > 1e-3, (first, second)


def test_head_slice_is_the_slice_of_the_full_head():
    for options in (dict(head_bias=True), dict(tie_head=True, head_bias=True)):
        model = perturbed(**options)
        hidden = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
        full = model.head(hidden)
        torch.testing.assert_close(model.head(hidden, 21, 33), full[..., 21:33])
        torch.testing.assert_close(model.head(hidden, 21), full[..., 21:])


def test_tied_head_is_the_embedding_and_has_no_weight_of_its_own():
    model = perturbed(tie_head=True)
    assert model.output_weight is None
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(model.head(hidden), hidden @ model.embed_tokens.weight.T)


@pytest.mark.parametrize("options", [{}, dict(num_kv_heads=2, qk_norm="head"), dict(time_conditioning=True)], ids=str)
def test_padded_batch_equals_single_rows(options):
    model = perturbed(**options)
    batch, time = batch_of_two().pad_to(14), torch.tensor([0.3, 0.8])
    together = model(batch, time)
    for row, length in enumerate((11, 9)):
        alone = batch.rows([row]).each(lambda x, n=length: x[:, :n])
        assert alone.attention_mask() is None
        torch.testing.assert_close(together[row, :length], model(alone, time[row : row + 1])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, dict(num_kv_heads=2), dict(attention="block_causal", block_length=4)], ids=str)
def test_padding_on_a_gpu_stays_finite_and_changes_no_row(options, dtype):
    """Queries of padding may see no key at all, which some attention kernels turn into NaN."""
    model = perturbed(**options).to("cuda", dtype)
    batch = batch_of_two().rows([0])
    short, padded = (model(rows.to("cuda")) for rows in (batch, batch.pad_to(32)))
    assert bool(torch.isfinite(padded).all())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05 * float(short.std())
    torch.testing.assert_close(padded[:, : short.shape[1]], short, rtol=0, atol=tolerance)
    padded.square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_padding_changes_no_gradient():
    model = perturbed()
    batch = batch_of_two().rows([0])
    grads = []
    for rows in (batch, batch.pad_to(17)):
        model.zero_grad()
        model(rows)[rows.valid].square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for short, padded in zip(*grads, strict=True):
        assert bool(torch.isfinite(padded).all())
        torch.testing.assert_close(padded, short, rtol=1e-4, atol=1e-5)


def input_gradient(model: MaskedTransformer, batch: TokenBatch, row: int, position: int) -> torch.Tensor:
    """Which input positions the output at one position depends on: |gradient| per position, `[L]`."""
    vectors = {}

    def grab(_module, _args, output):
        vectors["x"] = output
        output.retain_grad()

    first_norm = model.blocks[0].attention_norm
    handle = first_norm.register_forward_hook(grab)
    model(batch)[row, position].square().sum().backward()
    handle.remove()
    return vectors["x"].grad[row].abs().sum(-1)


def test_packed_samples_do_not_leak():
    model = perturbed()
    single = batch_of_two()
    packed = TokenBatch.from_packed(
        [
            [
                [Span.text(single.ids[0, :5]), Span.image(single.ids[0, 5:11].view(2, 3))],
                [Span.image(single.ids[1, :6].view(3, 2)), Span.text(single.ids[1, 6:9])],
            ]
        ],
        length=22,
    )
    reach = input_gradient(model, packed, 0, 3)
    assert bool((reach[:11] > 0).all()) and bool((reach[11:] == 0).all())
    reach = input_gradient(model, packed, 0, 15)
    assert bool((reach[11:20] > 0).all()) and not bool(reach[:11].any()) and not bool(reach[20:].any())
    logits = model(packed)[0]
    torch.testing.assert_close(logits[:11], model(single)[0, :11], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[11:20], model(single)[1, :9], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_block_causal_sees_its_own_and_earlier_blocks_only(packed):
    model = perturbed(attention="block_causal", block_length=4)
    spans = [Span.text(range(10))]
    rows = [[spans, spans]] if packed else [[spans]]
    batch = TokenBatch.from_packed(rows)
    start = 10 if packed else 0
    for position, stop in ((0, 4), (3, 4), (4, 8), (9, 10)):
        reach = input_gradient(model, batch, 0, start + position)
        assert bool((reach[start : start + stop] > 0).all()), position
        assert not bool(reach[:start].any()) and not bool(reach[start + stop :].any()), position


def test_short_training_rows_take_the_same_function_as_the_fused_kernel():
    model = perturbed(qk_norm="head")
    batch = batch_of_two().rows([0])
    with torch.no_grad():
        fused = model(batch)
    torch.testing.assert_close(model(batch), fused, rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_stays_close():
    model = perturbed(qk_norm="head", norm="layer")
    batch = batch_of_two()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    assert rough.dtype == torch.float32
    assert (rough - exact)[batch.valid].abs().max() < 0.1 * exact.std()


def test_float64_model_stays_float64():
    model = perturbed().double()
    assert model(batch_of_two()).dtype == torch.float64
    torch.testing.assert_close(model(batch_of_two()).float(), perturbed()(batch_of_two()), rtol=1e-4, atol=1e-4)


def test_initialisation_is_seeded_and_starts_near_uniform():
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(MaskedTransformer(**SMALL))
    first, again, other = (list(m.parameters()) for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for options in ({}, dict(sandwich_norm=True), dict(time_conditioning=True), dict(tie_head=True)):
        torch.manual_seed(0)
        model = MaskedTransformer(**{**SMALL, **options})
        nll = -model(batch_of_two(), torch.tensor([0.5, 0.5])).log_softmax(-1).mean()
        assert abs(nll - torch.tensor(float(VOCABULARY.size)).log()) < 0.1, options


def test_a_few_steps_learn_to_copy():
    """The output depends on the input through all layers: hidden tokens are recovered from their copies."""
    torch.manual_seed(0)
    for options in ({}, dict(sandwich_norm=True), dict(time_conditioning=True, constant_time=0.5)):
        model = MaskedTransformer(**{**SMALL, "num_layers": 2, "tie_head": True, **options})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(80):
            ids = torch.randint(0, 8, (16, 4))
            batch = TokenBatch.from_spans([[Span.text(torch.cat((row, row)))] for row in ids])
            seen = batch.replace(ids=torch.where(batch.positions[..., 0] < 4, batch.ids, VOCABULARY.mask_id))
            loss = torch.nn.functional.cross_entropy(model(seen)[:, 4:].flatten(0, 1), ids.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 1.0, (options, float(loss))


def test_time_is_needed_used_and_ignored_as_declared():
    batch = batch_of_two()
    early, late = torch.tensor([0.1, 0.1]), torch.tensor([0.9, 0.9])
    model = perturbed(time_conditioning=True)
    with pytest.raises(ValueError, match="give `time`"):
        model(batch)
    assert not torch.allclose(model(batch, early), model(batch, late))
    for options in (dict(time_conditioning=True, constant_time=0.0), dict()):
        model = perturbed(**options)
        torch.testing.assert_close(model(batch, early), model(batch, late), rtol=0, atol=0)
        torch.testing.assert_close(model(batch, early), model(batch), rtol=0, atol=0)


def test_dropout_acts_in_training_only():
    model = perturbed(dropout=0.5)
    batch = batch_of_two()
    torch.testing.assert_close(model(batch), model(batch), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(batch), model(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(norm="batch"), "norm is 'batch'; expected one of"),
        (dict(activation="relu"), "activation is 'relu'"),
        (dict(hidden_size=36), "hidden_size = 36 must be a multiple of 16"),
        (dict(num_kv_heads=3), "num_kv_heads = 3 must divide"),
        (dict(attention="block_causal"), "block_length = None"),
        (dict(block_length=4), "give both, or neither"),
        (dict(num_layers=0), "num_layers is 0"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(qk_norm="all"), "qk_norm is 'all'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedTransformer(**{**SMALL, **options})
