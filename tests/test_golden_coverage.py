"""What is compared with the golden sets: every file, every stored tensor, and by which test.

The table is checked two ways. Always: each file of a set that is there has a test, which exists and is marked golden.
And in a session that ran those tests: they took every tensor of the file, but for those listed with a reason.
"""

from __future__ import annotations

import ast
import fnmatch
from functools import lru_cache
from pathlib import Path

import pytest
from golden import golden_folders, golden_root, reads_of
from safetensors import safe_open

pytestmark = pytest.mark.golden
TESTS = Path(__file__).parent
DIFFUSION, DECODING, RELEASED = "diffusion/test_golden_{}.py::", "decoding/test_{}.py::", "families/test_{}.py::"
_UNIDISC = DIFFUSION.format("unidisc")
_MDLM = DIFFUSION.format("mdlm")
_SAMPLING = DECODING.format("reference_sampling")
_LLADA = RELEASED.format("llada_golden")
_MMADA = RELEASED.format("mmada_golden")
_DYNIN = RELEASED.format("dynin_golden")
_MUDDIT = RELEASED.format("muddit_golden")
_DDIT = RELEASED.format("ddit_golden")
_LLADA2 = RELEASED.format("llada2_golden")
_PARALLEL, _PARALLEL_DECODES = (RELEASED.format(f"parallel_{what}golden") for what in ("", "decodes_"))
_UNI = RELEASED.format("llada2_uni_golden")
_UNI_IMAGES = RELEASED.format("llada2_uni_images_golden")
_BLOCKS = ("test_forward", "test_a_cache_of_finished_blocks_is_exact", "test_a_mask_that_is_added_is_another_model")
_LLADA_V = RELEASED.format("llada_v_golden")
_MOE = RELEASED.format("llada_moe_golden")
_ESTIMATOR = "test_the_estimator_gives_the_stored_likelihood"
_NAMES = "::test_every_weight_maps_both_ways"
_TRACES = ("test_image_traces", "test_text_traces_through_the_sampler", "test_text_traces_with_noise")

# set: file (pattern, relative to the set): the tests that compare it
COMPARED: dict[str, dict[str, tuple[str, ...]]] = {
    "unidisc": {
        "*/weights.safetensors": (f"families/test_unidisc_golden.py{_NAMES}",),
        "*/forward.safetensors": (f"{RELEASED.format('unidisc_golden')}test_forward_matches_the_reference",),
        "static/loss.safetensors": (f"{_UNIDISC}test_losses", f"{_UNIDISC}test_gradient_norms"),
        "static/corruption.safetensors": (f"{_UNIDISC}test_corruption",),
        "static/sampling.safetensors": (f"{_SAMPLING}test_unidisc_sampling",),
        "static/likelihood.safetensors": (f"{_UNIDISC}test_sequence_scores",),
        "*/forward_loss.safetensors": (
            f"{RELEASED.format('unidisc_golden')}test_forward_matches_the_reference",
            f"{_UNIDISC}test_configured_loss",
        ),
        "interleaved/corruption.safetensors": (f"{_UNIDISC}test_interleaved_corruption",),
        "interleaved/rope.safetensors": (
            f"{RELEASED.format('unidisc_golden')}test_every_image_size_has_its_own_rotary_table",
        ),
    },
    "mdlm": {
        "weights.safetensors": (f"families/test_mdlm_golden.py{_NAMES}",),
        "backbone.safetensors": (
            f"{RELEASED.format('mdlm_golden')}test_forward_and_parameterisations_match_the_reference",
        ),
        "schedules.safetensors": (f"{_MDLM}test_schedule_tables", f"{_MDLM}test_times"),
        "losses.safetensors": (f"{_MDLM}test_times_and_corruption", f"{_MDLM}test_losses"),
        "samplers.safetensors": (f"{_SAMPLING}test_mdlm_sampling",),
    },
    "llada": {
        "weights.safetensors": (f"families/test_llada_golden.py{_NAMES}",),
        "forward.safetensors": (f"{_LLADA}test_forward",),
        "traces.safetensors": (f"{_LLADA}test_every_stored_trace_is_a_case", f"{_LLADA}test_trace"),
        "likelihood.safetensors": (f"{_LLADA}test_likelihood", f"{DIFFUSION.format('likelihood')}{_ESTIMATOR}"),
        "sampling.safetensors": (f"{_LLADA}test_sampling_units",),
    },
    "mmada": {
        "weights.safetensors": (f"{_MMADA}test_every_weight_maps_both_ways",),
        "forward.safetensors": (f"{_MMADA}test_forward_with_and_without_a_mask",),
        "prompts.safetensors": (f"{_MMADA}test_prompts",),
        "masking.safetensors": (f"{_MMADA}test_masking", f"{_MMADA}test_prompts"),
        "losses.safetensors": (f"{_MMADA}test_losses_and_gradients",),
        "t2i_*.safetensors": (f"{_MMADA}test_image_traces",),
        "mmu_*.safetensors": tuple(f"{_MMADA}{name}" for name in _TRACES[1:]),
    },
    "dynin": {
        "weights.safetensors": (f"{_DYNIN}test_every_weight_maps_both_ways",),
        "forward.safetensors": (f"{_DYNIN}test_forward",),
        "prompts.safetensors": (f"{_DYNIN}test_prompts",),
        "t2i_*.safetensors": (f"{_DYNIN}test_pictures",),
        "i2i_*.safetensors": (f"{_DYNIN}test_pictures",),
        "ti2ti_*.safetensors": (f"{_DYNIN}test_words_and_pictures_together",),
    },
    "muddit": {
        "transformer_cases.safetensors": ("models/test_mmdit_golden.py::test_forward_matches_the_reference",),
        "vqvae_cases.safetensors": (f"{_MUDDIT}test_vq_model",),
        "scheduler_cases.safetensors": (f"{_MUDDIT}test_scheduler_steps", f"{_MUDDIT}test_schedule_tables_and_noise"),
        "pipeline_cases.safetensors": (
            f"{_MUDDIT}test_text_to_image_pipelines",
            f"{_MUDDIT}test_question_pipelines",
        ),
        "vqvae.safetensors": (f"{_MUDDIT}test_vq_model",),
        "text_encoder.safetensors": (f"{_MUDDIT}test_question_pipelines",),
        "transformer*.safetensors": (f"models/test_mmdit_golden.py{_NAMES}",),
    },
    "ddit": {
        "transformer.safetensors": (f"families/test_ddit_golden.py{_NAMES}",),
        "text_encoder.safetensors": (f"{_DDIT}test_forward",),
        "vae.safetensors": (f"{_DDIT}test_pictures",),
        "forward.safetensors": (f"{_DDIT}test_forward",),
        "losses.safetensors": (f"{_DDIT}test_times", f"{_DDIT}test_losses_and_gradients"),
        "t2i.safetensors": (f"{_DDIT}test_schedules", f"{_DDIT}test_pictures"),
        "i2t.safetensors": (f"{_DDIT}test_words",),
    },
    "llamagen_vq": {
        "weights.safetensors": (f"families/test_llamagen.py{_NAMES}_from_every_entry",),
        "*puts.safetensors": (f"{RELEASED.format('llamagen')}test_every_stored_tensor_matches_the_reference",),
    },
    "magvitv2": {
        "weights.safetensors": (f"families/test_magvit.py{_NAMES}",),
        "*puts.safetensors": (f"{RELEASED.format('magvit')}test_every_stored_tensor_matches_the_reference",),
    },
    "llada_moe": {
        "weights.safetensors": (f"families/test_llada_moe_golden.py{_NAMES}",),
        "forward.safetensors": (f"{_MOE}test_forward", f"{_MOE}test_variants"),
        "variant_weights.safetensors": (f"{_MOE}test_variants",),
        "traces.safetensors": (f"{_MOE}test_trace",),
        "likelihood.safetensors": (f"{_MOE}test_likelihood", f"{DIFFUSION.format('likelihood')}{_ESTIMATOR}"),
    },
    "llada_v": {
        "weights.safetensors": (f"families/test_llada_v_golden.py{_NAMES}",),
        "images.safetensors": (f"{_LLADA_V}test_pictures",),
        "forward.safetensors": (f"{_LLADA_V}test_forward",),
        "trace_*.safetensors": (f"{_LLADA_V}test_upstreams_loop",),
    },
    "llada2_mini": {
        "weights.safetensors": (f"families/test_llada2_golden.py{_NAMES}",),
        "experts_stacked.safetensors": (f"families/test_llada2_golden.py{_NAMES}",),
        "forward.safetensors": tuple(f"{_LLADA2}{name}" for name in _BLOCKS),
        "traces.safetensors": (
            f"{_LLADA2}test_compat_gives_every_record",
            f"{_LLADA2}test_the_sampler_decodes_the_recorded_runs",
        ),
    },
    "llada2_uni": {
        "weights.safetensors": (f"families/test_llada2_uni_golden.py{_NAMES}",),
        "forward.safetensors": (f"{_UNI}test_forward",),
        "image_tokenizer_weights.safetensors": (f"families/test_llada2_uni_images_golden.py{_NAMES}",),
        "image_tokenizer.safetensors": tuple(
            f"{_UNI_IMAGES}{name}" for name in ("test_pictures_to_codes", "test_features_of_codes")
        ),
        "decoder_flow.safetensors": tuple(
            f"{_UNI_IMAGES}test_sampling_with_{what}" for what in ("guidance", "fresh_noise")
        ),
        "trace_*sprint*.safetensors": (f"{_UNI}test_trace", f"{_UNI}test_sprint_keeps_the_recorded_positions"),
        "trace_*.safetensors": (f"{_UNI}test_trace",),
    },
    "mmada_parallel": {
        "*/weights.safetensors": (f"families/test_parallel_golden.py{_NAMES}",),
        "*/forward.safetensors": (f"{_PARALLEL}test_forward",),
        "*/paint_masks.safetensors": (f"{_PARALLEL}test_crops_and_masks",),
        "*.safetensors": (f"{_PARALLEL_DECODES}test_model_a", f"{_PARALLEL_DECODES}test_model_m"),
    },
    "ml_cache": {"*.safetensors": (f"{DECODING.format('max_logit_golden')}test_trace",)},
    "dllm_cache": {"*.safetensors": (f"{DECODING.format('adaptive_golden')}test_trace",)},
    "toy_exact": {
        "*.json": (
            "diffusion/test_toy_exact.py::test_every_key_is_covered",  # and, key by key, the others of that module
            f"{DECODING.format('sampler_law')}test_sampler_law",
            f"{DECODING.format('parallel_greedy')}test_theorem_cases",
            f"{DECODING.format('commit')}test_factor_rule_of_the_golden_set",
        )
    },
}
# settings, read by every test of the set
SETTINGS = ("config.json", "README.md")
# set/file (pattern): tensor (pattern): why nothing takes it
REASONS: dict[str, dict[str, str]] = {
    "llada/forward.safetensors": {
        "padded.logits_mask_ignored": "a defect that is not reproduced: Fast-dLLM's model ignores the mask it is given"
    },
    "unidisc/static/forward.safetensors": {"x0": "input_ids is what the network sees"},
    "unidisc/interleaved/corruption.safetensors": {"n_rand": "how many calls of the generator there were"},
    "mdlm/losses.safetensors": {"*.seed": "for the record only: the draws themselves are stored"},
    "mdlm/backbone.safetensors": {"x0": "x_t is what the network sees", "attention_mask": "the network takes none"},
}


def files() -> list:
    """Every file of every set that is there."""
    found = []
    for name in COMPARED:
        for folder in golden_folders(name):
            found += sorted(p for p in folder.iterdir() if p.is_file())
    params = [pytest.param(p, id=p.relative_to(golden_root()).as_posix()) for p in found]
    return params or [pytest.param(None, marks=pytest.mark.skip(reason="no golden set is there"))]


def split(path: Path) -> tuple[str, str]:
    """(set, file relative to it)"""
    name, _, file = path.relative_to(golden_root()).as_posix().partition("/")
    return name, file


def compared_by(path: Path) -> tuple[str, ...]:
    """The tests that compare a file: those of the first pattern that it matches."""
    name, file = split(path)
    return next((tests for pattern, tests in COMPARED[name].items() if fnmatch.fnmatch(file, pattern)), ())


@lru_cache(maxsize=64)
def golden_tests(module: str) -> frozenset[str]:
    """Names of the tests of a module that are marked golden, one by one or all together."""
    tree = ast.parse((TESTS / module).read_text(encoding="utf-8"))
    whole = any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and "golden" in ast.unparse(node)
        for node in tree.body
    )
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    marked = lambda node: any(ast.unparse(d).endswith("mark.golden") for d in node.decorator_list)  # noqa: E731
    return frozenset(node.name for node in functions if whole or marked(node))


@pytest.mark.parametrize("path", files())
def test_every_file_has_a_test(path: Path):
    name, file = split(path)
    if Path(file).name in SETTINGS:
        return
    tests = compared_by(path)
    assert tests, f"no test compares {name}/{file}; add it to COMPARED, or to a test of the set"
    for test in tests:
        module, _, function = test.partition("::")
        assert function in golden_tests(module), f"{test} is no golden test, but {name}/{file} relies on it"


@pytest.mark.parametrize("path", [p for p in files() if p.values[0] is None or p.values[0].suffix == ".safetensors"])
def test_every_tensor_was_taken(path: Path, request: pytest.FixtureRequest):
    """Looks back at what this session did; the tests of the file have to be part of it."""
    ran = {item.nodeid.partition("[")[0].removeprefix("tests/") for item in request.session.items}
    if absent := [test for test in compared_by(path) if test not in ran]:
        pytest.skip(f"this session did not run {absent[0]}")
    name, file = split(path)
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
    taken = set().union(*reads_of(path).values())
    reasons = REASONS.get(f"{name}/{file}", {})
    excused = {n for n in names if any(fnmatch.fnmatchcase(n, pattern) for pattern in reasons)}
    rest = sorted(names - taken - excused)
    assert not rest, f"{name}/{file} holds tensors that no test took: {rest[:8]} ({len(rest)} in all)"


@pytest.mark.parametrize("name", sorted(p.name for p in golden_root().iterdir()) if golden_root().is_dir() else [])
def test_every_set_of_the_root_is_compared(name: str):
    """A set whose family is not built is skipped with that reason, whatever is in it."""
    if name not in COMPARED:
        pytest.skip(f"the family of golden set {name} is not built")
    assert golden_folders(name), f"golden set {name} holds no data files"


def test_the_table_is_whole():
    assert len(COMPARED) == 17
    for name, reasons in REASONS.items():
        assert name.partition("/")[0] in COMPARED and all(reasons.values())
