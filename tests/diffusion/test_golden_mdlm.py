"""MDLM's noise schedules, times and losses (golden set `mdlm`, files schedules and losses)."""

import json

import pytest
import torch
from golden import golden_folders
from reference.batches import mdlm_batch
from reference.objectives import d3pm_loss, discrete_time, sedd_log_score, sedd_loss
from reference.times import importance_times, importance_weight, sample_times
from safetensors.torch import load_file

from unidiff.diffusion import get_schedule, joint_elbo, mask_tokens, masked_nll
from unidiff.families.mdlm import MDLM

pytestmark = pytest.mark.golden
FOLDERS = [f for f in golden_folders("mdlm") if (f / "losses.safetensors").is_file()]
NAMES = {"cosine": "mdlm_cosine", "cosinesqr": "mdlm_cosine_squared", "linear": "sigma_linear"}

if not FOLDERS:
    pytest.skip("golden set mdlm is absent", allow_module_level=True)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda f: f.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def losses(folder):
    return load_file(folder / "losses.safetensors")


def schedule_of(config, name):
    arguments = {k: v for k, v in config["noise_cases"][name].items() if k != "type"}
    return get_schedule(NAMES.get(name, name), **arguments)


def rate_range(schedule):
    """Mask rates at sigma_min = 1e-3 and at sigma_max = sigma(1): where MDLM's importance sampling starts and ends."""
    low = -torch.expm1(-torch.tensor(1e-3, dtype=torch.float64))
    return float(low), float(schedule.mask_rate(torch.ones((), dtype=torch.float64)))


def close(actual, expected, rtol, atol=0.0):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def test_schedule_tables(folder, config):
    stored = load_file(folder / "schedules.safetensors")
    t = stored["t"].double()
    seen = {"t", *(name for name in stored if name.startswith("sample_t."))}
    for name in {key.split(".")[0] for key in stored} - {"t", "sample_t"}:
        schedule = schedule_of(config, name)
        actual = {
            "total_noise": schedule.sigma(t),
            "rate_noise": schedule.dsigma(t),
            "move_chance": schedule.mask_rate(t),
            "weight": schedule.weight(t),
        }
        if f"{name}.importance_t" in stored:
            actual["importance_t"] = importance_times(t, schedule, rate_range(schedule))
        # below t = 0.1 the float32 reference itself loses digits for the cosines (README); the end of cosinesqr is ~0/0
        lossy = (t < 0.1) if name.startswith("cosine") else torch.zeros_like(t, dtype=torch.bool)
        end = (t == 1) if name == "cosinesqr" else torch.zeros_like(lossy)
        for key, value in actual.items():
            expected = stored[f"{name}.{key}"]
            seen.add(f"{name}.{key}")
            if key == "importance_t":  # near 0 the reference subtracts sigma_min = 1e-3 in float32
                close(value, expected, rtol=1e-4, atol=5e-9)
                continue
            near_end = end if key in ("rate_noise", "weight") else torch.zeros_like(end)
            usual = ~lossy & ~near_end
            close(value[usual], expected[usual], rtol=2e-4 if key == "weight" else 1e-4)
            close(value[lossy], expected[lossy], rtol=0.05)
            close(value[near_end], expected[near_end], rtol=0, atol=5e-4)
    assert seen == set(stored)


def test_times(folder, config):
    stored = load_file(folder / "schedules.safetensors")
    low = config["training"]["sampling_eps"]
    schedule = get_schedule("loglinear")
    cases = {name.rsplit(".", 1)[0] for name in stored if name.startswith("sample_t.")}
    assert cases
    for case in cases:
        kind = case.split(".")[1]
        mode = {"antithetic": "stratified", "iid": "iid", "antithetic_importance": "importance"}[kind]
        u = stored[f"{case}.u"].double()
        t = sample_times(len(u), u, mode, low=low, schedule=schedule, rate_range=rate_range(schedule))
        close(t, stored[f"{case}.t"], rtol=2e-5)


class Case:
    """One loss case of the set and what its name says about it."""

    def __init__(self, config, stored, name):
        self.name, self.stored = name, stored
        self.kind, *rest = name.split(".")
        self.steps = config["T_discrete"] if self.kind.endswith("_T") else None
        self.noise_name = rest[0] if rest else "loglinear"
        self.schedule = schedule_of(config, self.noise_name)
        self.time_conditioned = self.kind == "sedd" or self.kind == "subs_cov" or rest[-1:] == ["tc1"]
        self.constant_weight = self.kind in ("subs_importance", "subs_cov")
        self.low = config["training"]["sampling_eps"]

    def __getitem__(self, key):
        return self.stored[f"{self.name}.{key}"]

    def keys(self):
        return {key[len(self.name) + 1 :] for key in self.stored if key.startswith(self.name + ".")}

    def times(self):
        """(t, t on the grid of T steps or None, mask rate) from the uniforms."""
        u = self["u_t"].double()
        if self.kind == "subs_cov":  # t is the transformed variable itself
            z = sample_times(len(u), u, "stratified", low=self.low)
            return z, None, self.schedule.mask_rate(importance_times(z, self.schedule, rate_range(self.schedule)))
        mode = "importance" if self.kind == "subs_importance" else "stratified"
        t = sample_times(len(u), u, mode, low=self.low, schedule=self.schedule, rate_range=rate_range(self.schedule))
        grid = None if self.steps is None else discrete_time(t, self.steps)
        return t, grid, self.schedule.mask_rate(t if grid is None else grid)


def cases(config, stored):
    suffix = ".per_token_loss"
    return [Case(config, stored, key.removesuffix(suffix)) for key in stored if key.endswith(suffix)]


def test_times_and_corruption(config, losses):
    batch = mdlm_batch(losses["x0"])
    for case in cases(config, losses):
        t, grid, rate = case.times()
        close(t, case["t"], rtol=1e-4)
        if grid is not None:
            close(grid, case["t_discrete"], rtol=1e-6)
        close(rate, case["move_chance"], rtol=1e-4)
        noisy = mask_tokens(batch, case["move_chance"], MDLM.vocabulary(config), case["u_mask"])
        assert torch.equal(noisy.batch.ids, case["x_t"]), case.name
        sigma = t if case.kind == "subs_cov" else case.schedule.sigma(t if grid is None else grid)
        close(sigma, case["cond_sigma"], rtol=1e-4)


class Networks:
    """The set's network with its time conditioning on and off."""

    def __init__(self, folder, config):
        weights = load_file(folder / "weights.safetensors")
        self.models = {on: MDLM.load(weights, {**config, "time_conditioning": on})[0] for on in (False, True)}
        self.vocabulary = MDLM.load(weights, config)[1]

    @torch.no_grad()
    def logits(self, case, ids, sigma):
        return self.models[case.time_conditioned](mdlm_batch(ids), time=sigma).double()


@pytest.fixture(scope="module")
def networks(folder, config):
    return Networks(folder, config)


def chosen(log_probs, x0):
    return log_probs.gather(-1, x0[..., None])[..., 0]


def token_weight(case):
    if case.constant_weight:
        low, _ = rate_range(case.schedule)
        return torch.full_like(case["t"].double(), importance_weight((low, 1.0)))
    t = (case["t_discrete"] if case.steps else case["t"]).double()
    return 1 / t if case.steps else case.schedule.weight(t)


def subs_loss(case, networks, x0):
    """(log p of the clean token, per-token loss)"""
    batch = mdlm_batch(case["x_t"])
    masked = batch.ids == networks.vocabulary.mask_id
    model = networks.models[case.time_conditioned]
    with torch.no_grad():
        hidden = model.hidden(batch.ids, batch.modality, batch.positions, None, case["cond_sigma"])
        nll = masked_nll(hidden, model.head, masked, mdlm_batch(x0), networks.vocabulary, count=16).double()
    if case.steps:  # no mass on [MASK]: the T-step loss is the weighted NLL
        t = case["t_discrete"].double()[:, None]
        nothing = torch.full_like(nll, -torch.inf)
        loss = masked * d3pm_loss(-nll, nothing, 1 - t, 1 - t + 1 / case.steps, case.steps)
        torch.testing.assert_close(loss, nll * token_weight(case)[:, None], rtol=1e-6, atol=1e-9)
        return -nll, loss
    return -nll, nll * token_weight(case)[:, None]


def d3pm_terms(case, networks, x0):
    """(log p of the clean token, the same for the reconstruction pass, per-token loss)"""
    mask_id = networks.vocabulary.mask_id

    def log_probs(ids, sigma):
        logits = networks.logits(case, ids, sigma)
        if case.kind == "d3pm_subsmask_T":
            logits[..., mask_id] = -torch.inf
        return logits.log_softmax(-1)

    log_p = log_probs(case["x_t"], case["cond_sigma"])
    reconstruction = chosen(log_probs(x0, case["cond_sigma_recon"]), x0)
    # the reference's alpha = 1 - t is not the schedule that masked the tokens
    t = case["t_discrete"].double().clamp(max=1 - 1e-4)[:, None]
    loss = d3pm_loss(chosen(log_p, x0), log_p[..., mask_id], 1 - t, 1 - t + 1 / case.steps, case.steps)
    return chosen(log_p, x0), reconstruction, (case["x_t"] == mask_id) * loss - reconstruction


def sedd_terms(case, networks, x0):
    """(log score of the clean token, per-token loss)"""
    mask_id, t = networks.vocabulary.mask_id, case["t"].double()
    sigma = case.schedule.sigma(t)
    log_score = sedd_log_score(networks.logits(case, case["x_t"], case["cond_sigma"]), case["x_t"], sigma)
    loss = sedd_loss(log_score, x0, case["x_t"] == mask_id, mask_id, sigma)
    return chosen(log_score, x0), case.schedule.dsigma(t)[:, None] * loss


def test_losses(config, losses, networks):
    """Network, restriction, weight and normalisation of every case, from the stored noisy ids."""
    attention, x0 = losses["attention_mask"], losses["x0"]
    inputs = {"seed", "u_t", "u_mask", "t", "t_discrete", "move_chance", "cond_sigma", "cond_sigma_recon", "x_t"}
    kinds = set()
    for case in cases(config, losses):
        kinds.add(case.kind.split("_")[0])
        compared = {"logp_x0", "per_token_loss", "nlls", "loss"}
        t = case["t_discrete"] if case.steps else case["t"]
        rtol = 2e-4
        if case.kind.startswith("subs"):
            log_p, loss = subs_loss(case, networks, x0)
            weight, early = token_weight(case), t < 0.1
            close(weight[~early], case["token_weight"][~early], rtol=2e-4)  # the reference computes in float32
            close(weight[early], case["token_weight"][early], rtol=5e-3)
            compared.add("token_weight")
            if bool(early.any()) and case.noise_name.startswith("cosine"):
                rtol = 5e-3  # the weight's own tolerance
        elif case.kind.startswith("d3pm"):
            log_p, reconstruction, loss = d3pm_terms(case, networks, x0)
            close(reconstruction, case["logp_x0_recon"], rtol=2e-5, atol=2e-5)
            compared.add("logp_x0_recon")
        else:
            log_p, loss = sedd_terms(case, networks, x0)
            if bool((t < 0.1).any()) and case.noise_name.startswith("cosine"):
                rtol = 5e-3
        close(log_p, case["logp_x0"], rtol=1e-4 if case.kind == "sedd" else 2e-5, atol=2e-5)
        close(loss, case["per_token_loss"], rtol=rtol, atol=2e-5)
        close(loss * attention, case["nlls"], rtol=rtol, atol=2e-5)
        total = joint_elbo(loss, torch.ones(len(loss)), mdlm_batch(x0, attention)).total
        close(total[None], case["loss"], rtol=rtol)
        assert case.keys() == compared | (inputs & case.keys()), case.name
    assert kinds == {"subs", "d3pm", "sedd"}


def test_the_first_step_takes_the_limit(config):
    """The reference's T-step losses are NaN for a row with t = 1/T; ours use the limit."""
    t = torch.tensor([1 / config["T_discrete"]], dtype=torch.float64)
    log_x0, log_mask = torch.tensor([-1.5], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    loss = d3pm_loss(log_x0, log_mask, 1 - t, torch.ones_like(t), config["T_discrete"])
    near = d3pm_loss(log_x0, log_mask, 1 - t, torch.ones_like(t) - 1e-12, config["T_discrete"])
    assert bool(loss.isfinite().all())
    torch.testing.assert_close(loss, near, rtol=1e-6, atol=0)
