"""Files that are damaged or made to harm: each is read as if nothing were wrong with what is used, or named in one sentence.

`hostile_kinds` has the folders, `hostile_cases` the damage and the judgement. Seed 0; a sample by default, all cases with
`make test-all`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
import transformers
from hostile_cases import Kind, byte_cases, fault, json_cases, limits, same, sentence_fault
from hostile_kinds import KINDS
from released_parts import write_tiny
from safetensors.torch import load_file, save_file

from unidiff.families.checkpoint.load import load_released

SAMPLE = 4  # cases of each kind by default
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name.replace(" ", "-"))


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def try_kind(kind: Kind, folder: Path, most: int | None) -> int:
    """Read a folder with each damage in turn; returns how many were tried."""
    kind.write(folder)
    good = kind.load(folder)
    assert same(good, kind.load(folder)), "a good folder has to give the same twice"
    cases = [case for file in kind.texts for case in json_cases(folder, file)]
    cases += [case for file in kind.blobs for case in byte_cases(folder, file, 0, 30)]
    if most is not None:
        cases = random.Random(f"0 {kind.name}").sample(cases, min(most, len(cases)))
    found = {case.label: said for case in cases if (said := fault(kind, folder, case, good))}
    assert not found, f"{len(found)} of {len(cases)}: {dict(list(found.items())[:10])}"
    return len(cases)


@EACH
def test_a_sample_of_damaged_files(kind: Kind, tmp_path: Path):
    try_kind(kind, tmp_path / "f", SAMPLE)


@pytest.mark.slow
@EACH
def test_every_value_replaced_and_files_damaged_anywhere(kind: Kind, tmp_path: Path):
    assert try_kind(kind, tmp_path / "f", None) >= 40


# ------------------------------------------------------------------------------------------ things that are no files


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [_pipe, _folder, _dangling, _loop])
@EACH
def test_what_is_no_plain_file_is_named_and_never_waited_for(kind: Kind, make, tmp_path: Path):
    folder = tmp_path / "f"
    kind.write(folder)
    good = kind.load(folder)
    for name in dict.fromkeys((*kind.texts, *kind.blobs)):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        make(path)
        try:
            with limits():
                found = kind.load(folder)
        except (ValueError, OSError) as error:
            assert sentence_fault(error, folder) is None, (name, sentence_fault(error, folder))
        else:
            assert same(found, good), name
        finally:
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(content)


@EACH
def test_not_a_number_in_any_weight_file_is_refused(kind: Kind, tmp_path: Path):
    folder = tmp_path / "f"
    kind.write(folder)
    for name in (blob for blob in kind.blobs if blob.endswith(".safetensors")):
        weights = load_file(folder / name)
        spoilt = next(n for n, value in weights.items() if value.is_floating_point())
        for value in (float("nan"), float("inf")):
            weights[spoilt].view(-1)[-1] = value
            save_file(weights, folder / name, {"format": "pt"})
            with pytest.raises(ValueError, match=str(folder)):
                kind.load(folder)
        weights[spoilt].view(-1)[-1] = 0
        save_file(weights, folder / name, {"format": "pt"})


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize(
    "name",
    ["llada", "dream", "mdlm", "magvit", "vq_model", "muddit", "converted llada", "denoiser", "CellVQModel", "VQModel"],
)
def test_weights_that_are_no_plain_numbers_are_refused_by_name_and_file(name: str, dtype: torch.dtype, tmp_path: Path):
    kind, folder = KINDS[name], tmp_path / "f"
    kind.write(folder)
    file = folder / kind.blobs[0]
    weights = load_file(file)
    first = next(n for n, value in weights.items() if value.ndim > 1)
    weights[first] = weights[first].to(dtype)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"is stored as (torch\.)?" + str(dtype).removeprefix("torch.")) as caught:
        kind.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_point_weights_are_fine(dtype: torch.dtype, tmp_path: Path):
    state = write_tiny(tmp_path, "llada")
    save_file({name: value.to(dtype) for name, value in state.items()}, tmp_path / "model.safetensors")
    assert {value.dtype for value in load_released(tmp_path).model.parameters()} == {dtype}
