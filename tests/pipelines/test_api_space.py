"""Thousands of calls of every task with right and wrong values of every argument: a whole result, or one sentence.

Seeds are the numbers of the calls, so a failure names the call that repeats it.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from all_pipelines import EVERY, make_pipelines
from api_values import (
    BAD_HOLES,
    COUNTS,
    FLAGS,
    HOLES,
    MASKS,
    NOT_MASKS,
    NOT_PICTURES,
    NOT_TEXTS,
    NOT_WHOLE,
    OPTIONS,
    PICTURES,
    TEXTS,
    Make,
    Space,
)
from PIL import Image

from unidiff.errors import DamagedFile

FAST, SLOW = 80, 2400
NAMES = {  # how a sentence may call an argument
    "image": ("image", "picture", "cannot be downloaded", "is no address"),
    "mask_image": ("mask",),
    "generator": ("generator", "seed"),
    "guidance_scale": ("guidance",),
    "guidance_hides": ("guidance hide",),
    "policy": ("policy",),
    "messages": ("question", "message"),
    "max_text_tokens": ("max_text_tokens",),
    "reference": ("reference", "image", "picture"),
    "prompt": ("prompt",),
    "num_images_per_prompt": ("num_images_per_prompt",),
}


@dataclass(frozen=True)
class Argument:
    """Right and wrong values of one argument; `always`: it is never left out."""

    right: list[Make]
    wrong: list[Make]
    always: bool = False


def _constant(*values: Any) -> list[Make]:
    return [lambda s, v=v: v for v in values]


_WORDS = Argument(TEXTS, [*NOT_TEXTS, *_constant(None, *BAD_HOLES, "a <mask> dog")], always=True)
_FILLED = Argument(HOLES, [*NOT_TEXTS, *_constant(*BAD_HOLES)], always=True)
_PICTURE = Argument(PICTURES, NOT_PICTURES, always=True)
_LONGEST = Argument(_constant(None, 1, 3), NOT_WHOLE)
_COUNT, _FLAG = Argument(*COUNTS), Argument(*FLAGS)
_TURNS = Argument(
    _constant("a fox?", ["a fox?", "two owls"], [{"role": "user", "content": "a fox?"}]),
    [
        *NOT_TEXTS,
        *_constant(
            None, [[]], [[{"role": "user"}]], [{"role": "pope", "content": "a"}], [{"role": "user", "content": 3}]
        ),
        *_constant([{"role": "user", "content": ""}], [[1, -5]], {"role": "user", "content": "a"}, [["a", "b"]]),
    ],
    always=True,
)


def arguments_of(family: str, task: str) -> dict[str, Argument]:
    """Arguments of a task by name, without the options that all tasks have."""
    longest = {"max_text_tokens": _LONGEST}
    table: dict[str, dict[str, Argument]] = {
        "text_to_image": {"prompt": _WORDS, "num_images_per_prompt": _COUNT},
        "caption": {"image": _PICTURE, **longest, "resize": _FLAG},
        "answer": {"image": _PICTURE, "question": _WORDS, **longest, "resize": _FLAG},
        "inpaint": {"image": _PICTURE, "mask_image": Argument(MASKS, NOT_MASKS, True), "resize": _FLAG},
        "generate": {"text": _FILLED, "num_images_per_prompt": _COUNT, "max_text_tokens": _LONGEST},
        "edit": {
            "image": _PICTURE,
            "prompt": _WORDS,
            "mask_image": Argument([lambda s: None, *MASKS], NOT_MASKS),
            "reference": Argument([lambda s: None, lambda s: s.picture], NOT_PICTURES[1:]),
            "num_images_per_prompt": _COUNT,
            **longest,
        },
        "chat": {"messages": _TURNS, "max_text_tokens": Argument(_constant(1, 3), NOT_WHOLE, True)},
        "complete": {
            "prompt": Argument(TEXTS, [*NOT_TEXTS, lambda s: None], True),
            "max_text_tokens": Argument(_constant(1, 3), NOT_WHOLE, True),
        },
        "infill": {"text": Argument(HOLES, [*NOT_TEXTS, *_constant(None, *BAD_HOLES, "no holes")], True)},
    }
    own = dict(table[task])
    if family in ("mmada", "lumina") and task == "generate":  # a prompt, which a picture and words answer
        own = {"prompt": _WORDS, "num_images_per_prompt": _COUNT, **longest}
    if family == "mmada":
        own.pop("reference", None)
    if task == "inpaint":
        own |= {"text": _FILLED, "paste_back": _FLAG, "num_images_per_prompt": _COUNT}
    if task == "text_to_image":
        wrong = [make for n, make in enumerate(NOT_TEXTS) if n not in (4, 5, 10)]  # "" and " " mean hidden words
        own["negative_prompt"] = Argument(_constant(None, "", "a fox"), wrong)
    return own


def options_of(family: str, task: str) -> dict[str, Argument]:
    options = {name: Argument(*values) for name, values in OPTIONS.items()}
    if task in ("chat", "complete", "infill") or family == "llada-v":
        options["num_candidates"] = Argument(_constant(None, 1), OPTIONS["num_candidates"][1])
    return options


@dataclass(frozen=True)
class Call:
    """One call; `spoiled` names the argument that got a wrong value, `unknown` one that does not exist."""

    number: int
    family: str
    task: str
    given: dict[str, Any]
    spoiled: str | None
    unknown: str | None

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={value!r:.60}" for name, value in self.given.items())
        return f"call {self.number}: {self.family}.{self.task}({shown})"


def make_call(number: int, pipes: dict[str, Any], spaces: dict[str, Space]) -> Call:
    rng = random.Random(number)
    family = rng.choice(EVERY)
    task = rng.choice(pipes[family].layout.tasks)
    own, options = arguments_of(family, task), options_of(family, task)
    both = own | options
    chosen = [name for name, a in own.items() if a.always or rng.random() < 0.5]
    chosen += [name for name in options if rng.random() < 0.25]
    spoiled = rng.choice(list(both)) if rng.random() < 0.6 else None
    unknown = rng.choice(["guidance", "step", "seed", "negative", "num_images", "x"]) if rng.random() < 0.05 else None
    given: dict[str, Any] = {}
    for name in dict.fromkeys([*chosen, *([spoiled] if spoiled else [])]):
        values = both[name].wrong if name == spoiled else both[name].right
        given[name] = rng.choice(values)(spaces[family])
    if unknown:
        given[unknown] = 3
    return Call(number, family, task, given, spoiled, unknown)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    return make_pipelines(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def spaces(tmp_path_factory):
    sizes = {"native": (16, 24), "muddit": (8, 8), "ddit": (8, 8)}
    folder = tmp_path_factory.mktemp("values")
    return {family: Space(sizes.get(family, (6, 6)), folder / family) for family in EVERY}


def attempt(call: Call, pipe: Any) -> Any:
    """The result of a call, or its sentence; fails where neither comes."""
    before = {name: _print(value) for name, value in call.given.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = getattr(pipe, call.task)(**call.given)
    except TypeError as error:
        assert call.unknown, f"{call}: {error!r}"
        assert f"{call.task}() has no argument {call.unknown!r}" in str(error), f"{call}: {error}"
        return None
    except (ValueError, FileNotFoundError) as error:
        _check_sentence(call, error)
        return None
    except OSError as error:
        raise AssertionError(f"{call}: {error!r}") from error
    finally:
        assert before == {name: _print(value) for name, value in call.given.items()}, f"{call} changed its input"
    assert call.unknown is None, f"{call}: an unknown argument was taken"
    assert call.spoiled is None or call.spoiled in _HARMLESS.get(call.task, ()), f"{call}: {call.spoiled} passed"
    return result


_HARMLESS: dict[str, tuple[str, ...]] = {}


def _print(value: Any) -> Any:
    """What a value was, to see whether a call changed it."""
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.dtype != object else len(value)
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes() if min(value.size) else b""
    if isinstance(value, list | tuple):
        return [_print(v) for v in value]
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        return repr(value.detach().flatten().tolist()) if not value.is_quantized else None
    return repr(value) if isinstance(value, str | int | float | dict) else None


def _check_sentence(call: Call, error: Exception) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 420, f"{call}: {error!r}"
    assert "Traceback" not in text and "NotImplemented" not in text, f"{call}: {error!r}"
    own = type(error) in (ValueError, FileNotFoundError, DamagedFile)
    assert own, f"{call}: {error!r}"
    if call.spoiled and not call.unknown:
        names = NAMES.get(call.spoiled, (call.spoiled,))
        excused = any(words in text for words in _CLASH)
        assert excused or any(name in text for name in names), f"{call}: does not name {call.spoiled}: {text}"
    elif not call.unknown:
        assert any(words in text for words in _CLASH), f"{call}: refused: {text}"


_CLASH = (  # right values that do not go together
    "do not go with",
    "known in full",
    "nothing is left to decode",
    "changes nothing at guidance_scale 1",
    "cache and policy both",
    "only edit is guided",
    "leave one of them out",
    "give one of them",
    "one size at a time",
    "a size together with a mask",
    "give either the size",
    "one for each as [B, H, W]",
    "run them apart",
    "does not suit",
    "needs",
    "tokens, but",
    "unconditional batches",
    "fit; shorten it",
    "dim everywhere",
    "text_length",
    "does not rank its decodes",
    "is for words",  # where a picture is drawn by flow matching
)


def check_result(call: Call, pipe: Any, result: Any, space: Space) -> None:
    rows = len(result.texts)
    kind = call.given.get("output_type", "pil")
    assert rows == _expected_rows(call), f"{call}: {rows} rows"
    assert all(isinstance(text, str) for text in result.texts)
    assert len(result.seeds) == rows and result.seeds.dtype == torch.int64
    if call.task in ("chat", "complete", "infill") or pipe.layout.reads_pixels:
        assert result.images is None
    else:
        assert len(result.images) == rows, f"{call}: {len(result.images)} pictures"
        if kind == "pil":
            assert all(image.size == space.size[::-1] and image.mode == "RGB" for image in result.images), str(call)
        elif kind in ("codes", "latent"):
            form = (torch.float32, 4) if call.family == "ddit" else (torch.int64, 3)  # latents, or codes
            assert (result.images.dtype, result.images.ndim) == form, str(call)
        else:
            shape = (rows, 3, *space.size) if kind == "pt" else (rows, *space.size, 3)
            assert tuple(result.images.shape) == shape and result.images.min() >= 0 and result.images.max() <= 1
    vocabulary = pipe.vocabulary
    hidden = {vocabulary.mask_id, vocabulary.image_mask}
    valid = result.ids if call.family == "native" else result.ids[result.ids != 0]
    assert not hidden & set(valid.flatten().tolist()), f"{call}: [MASK] is left"
    assert bool(((result.confidences >= 0) & (result.confidences <= 1)).all())
    if call.task in ("inpaint", "edit") and call.given.get("mask_image") is not None:
        pixels = pipe.image_inputs.images(call.given["image"], True)
        codes = pipe.images.encode(pixels).repeat_interleave(rows // len(pixels), 0)
        cells = pipe.image_inputs.cells(torch.from_numpy(space.white)[None])[0]
        assert _same(result.codes[..., ~cells], codes[..., ~cells].cpu()), f"{call}: a given code changed"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether codes are equal, or latents but for rounding."""
    return torch.allclose(a, b, rtol=0, atol=1e-4 if a.is_floating_point() else 0)


def _expected_rows(call: Call) -> int:
    sizes = [1]
    for name in ("prompt", "question", "text", "image", "messages", "mask_image"):
        value = call.given.get(name)
        if (isinstance(value, list | tuple) and not (value and isinstance(value[0], dict))) or (
            name == "image" and isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 4
        ):
            sizes.append(len(value))
    return max(sizes) * call.given.get("num_images_per_prompt", 1)


def check_alone(call: Call, pipe: Any, result: Any) -> None:
    """The last row is the row alone, by its seed."""
    count = call.given.get("num_images_per_prompt", 1)
    entry = len(result.texts) // count - 1
    given = dict(call.given) | {"generator": [int(result.seeds[-1])]}
    given.pop("num_images_per_prompt", None)
    for name in ("prompt", "question", "text", "image", "messages"):
        value = given.get(name)
        several = isinstance(value, list | tuple) and not isinstance(value[0], dict)
        batch = name == "image" and isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 4
        if (several or batch) and len(value) > 1:
            given[name] = value[entry]
    alone = getattr(pipe, call.task)(**given)
    assert alone.texts[0] == result.texts[-1], f"{call}: the row alone says something else"
    if hasattr(result, "codes"):
        assert _same(alone.codes[0], result.codes[-1]), f"{call}: the row alone is another picture"


def walk(numbers: range, pipes: dict[str, Any], spaces: dict[str, Space]) -> tuple[int, int]:
    """Calls that gave a result, and those that gave a sentence."""
    done = 0
    for number in numbers:
        call = make_call(number, pipes, spaces)
        pipe = pipes[call.family]
        result = attempt(call, pipe)
        if result is None:
            continue
        done += 1
        check_result(call, pipe, result, spaces[call.family])
        watched = call.given.get("callback_on_step_end") is not None or call.given.get("num_candidates", 1) not in (
            1,
            None,
        )
        if number % 4 == 0 and not watched:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_alone(call, pipe, result)
    return done, len(numbers) - done


def test_calls_give_a_result_or_a_sentence(pipes, spaces):
    done, refused = walk(range(FAST), pipes, spaces)
    assert done > FAST / 4 and refused > FAST / 4


@pytest.mark.slow
def test_many_calls_give_a_result_or_a_sentence(pipes, spaces):
    done, refused = walk(range(FAST, FAST + SLOW), pipes, spaces)
    assert done > SLOW / 4 and refused > SLOW / 4
