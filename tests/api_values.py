"""Right and wrong values of every argument of every task, for the tests that try them in all combinations."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unidiff.decoding import CacheConfig, Guidance, ModalityDecoding, SamplerConfig
from unidiff.decoding.cache import NoCache

LONG = "a picture of a dog, a cat, an owl, a red fox, two cats and an owl above a fox on a hill"
Make = Callable[["Space"], Any]


@dataclass(frozen=True)
class Space:
    """What values are made for: a picture size in pixels, and a folder with files.

    Attributes:
        size: (height, width). folder: for pictures in files.
    """

    size: tuple[int, int]
    folder: Path
    pixels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(5)
        object.__setattr__(self, "pixels", rng.integers(0, 256, (*self.size, 3), dtype=np.uint8))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.picture.save(self.folder / "picture.png")
        self.picture.save(self.folder / "picture.webp", lossless=True)
        self.mask.save(self.folder / "mask.png")
        (self.folder / "words.png").write_text("no picture")
        (self.folder / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n")
        (self.folder / "cut.png").write_bytes((self.folder / "picture.png").read_bytes()[:60])

    @property
    def picture(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @property
    def white(self) -> np.ndarray:
        """bool `[H, W]`: the left third."""
        white = np.zeros(self.size, bool)
        white[:, : max(1, self.size[1] // 3)] = True
        return white

    @property
    def mask(self) -> Image.Image:
        return Image.fromarray(self.white.astype(np.uint8) * 255)

    def tensor(self) -> torch.Tensor:
        return torch.from_numpy(self.pixels).permute(2, 0, 1) / 255

    def encoded(self) -> bytes:
        buffer = io.BytesIO()
        self.picture.save(buffer, "PNG")
        return buffer.getvalue()

    def other(self) -> Image.Image:
        return Image.new("RGB", (self.size[1] + 2, self.size[0] + 4))


def _alpha(space: Space) -> Image.Image:
    picture = space.picture.convert("RGBA")
    picture.putalpha(77)
    return picture


def _nan(space: Space) -> np.ndarray:
    values = space.pixels / 255
    values[0, 0] = np.nan
    return values


NOT_TEXTS: list[Make] = [
    lambda s: 3,
    lambda s: True,
    lambda s: 2.5,
    lambda s: b"a dog",
    lambda s: "",
    lambda s: " \n",
    lambda s: [],
    lambda s: (),
    lambda s: ["a", None],
    lambda s: ["a", ["b"]],
    lambda s: ["a", ""],
    lambda s: ["a", 7],
    lambda s: {"a": 1},
    lambda s: {"a"},
    lambda s: object(),
    lambda s: np.array(["a", "b"]),
    lambda s: np.array("a"),
    lambda s: s.picture,
    lambda s: torch.zeros(3),
    lambda s: "a \ud800",
    lambda s: (word for word in ["a", "b"]),
    lambda s: s.folder,
    lambda s: len,
]
BAD_HOLES = [
    "<mask:x>",
    "<mask:0>",
    "<mask red",
    "a <mask:-1>",
    "<mask:1.5>",
    "<mask:>",
    "< mask >",
    "<MASK>",
    "[MASK]",
]
BAD_HOLES += ["a <mask:99999999999999>", "<mask/>", "<mask:2 >x<mask", "<Mask:2>", "</mask>", "<mask::2>", "<masked>"]
NOT_WHOLE: list[Make] = [
    *(lambda s, v=v: v for v in (0, -1, 2.5, True, False, "2", "", b"2", [2], (2,), {}, 10**8, 2**63, -(2**64))),
    *(lambda s, v=v: v for v in (float("nan"), float("inf"), 1j, np.array([2]), np.float64(2), object(), int)),
    lambda s: torch.tensor([2, 3]),
]
NOT_NUMBERS: list[Make] = [
    *(lambda s, v=v: v for v in (-1.0, True, "2", "", [2.0], {"a": 2}, float("nan"), float("inf"), 1j, 10**400)),
    *(lambda s, v=v: v for v in (np.array([2.0, 3.0]), object(), float, b"2", {3: 2.0})),
]
NOT_PICTURES: list[Make] = [
    lambda s: None,
    lambda s: 3,
    lambda s: True,
    lambda s: "nowhere.png",
    lambda s: "",
    lambda s: "a dog",
    lambda s: "a\0b",
    lambda s: "x" * 5000,
    lambda s: Path("nowhere"),
    lambda s: s.folder,
    lambda s: str(s.folder / "words.png"),
    lambda s: str(s.folder / "script.png"),
    lambda s: str(s.folder / "cut.png"),
    lambda s: str(s.folder / "words.png" / "below.png"),
    lambda s: "/dev/zero",
    lambda s: "ftp://example.org/a.png",
    lambda s: "http://[bad/a.png",
    lambda s: "http://127.0.0.1:9/a.png",
    lambda s: "file:///nowhere/a.png",
    lambda s: "data:image/png;base64,AAAA",
    lambda s: b"",
    lambda s: b"no picture",
    lambda s: s.encoded()[:70],
    lambda s: [],
    lambda s: [s.picture, None],
    lambda s: [s.picture, [s.picture]],
    lambda s: {"image": s.picture},
    lambda s: (p for p in [s.picture]),
    lambda s: s.other(),
    lambda s: [s.picture, s.other()],
    lambda s: Image.new("RGB", (0, 4)),
    lambda s: Image.new("F", s.size[::-1], 9.0),
    lambda s: np.zeros((0, 0, 3), np.uint8),
    lambda s: np.zeros((1, 1, *s.size, 3)),
    lambda s: np.zeros(s.size[0]),
    lambda s: s.pixels.astype(object),
    lambda s: s.pixels.astype(np.int64),
    lambda s: s.pixels.astype(np.float32),
    lambda s: s.pixels > 9,
    lambda s: s.pixels * 1j,
    lambda s: np.full((*s.size, 3), "red"),
    lambda s: np.full((*s.size, 3), np.datetime64("2020-01-01")),
    _nan,
    lambda s: np.full((*s.size, 3), np.inf),
    lambda s: np.zeros((*s.size, 2)),
    lambda s: torch.zeros(3, *s.size).to_sparse(),
    lambda s: torch.zeros(3, *s.size, device="meta"),
    lambda s: torch.zeros(3, *s.size, dtype=torch.complex64),
    lambda s: torch.zeros(3, *s.size, dtype=torch.long),
    lambda s: torch.zeros(3, *s.size, dtype=torch.bool),
    lambda s: torch.quantize_per_tensor(torch.zeros(3, *s.size), 0.1, 0, torch.quint8),
    lambda s: torch.zeros(*s.size),
    lambda s: torch.zeros(7, *s.size),
    lambda s: torch.zeros(1, 1, 3, *s.size),
    lambda s: torch.full((3, *s.size), float("nan")),
    lambda s: torch.zeros(2, 3, *s.size, device="meta"),
    lambda s: torch.zeros(0, 3, *s.size),
    lambda s: object(),
    lambda s: len,
    lambda s: Image,
]
PICTURES: list[Make] = [
    lambda s: s.picture,
    lambda s: [s.picture],
    lambda s: [s.picture, s.picture.rotate(180)],
    lambda s: (s.picture, s.pixels),
    lambda s: s.pixels,
    lambda s: s.pixels / 255,
    lambda s: (s.pixels / 255).astype(">f4"),
    lambda s: (s.pixels / 255).astype(np.float16),
    lambda s: s.pixels[..., :1],
    lambda s: s.pixels[:, ::-1],
    lambda s: np.stack([s.pixels, s.pixels]),
    lambda s: s.tensor(),
    lambda s: s.tensor().double().requires_grad_(),
    lambda s: s.tensor().to(torch.bfloat16),
    lambda s: torch.stack([s.tensor(), s.tensor()]),
    lambda s: str(s.folder / "picture.png"),
    lambda s: s.folder / "picture.webp",
    lambda s: (s.folder / "picture.png").resolve().as_uri(),
    lambda s: [s.folder / "picture.png", s.picture],
    lambda s: s.encoded(),
    _alpha,
    *(lambda s, mode=mode: s.picture.convert(mode) for mode in ("L", "LA", "P", "1", "CMYK", "RGBA", "YCbCr")),
    lambda s: Image.fromarray(s.pixels[..., 0].astype(np.uint16) * 257),
]
MASKS: list[Make] = [
    lambda s: s.mask,
    lambda s: s.white,
    lambda s: s.white.astype(np.uint8),
    lambda s: s.white.astype(np.uint8) * 255,
    lambda s: s.white.astype(np.int64),
    lambda s: s.white.astype(np.float32),
    lambda s: s.white.astype(np.uint16) * 65535,
    lambda s: s.white[None],
    lambda s: s.white[..., None],
    lambda s: torch.from_numpy(s.white),
    lambda s: torch.from_numpy(s.white)[None].float(),
    lambda s: torch.from_numpy(s.white).to(torch.uint8),
    lambda s: torch.from_numpy(s.white)[None, None].half(),
    lambda s: Image.fromarray(s.white.astype(np.uint8)),
    lambda s: Image.fromarray(s.white.astype(np.uint16) * 65535),
    lambda s: Image.fromarray(s.white.astype(np.float32)),
    lambda s: Image.fromarray(s.white.astype(np.int32)),
    lambda s: str(s.folder / "mask.png"),
    lambda s: s.folder / "mask.png",
    *(lambda s, mode=mode: s.mask.convert(mode) for mode in ("1", "RGB", "RGBA", "LA", "P", "CMYK", "I", "I;16")),
    lambda s: [s.mask],
]
NOT_MASKS: list[Make] = [
    lambda s: 3,
    lambda s: True,
    lambda s: "nowhere.png",
    lambda s: "",
    lambda s: str(s.folder / "script.png"),
    lambda s: [],
    lambda s: [None],
    lambda s: [[0, 1], [1, 0]],
    lambda s: {"mask": s.mask},
    lambda s: Image.new("L", (4, 4), 255),
    lambda s: np.zeros((4, 4), bool),
    lambda s: np.full(s.size, 3, np.uint8),
    lambda s: np.full(s.size, -1),
    lambda s: np.full(s.size, 99999),
    lambda s: np.full(s.size, 0.2),
    lambda s: np.full(s.size, 7.0),
    lambda s: np.full(s.size, np.nan),
    lambda s: s.white.astype(object),
    lambda s: s.white.astype(complex),
    lambda s: s.white.astype("U5"),
    lambda s: np.zeros((5, *s.size), bool),
    lambda s: np.zeros((1, 1, 1, *s.size), bool),
    lambda s: torch.zeros(s.size, device="meta"),
    lambda s: torch.zeros(s.size).to_sparse(),
    lambda s: torch.zeros(s.size, dtype=torch.complex64),
    lambda s: [s.mask, s.mask, s.mask, s.mask, s.mask, s.mask, s.mask],
]


def _stop(pipe: Any, step: int, t: float, tensors: dict[str, torch.Tensor]) -> bool:
    return step < 1


def _spoil(pipe: Any, step: int, t: float, tensors: dict[str, torch.Tensor]) -> None:
    for value in tensors.values():
        value.fill_(1)  # what a callback does to its tensors is its own affair


def _same(pipe: Any, step: int, t: float, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors


_FEW = SamplerConfig(ModalityDecoding(steps=2, rule="quota"), ModalityDecoding(steps=2, rule="quota"), Guidance(1.0))


def _values(*values: Any) -> list[Make]:
    """The same values for every pipeline."""
    return [lambda s, v=v: v for v in values]


OPTIONS: dict[str, tuple[list[Make], list[Make]]] = {
    "steps": (_values(None, 1, 2, 5, 64), NOT_WHOLE),
    "guidance_scale": (_values(None, 1.0, 2, 0.0, 3.5), [*NOT_NUMBERS, lambda s: 1e308]),
    "temperature": (_values(None, 0, 0.5, 1.0, 1e-300), NOT_NUMBERS),
    "sampler": (_values(None, _FEW), _values(5, "fast", {}, _FEW.image, SamplerConfig, True, [])),
    "cache": (
        _values(None, "none", "auto", "dual", CacheConfig("dual")),
        _values("huge", "", 5, True, [], {"policy": "huge"}, CacheConfig, object(), b"dual"),
    ),
    "policy": (_values(None, NoCache()), _values(5, "dual", NoCache, object(), True)),
    "block_length": (
        _values(None, 2, 64, {"text": 2}, {"text": 3, "image": 2}),
        [
            *NOT_WHOLE[:10],
            *NOT_WHOLE[12:],
            *_values({"words": 2}, {3: 2}, {"text": 2.5}, {"text": 2, 5: 1}, {"image": "2"}),
        ],
    ),
    "threshold": (
        _values(None, 0.5, 0, 1, {"text": 0.9}, {"image": 0.3}),
        _values("a", True, [0.5], float("nan"), 1j, {"words": 0.5}, {"text": "a"}, object(), {5: 1, "a": 2}),
    ),
    "generator": (
        [*_values(None, 0, 7, 2**62, -3), lambda s: torch.Generator().manual_seed(3)],
        [
            *_values("x", 2.5, True, 1j, [], {}, [1] * 77, ["x"], [None], [2**70], 2**63, -(2**70), b"7", object()),
            lambda s: torch.Generator,
            lambda s: (i for i in [1]),
            lambda s: np.random.default_rng(0),
            lambda s: torch.tensor([1]),
        ],
    ),
    "output_type": (
        _values("pil", "pt", "np", "codes", "latent"),
        _values("jpeg", "", None, 5, "PIL", b"pil", ["pil"], {}),
    ),
    "return_dict": (_values(True), _values("yes", 1, None, [], 0.0)),
    "callback_on_step_end": (_values(None, _stop, _spoil, _same), _values(5, "f", [], {}, True)),
    "callback_on_step_end_tensor_inputs": (
        _values(None, [], ["ids"], ("open", "confidence")),
        _values("ids", ["latents"], [["ids"]], 5, {"ids"}, True),
    ),
    "record_trajectory": (_values(False, True), _values("yes", 1, None, [], 0.0)),
    "guidance_hides": (_values(None, "given", "other", "text", "image"), _values("all", 5, "", [], b"text", True)),
    "num_candidates": (_values(None, 1, 2, 3), NOT_WHOLE),
    "rank_by": (_values("agreement", "text", "image", "both", "each"), _values("best", None, 5, [], b"text", True)),
    "graphs": (_values(False, True), _values("yes", 5, [], {})),
}
COUNTS = (_values(1, 2, 3), [*NOT_WHOLE, *_values(None)])
FLAGS = (_values(True, False), _values("yes", 1, 0, None, [], "", np.array([True, False])))
TEXTS = _values("a dog", "a", ["a dog", "a cat"], ("a fox",), ["a", "an owl", "two"])
HOLES = _values("a <mask>", "<mask>", ["a <mask:2>", "<mask> fox"], "<mask:3>", ("a<mask> dog",))
