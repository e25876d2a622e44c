"""UniDisc's objective, corruption and sequence scores (golden set `unidisc`)."""

import json

import pytest
import torch
from golden import golden_folders
from reference.batches import unidisc_batch
from reference.loss_weights import time_weight
from reference.objectives import unidisc_block_dropout, unidisc_capped_total, unidisc_dropout
from reference.times import sample_times
from safetensors.torch import load_file

from unidiff.diffusion import NoisyBatch, get_schedule, joint_elbo, mask_tokens, masked_nll
from unidiff.diffusion.likelihood import average_nelbo, model_scorer
from unidiff.families.unidisc import UNIDISC
from unidiff.families.unidisc.rows import unidisc_interleaved
from unidiff.tokens import Modality

pytestmark = pytest.mark.golden
FOLDERS = [f for f in golden_folders("unidisc") if any(f.glob("*loss.safetensors"))]
SCHEDULE = get_schedule("loglinear", eps=1e-3)

if not FOLDERS:
    pytest.skip("golden set unidisc is absent", allow_module_level=True)


class Set:
    """One folder: configuration, network, stored tensors."""

    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.trainer = self.config["config"]["trainer"]
        self.model, self.vocabulary = UNIDISC.load(load_file(folder / "weights.safetensors"), self.config)
        self.packed = unidisc_interleaved(self.config)

    def load(self, name):
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"{path.name} is not part of {self.folder.name}")
        return load_file(path)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda f: f.name)
def golden(request):
    return Set(request.param)


def close(actual, expected, rtol=1e-4, atol=0.0):
    torch.testing.assert_close(actual.double().reshape(expected.shape), expected.double(), rtol=rtol, atol=atol)


def token_nll(golden, batch, masked):
    """-log p of the clean ids at masked positions; attention sees everything, padding included, as upstream."""
    noisy = batch.hide(masked, golden.vocabulary)
    hidden = golden.model.hidden(noisy.ids, noisy.modality, noisy.positions, noisy.attention_mask())
    return masked_nll(hidden, golden.model.head, masked, batch, golden.vocabulary, count=32)


class Variant:
    """A loss variant by its name: time weight, modality weights, cap, what is counted, which rows."""

    def __init__(self, name, golden, stored):
        trainer = golden.trainer
        self.kind = "ce" if name.startswith("ce") else "softmin_snr" if "softmin" in name else "elbo"
        if name == "as_config":
            self.kind = "softmin_snr" if trainer["softmin_snr"] else "elbo"
        self.gamma = float(trainer["softmin_snr"])
        configured = name == "as_config"
        self.capped = name.endswith("txtcap") or (configured and golden.packed)
        self.everything = "fullmask" in name or (configured and not golden.packed)
        weighted = "weighted" in name or (configured and golden.packed)
        image_weight = 0.2 if self.capped and not configured else trainer["img_loss_weight"] if weighted else 1.0
        self.weights = {Modality.TEXT: trainer["text_loss_weight"], Modality.IMAGE: image_weight}
        self.rows = stored["textonly.rows"] if name.startswith("textonly") else torch.arange(len(stored["x0"]))
        self.ignored_last = name.endswith("ignore_last_row")


def compute(golden, stored, variant):
    """(terms, total, per-token NLL with the time weight of `nlls`, counted positions)"""
    rows = variant.rows
    attended = stored["attention_mask"][rows].bool()
    counted = torch.ones_like(attended) if variant.everything else attended
    samples = stored["sample_ids"][rows] if golden.packed else None
    batch = unidisc_batch(stored["x0"][rows], stored["modality"][rows], counted, samples)
    nll = token_nll(golden, batch, stored["move_indices"][rows].bool())
    t = stored["t"][rows]
    terms = joint_elbo(nll, time_weight(variant.kind, SCHEDULE, t, variant.gamma), batch, variant.weights)
    total = unidisc_capped_total(terms, variant.weights) if variant.capped else terms.total
    shown = nll * time_weight("ce" if variant.kind == "ce" else "elbo", SCHEDULE, t)[:, None]
    return terms, total, shown * attended, attended


def check_variant(golden, stored, name):
    """Compare every stored tensor of a variant; returns the names compared."""
    variant = Variant(name, golden, stored)
    terms, total, shown, attended = compute(golden, stored, variant)
    is_text = stored["modality"][variant.rows] == Modality.TEXT
    token_mask = attended.clone()
    token_mask[-1] &= not variant.ignored_last
    share = (attended & is_text).sum() / attended.sum()
    count = (terms.count_text + terms.count_image).sum()
    image = variant.weights[Modality.IMAGE] * terms.row_image.sum() / count
    actual = {
        "loss": total,
        "txt_loss": total - image,
        "img_loss": image,
        "txt_frac": share,
        "img_frac": 1 - share,
        "nlls": shown,
        "txt_nlls": shown * is_text,
        "img_nlls": shown * ~is_text,
        "token_mask": token_mask,
    }
    keys = {key.removeprefix(f"{name}.") for key in stored if key.startswith(f"{name}.")}
    assert keys <= set(actual), keys - set(actual)
    for key in keys:
        expected = stored[f"{name}.{key}"]
        if key == "token_mask":
            assert torch.equal(actual[key].to(torch.uint8), expected), name
        else:
            close(actual[key], expected, atol=1e-6)
    return {f"{name}.{key}" for key in keys}


def variants(stored):
    return {key.removesuffix(".loss") for key in stored if key.endswith(".loss")}


def test_losses(golden):
    stored = golden.load("loss")
    t = stored["t"].double()
    gamma = float(golden.trainer["softmin_snr"])
    tables = {
        "sigma": SCHEDULE.sigma(t),
        "dsigma": SCHEDULE.dsigma(t),
        "move_chance": SCHEDULE.mask_rate(t),
        "std_weighting": time_weight("elbo", SCHEDULE, t),
        "softmin_weighting": time_weight("softmin_snr", SCHEDULE, t, gamma),
    }
    compared = set(tables) | {"x0", "modality", "attention_mask", "t", "move_indices", "textonly.rows"}
    for name, value in tables.items():
        close(value, stored[name])
    assert variants(stored)
    with torch.no_grad():
        for name in variants(stored):
            compared |= check_variant(golden, stored, name)
    gradients = {key for key in stored if key.startswith("grad_norm.")}  # the next test
    assert compared | gradients == set(stored)


def test_gradient_norms(golden):
    """d(weighted_softmin.loss)/d(parameter), per upstream parameter: the key map splits ours where it joins theirs."""
    stored = golden.load("loss")
    norms = {key.removeprefix("grad_norm."): value for key, value in stored.items() if key.startswith("grad_norm.")}
    model = golden.model
    model.zero_grad(set_to_none=True)
    _, total, *_ = compute(golden, stored, Variant("weighted_softmin", golden, stored))
    total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    theirs = UNIDISC.keymap(model, {}).to_theirs(gradients)
    assert set(norms) == set(theirs)
    for name, expected in norms.items():
        close(theirs[name].norm(), expected, rtol=2e-4 if "bias" in name else 1e-4, atol=1e-7)


def test_configured_loss(golden):
    stored = golden.load("forward_loss")
    batch = unidisc_batch(stored["x0"], stored["modality"], sample_ids=stored.get("sample_ids"))
    noisy = batch.hide(stored["move_indices"].bool(), golden.vocabulary)
    assert torch.equal(noisy.ids, stored["input_ids"])
    with torch.no_grad():
        compared = set().union(*(check_variant(golden, stored, name) for name in variants(stored)))
    inputs = {"x0", "modality", "attention_mask", "sample_ids", "t", "move_indices", "input_ids"}
    network = {"logits", "rope_cos", "rope_sin"}  # tests/released compares the network's own tensors
    assert compared and set(stored) <= compared | inputs | network


def test_interleaved_corruption(golden):
    stored = golden.load("corruption")
    if not golden.packed:
        pytest.skip("the static layout drops whole modalities")
    batch = unidisc_batch(stored["x0"], stored["modality"], sample_ids=stored["sample_ids"])
    everywhere = unidisc_batch(stored["x0"], stored["modality"])  # upstream masks padding too, which nothing sees
    plain = mask_tokens(everywhere, stored["move_chance"][:, 0], golden.vocabulary, stored["u_token"]).masked
    probability = golden.trainer["mask_entire_modality"]
    dropped = unidisc_block_dropout(plain, batch, probability, stored["u_block"][:, 0])
    actual = {
        "move_indices": dropped.masked,
        "xt": batch.hide(dropped.masked, golden.vocabulary).ids,
        "ignore_metrics": dropped.rows,
    }
    for key, value in actual.items():
        assert torch.equal(value.long(), stored[key].long()), key
    inputs = {"x0", "modality", "sample_ids", "move_chance", "u_token", "u_block", "n_rand"}  # n_rand: a count of calls
    assert set(actual) | inputs == set(stored)
    with pytest.raises(ValueError, match="one per block of more than 4 tokens"):
        unidisc_block_dropout(plain, batch, probability, stored["u_block"][:1, 0])


def test_corruption(golden):
    stored = golden.load("corruption")
    if golden.packed:
        pytest.skip("the interleaved layout drops blocks")
    batch = unidisc_batch(stored["x0"], stored["modality"])
    plain = mask_tokens(batch, stored["move_chance"], golden.vocabulary, stored["u_token"]).masked
    compared = {"x0", "modality", "move_chance", "u_token", "u_drop_txt", "u_drop_img"}
    cases = {key.split(".")[0] for key in stored if key.endswith(".move_indices")}
    assert cases
    for case in cases:
        chance = float(stored[f"{case}.mask_entire_modality"])
        dropped = unidisc_dropout(plain, batch.modality, chance, stored["u_drop_txt"][:, 0], stored["u_drop_img"][:, 0])
        actual = {
            "drop_txt": dropped.text[:, None],
            "drop_img": dropped.image[:, None],
            "ignore_metrics": (dropped.text | dropped.image)[:, None],
            "move_indices": dropped.masked,
            "xt": batch.hide(dropped.masked, golden.vocabulary).ids,
        }
        for key, value in actual.items():
            assert torch.equal(value.long(), stored[f"{case}.{key}"].long()), f"{case}.{key}"
        compared |= {f"{case}.{key}" for key in (*actual, "mask_entire_modality")}
    assert compared | check_times_and_schedule(golden, stored) == set(stored)


def check_times_and_schedule(golden, stored):
    u = stored["sample_t.u"].double()
    t = sample_times(len(u), u, "stratified", low=golden.trainer["sampling_eps"])
    close(t, stored["sample_t.t"], rtol=1e-5)
    t = stored["schedule.t"].double()
    close(SCHEDULE.sigma(t), stored["schedule.sigma"])
    close(SCHEDULE.dsigma(t), stored["schedule.dsigma"])
    close(SCHEDULE.mask_rate(t), stored["schedule.move_chance"])
    close(time_weight("elbo", SCHEDULE, t), stored["schedule.std_weighting"])
    softmin = [key for key in stored if key.startswith("schedule.softmin_weighting_gamma")]
    for key in softmin:
        close(time_weight("softmin_snr", SCHEDULE, t, float(key.rpartition("gamma")[2])), stored[key])
    rest = {"sigma", "dsigma", "move_chance", "std_weighting", "t"}
    return {"sample_t.u", "sample_t.t", *softmin, *(f"schedule.{key}" for key in rest)}


def test_sequence_scores(golden):
    stored = golden.load("likelihood")
    attended = stored["attention_mask"].bool()
    batch = unidisc_batch(stored["x0"], stored["modality"], attended)
    score = model_scorer(golden.model, golden.vocabulary, count=32)
    ones = torch.ones(len(attended))
    compared = {"x0", "modality", "attention_mask", "times", "u"}
    for name, weighted in (("score_unweighted", False), ("score_weighted", True)):

        def draws(weighted=weighted):
            for t, u in zip(stored["times"], stored["u"], strict=True):
                where = u < SCHEDULE.mask_rate(t)  # padding is masked too, and seen, but not counted
                noisy = NoisyBatch(batch.hide(where, golden.vocabulary), where & attended)
                yield noisy, ones * (SCHEDULE.weight(t) if weighted else 1.0)

        nelbo = average_nelbo(score, batch, draws())
        close(nelbo.total / (nelbo.count_text + nelbo.count_image), stored[name])
        compared.add(name)
    assert compared == set(stored)
