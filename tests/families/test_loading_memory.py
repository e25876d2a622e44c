"""Loading takes the memory of the weights and little more, whatever the kind of file: peak resident memory is measured.

    python tests/families/test_loading_memory.py FOLDER safetensors|shards|bin [GIGABYTES]

writes a synthetic LLaDA checkpoint, loads it and prints what it took.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unidiff.families.checkpoint.load import load_released
from unidiff.families.llada import LLADA
from unidiff.weights.files import WINDOW

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LIMIT = 1.15
KINDS = ("safetensors", "shards", "bin")
pytestmark = pytest.mark.skipif(not RESET.exists(), reason="needs Linux's /proc to measure")


def resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(call):
    """(result, bytes that the resident memory rose above where it was, at its highest)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory kept for reuse would hide what the call takes
    before = resident("VmRSS")
    RESET.write_text("5")
    result = call()
    return result, resident("VmHWM") - before


def synthetic_config(size: int) -> dict:
    """LLaDA of about `size` bytes in bfloat16, with projections apart as released: most of it has to be joined."""
    d = 2048 if size > 2**30 else 512
    config = {"model_type": "llada", "d_model": d, "n_heads": d // 64, "n_layers": 1, "mlp_hidden_size": 11 * d // 4}
    config |= {"vocab_size": 4 * d, "embedding_size": 4 * d, "mask_token_id": 2 * d, "eos_token_id": 1}
    per_layer = 2 * (4 * d * d + 3 * d * config["mlp_hidden_size"])
    return {**config, "n_layers": max(2, round((size - 16 * d * d) / per_layer))}


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    from unidiff.models.transformer import MaskedTransformer

    with torch.device("meta"):
        model = MaskedTransformer(**LLADA.settings(config))
    return {name: tuple(value.shape) for name, value in LLADA.export(model).items()}


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_synthetic(folder: Path, kind: str, size: int) -> int:
    """The checkpoint; returns the bytes of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = synthetic_config(size)
    shapes = shapes_of(config)
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "bin":
        torch.save({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, folder / "pytorch_model.bin")
    elif kind == "shards":
        names = list(shapes)
        parts = [names[i::4] for i in range(4)]  # layers spread over all files: the worst order
        for n, part in enumerate(parts):
            write_sparse(folder / f"model-{n}.safetensors", {name: shapes[name] for name in part})
        where = {name: f"model-{n}.safetensors" for n, part in enumerate(parts) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        write_sparse(folder / "model.safetensors", shapes)
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, list[int]]:
    """(bytes of weights, peak) of each kind and of a cast, in a fresh process: other tests change how memory is kept."""
    folder = tmp_path_factory.mktemp("small")
    done = subprocess.run([sys.executable, __file__, str(folder), "all"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_checkpoint(small, kind):
    """The window of a torch file, 16 MiB, is much of a small checkpoint, so it is counted apart here."""
    weights, peak = small[kind]
    assert weights > 0.9e8 and weights * 0.9 < peak < weights * LIMIT + (2 * WINDOW if kind == "bin" else 0)


def test_a_cast_takes_the_memory_of_its_result(small):
    weights, peak = small["cast"]
    kept = 4 * 2**20  # by the allocator; it varies by that much from run to run
    assert weights > 0.9e8 and weights * 0.9 < peak < weights * LIMIT + kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_gigabytes_in_a_process_of_its_own(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), kind, "2"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    weights, peak = (int(word) for word in done.stdout.split()[:2])
    assert weights > 1.9e9 and weights * 0.9 < peak < weights * LIMIT, done.stdout


def small_peak(folder: Path, kind: str) -> tuple[int, int]:
    """(bytes of weights, peak) of a checkpoint of 100 MB once loaded; `cast` is half as much on the disk, in float32."""
    dtype = torch.float32 if kind == "cast" else None
    write_synthetic(folder, "safetensors" if dtype else kind, (50 if dtype else 100) * 10**6)
    load_released(folder, dtype)  # what is set up once
    loaded, peak = peak_of(lambda: load_released(folder, dtype))
    return sum(p.nbytes for p in loaded.model.parameters()), peak


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    size = float(sys.argv[3]) if len(sys.argv) > 3 else 2.0
    if "--write" in sys.argv:
        write_synthetic(folder, kind, int(size * 10**9))
        return
    if kind == "all":
        print(json.dumps({kind: small_peak(folder / kind, kind) for kind in (*KINDS, "cast")}))
        return
    write_synthetic(folder / "warm", "safetensors", 10**7)
    load_released(folder / "warm")
    # written by another process, so that the memory of writing does not count
    subprocess.run([sys.executable, __file__, str(folder / "full"), kind, str(size), "--write"], check=True)
    loaded, peak = peak_of(lambda: load_released(folder / "full"))
    weights = sum(p.nbytes for p in loaded.model.parameters())
    print(weights, peak, f"bytes of weights and peak above start: {peak / weights:.3f}x ({kind})")


if __name__ == "__main__":
    main()
