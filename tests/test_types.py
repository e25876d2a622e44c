"""Type checkers read the package: a user's file passes when it is right, and each wrong line is found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import unidiff

ROOT = Path(unidiff.__file__).resolve().parents[1]
RIGHT = """
import torch
from PIL import Image

from unidiff import CacheConfig, Guidance, ModalityDecoding, SamplerConfig, UniDiffPipeline, Vocabulary
from unidiff.schedulers import UnmaskingScheduler


def watch(pipe: UniDiffPipeline, step: int, t: float, tensors: dict[str, torch.Tensor]) -> bool:
    return step < 5


def use(words: list[str]) -> list[str]:
    pipe = UniDiffPipeline.from_pretrained("emoji", dtype="float32")
    drawn = pipe(words, num_inference_steps=8, generator=1, output_type="pt", callback_on_step_end=watch)
    more = pipe.text_to_image("a fox", steps=4, cfg_scale=1.5, cache=CacheConfig("dual"), generator=[3])
    told = pipe.caption(Image.new("RGB", (64, 64)), max_new_tokens=4, temperature=0.5)
    both = pipe.generate(steps=3, block_length={"text": 4}, return_dict=True)
    image = ModalityDecoding(steps=2, rule="quota")
    pipe.scheduler = UnmaskingScheduler(sampler=SamplerConfig(image=image, guidance=Guidance(2.0)), threshold=0.5)
    images, texts, *_ = pipe(words, return_dict=False)
    images, texts, *_ = pipe.text_to_image(words, return_dict=False)
    first: list[str] = pipe.caption(images, return_dict=True).texts
    ids: Vocabulary = pipe.vocabulary
    rate: torch.Tensor = drawn.tokens_per_forward
    assert ids.size and rate.shape == drawn.seeds.shape and more.sequences.shape == more.ids.shape
    return [*drawn.texts, *told.texts, *both.texts, *texts, *first, str(pipe(words, return_dict=False)[0])]
"""
WRONG = """
from unidiff import ModalityDecoding, UniDiffPipeline
from unidiff.schedulers import UnmaskingScheduler

pipe = UniDiffPipeline.from_pretrained("emoji")
pipe("a fox", steps="four")  # wrong
pipe.text_to_image("a fox", steps="four")  # wrong
pipe.text_to_image(3)  # wrong
pipe.caption("a.png", max_new_tokens="long")  # wrong
pipe("a fox", stepz=4)  # wrong
pipe.chat("hi", return_dict="no")  # wrong
pipe("hi", return_dict="no")  # wrong
pipe("hi", return_dict=False).images  # wrong
pipe("hi", return_dict=len("a") > 1).images  # wrong
pipe("a fox").pictures  # wrong
pipe("a fox").texts.upper()  # wrong
pipe.text_to_image("a fox", num_images_per_prompt="two")  # wrong
ModalityDecoding(steps="four")  # wrong
UnmaskingScheduler(threshold="high")  # wrong
pipe("a fox", steps=4)
"""


def lines_found(folder: Path, *command: str, **env: str) -> dict[str, set[int]]:
    """Lines with errors, by file."""
    done = subprocess.run(command, cwd=folder, env={**os.environ, **env}, capture_output=True, text=True)
    found: dict[str, set[int]] = {"right.py": set(), "wrong.py": set()}
    for name, line in re.findall(r"(right\.py|wrong\.py):(\d+)(?::\d+)?:? (?:- )?error", done.stdout):
        found[name].add(int(line))
    assert done.stdout.strip(), done.stderr
    return found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT, encoding="utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    return tmp_path


EXPECTED = {
    "right.py": set(),
    "wrong.py": {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")},
}


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "unidiff" / "py.typed").is_file()


@pytest.mark.slow
def test_mypy_strict(folder):
    mypy = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", "--cache-dir=cache")
    assert lines_found(folder, *mypy, "right.py", "wrong.py", MYPYPATH=str(ROOT)) == EXPECTED


@pytest.mark.slow
def test_pyright_strict_on_what_is_right(folder):
    if shutil.which("pyright", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("pyright is not installed")
    for mode, name in (("strict", "right.py"), ("standard", "wrong.py")):
        config = {"typeCheckingMode": mode, "extraPaths": [str(ROOT)], "include": [name]}
        (folder / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
        found = lines_found(folder, sys.executable, "-m", "pyright", "--pythonpath", sys.executable)
        assert found[name] == EXPECTED[name]
