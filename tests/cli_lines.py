"""Command lines with right and wrong values everywhere, by number."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

LONG = "a picture of a dog, a cat, an owl, a red fox, two cats and an owl above a fox on a hill"

TEXTS = (
    ["a dog"],
    ["a dog", "two cats"],
    ["an owl", "a", "a fox"],
    ["A FOX"],
    ["a dog\n"],
    ["-- a dog".replace("-- ", "")],
)
HOLES = ([], ["a <mask>"], ["<mask:2> dog", "a<mask>"])
NOT_TEXTS = ([""], [" "], ["a dog", ""], [LONG], ["a <mask:x>"], ["<mask:0>"], ["<mask red"], ["a", "a <mask>"])
NOT_TEXTS += (["a \udcff"], ["[MASK] a"], ["a <mask:999999999999>"], ["<MASK>"], ["a" * 20_000])
OUTS = (
    "o.png",
    "made/below/o.png",
    "**.png",
    "ü ö.webp",
    "[x].jpg",
    "a\nb.png",
    "o.JPG",
    "a.b.c.png",
    "%s.png",
    "{}.png",
)
OUTS += (
    "~.png",
    "'.png",
    "-x.png",
    "link.png",
    "old.png",
    " .png",
    "o .png",
    "$HOME.png",
    "*?.jpeg",
    "\\.png",
    "x" * 180 + ".png",
    "x.png/",
)
NOT_OUTS = ("x.gif", "x", "", ".", "..", ".png", "folder.png", "words.png/x.png", "locked.png", "loop.png", "full.png")
NOT_OUTS += (
    "x" * 300 + ".png",
    "/dev/full",
    "/dev/null",
    "/dev/full/x.png",
    "fifo.png",
    "o.svg",
    "o.PNG ",
)
NOT_OUTS += ("/proc/o.png", "/sys/o.png", "/nowhere\n/../proc/o.png", "x" * 240 + ".png")
PICTURES = (
    "in.png",
    "./in.png",
    "in.webp",
    "grey.png",
    "deep.png",
    "turned.jpg",
    "cmyk.jpg",
    "anim.gif",
    "in.bmp",
    "hard.png",
)
NOT_PICTURES = (
    "none.png",
    "",
    "folder.png",
    "words.png",
    "script.png",
    "cut.png",
    "huge.png",
    "/dev/zero",
    "fifo.png",
    "loop.png",
)
NOT_PICTURES += (
    "in.png/x.png",
    "ftp://x.org/a.png",
    "http://[bad",
    "data:image/png;base64,AA",
    "x" * 5000,
    "large.png",
    ".",
)
MASKS = ("mask.png", "mask01.png", "mask1.png", "maskrgba.png", "mask16.png")
NOT_MASKS = (*(p for p in NOT_PICTURES if p != "large.png"), "small.png", "dim.png")
WHOLE = ("0", "-1", "x", "1.5", "", "100000000", str(2**63), "nan", "1e3", "9" * 5000, "0x2", "True", "²")
NUMBER = ("-1", "x", "", "nan", "inf", "-inf", "1e308", "1e400", "1,5", "True", "0x2", "9" * 5000)


@dataclass(frozen=True)
class Flag:
    """Right and wrong values of an option; `None` is an option without a value."""

    right: tuple[str | None, ...]
    wrong: tuple[str, ...] = ()


DECODE = {
    "--seed": Flag(("0", "7", "-3", str(2**62)), ("x", "1.5", "", "nan", str(2**63), "-" + "9" * 40, "1e3")),
    "--steps": Flag(("1", "2", "7"), WHOLE),
    "--guidance": Flag(("1", "0", "2.5", "1e0"), NUMBER),
    "--temperature": Flag(("0", "1", "0.5", "1e-308"), tuple(v for v in NUMBER if v != "1e308")),
    "--cache": Flag(("none", "auto", "dual", "prefix", "interval"), ("huge", "", "Dual", "none,dual", "{}", "\udcff")),
    "--candidates": Flag(("1", "2"), WHOLE),
    "--model": Flag((), ("none", "", "words.png", "folder.png", "empty", ".", "broken", "loop.png", "a/b/c", "\udcff")),
    "--device": Flag(("cpu", "auto"), ("abacus", "meta", "cuda:99", "", "mps:7", "CPU!", "cpu cpu", "\udcff")),
    "--dtype": Flag(("float32", "bfloat16"), ("int4", "", "float", "torch.float32", "64", "int8", "complex64")),
}
DRAWN = {
    "-o": Flag(OUTS, NOT_OUTS),
    "--gif": Flag(
        ("o.gif", "made/o.gif", "**.gif"), ("o.png", "", "o", "folder.gif", "words.png/o.gif", "full.gif", "/dev/full")
    ),
    "--filmstrip": Flag(
        ("strip.png", "made/strip.webp"), ("o.gif", "", "folder.png", "full.png", "loop.png", "locked.png")
    ),
    "-n": Flag(("1", "2", "3"), WHOLE),
}
READ = {"--max-text-tokens": Flag(("1", "3", "9"), (*WHOLE[:2], *WHOLE[2:], "10")), "--resize": Flag((None,))}
UNKNOWN = ("--nope", "--step", "--out-file", "--gpu", "-x", "--guidance-scale", "--num")


@dataclass
class Line:
    """A command line: `spoiled` says what is wrong with it; `model`: it takes the tiny model."""

    words: list[str]
    spoiled: str | None = None
    model: bool = True
    outputs: set[str] = field(default_factory=set)


def options(rng: random.Random, line: Line, flags: dict[str, Flag], spoil: bool, share: float = 0.25) -> None:
    """Add some options, one of them wrong where asked for."""
    chosen = [name for name, flag in flags.items() if flag.right and rng.random() < share]
    bad = rng.choice([name for name, flag in flags.items() if flag.wrong]) if spoil else None
    for name in dict.fromkeys([*chosen, *([bad] if bad else [])]):
        value = rng.choice(flags[name].wrong if name == bad else flags[name].right)
        line.words += [name] if value is None else [f"{name}={value}" if name.startswith("--") else f"{name}{value}"]
        line.model = line.model and name != "--model"
    line.spoiled = f"{bad}" if bad else line.spoiled


def generate_line(rng: random.Random, spoil: bool) -> Line:
    known, where = rng.random() < 0.6, rng.random() if spoil else 1.0
    texts = rng.choice(NOT_TEXTS if where < 0.25 else TEXTS if known else HOLES)
    line = Line(["generate", *texts], "texts" if where < 0.25 else None)
    if 0.85 <= where < 1:
        return Line(["generate", "a dog", *rng.choice(CLASHES)], "two outputs in one file")
    options(rng, line, DRAWN | DECODE, 0.25 <= where < 0.85)
    if known and line.spoiled is None and rng.random() < 0.2:
        line.words += ["--negative", rng.choice(["", "two cats"]), "--guidance", "3"]
    return line


CLASHES = (
    ["-o", "o.png", "--filmstrip", "o.png"],
    ["-o", "o.png", "--filmstrip", "./o.png"],
    ["-o", "o.png", "--filmstrip", "O.png"],
    ["-o", "old.png", "--filmstrip", "link.png"],
    ["-o", "old.png", "--filmstrip", "hard-old.png"],
    ["-o", "o.png", "-n", "2", "--filmstrip", "o-1.png"],
    ["-o", "o.png", "-n", "2", "--filmstrip", "folder.png/../o-2.png"],
    ["-o", "made/o.png", "--filmstrip", "made/../made/o.png"],
    ["-o", "ü.png", "--filmstrip", "u\u0308.png"],
)


def caption_line(rng: random.Random, spoil: bool) -> Line:
    where = rng.random() if spoil else 1.0
    pictures = rng.choices(PICTURES, k=rng.randint(1, 3))
    line = Line(["caption", *pictures])
    if where < 0.4:
        line.words.insert(rng.randint(1, len(line.words)), rng.choice(NOT_PICTURES))
        line.spoiled = "pictures"
    options(rng, line, READ | DECODE, 0.4 <= where < 1)
    if "large.png" in line.words and "--resize" in line.words:
        line.words.remove("--resize")
    return line


def answer_line(rng: random.Random, spoil: bool) -> Line:
    where = rng.random() if spoil else 1.0
    questions = rng.choice((["what?"], ["what is it?", "a dog?"]))
    if where < 0.2:
        questions = rng.choice(([""], ["what?", " "], [LONG], ["a <mask>?"], ["a \udcff"]))
    picture = rng.choice(NOT_PICTURES if 0.2 <= where < 0.45 else PICTURES)
    line = Line(["answer", picture, *questions], "inputs" if where < 0.45 else None)
    options(rng, line, (DECODE if where < 0.45 else READ | DECODE), 0.45 <= where < 1)
    return line


def inpaint_line(rng: random.Random, spoil: bool) -> Line:
    where = rng.random() if spoil else 1.0
    line = Line(["inpaint", rng.choice(NOT_PICTURES if where < 0.2 else PICTURES)], "picture" if where < 0.2 else None)
    if 0.9 <= where < 1:
        over = rng.choice(("in.png", "./in.png", "folder.png/../in.png", "hard.png", "linked-in.png"))
        clash = rng.choice((["-o", over], ["--filmstrip", over], ["-o", "mask.png"], ["--filmstrip", "./mask.png"]))
        return Line(["inpaint", "in.png", "--mask", "mask.png", "--text", "a dog", *clash], "the input")
    masked = rng.random() < 0.7
    if 0.2 <= where < 0.4:
        line.words += ["--mask", rng.choice(NOT_MASKS)]
        line.spoiled = "mask"
    elif masked:
        line.words += ["--mask", rng.choice(MASKS)]
    if 0.4 <= where < 0.55:
        line.words += ["--text", rng.choice(["", " ", LONG, "<mask:x>", "a <mask", "\udcff", "[MASK]"])]
        line.spoiled = "text"
    elif not masked or rng.random() < 0.5:
        line.words += ["--text", rng.choice(["a <mask>", "<mask:2> dog"])]
    if rng.random() < 0.3:
        line.words.append("--paste-back")
    options(rng, line, DRAWN | DECODE, 0.55 <= where < 0.9)
    return line


REPORT = ("report.json", "other.json")
NOT_REPORT = ("none.json", "words.png", "", ".", "list.json", "in.png", "/dev/null", "fifo.png", "loop.png")
SOURCES = (
    "none",
    "",
    "words.png",
    "folder.png",
    "empty",
    "in.png",
    "broken",
    "loop.png",
    "/dev/null",
    "list.json",
    "a/b/c",
)


def other_line(rng: random.Random, spoil: bool) -> Line:
    """The commands around a model; those of evaluation and demo are only refused here, since they take minutes."""
    kind = rng.choice(("compare", "info", "pack", "convert", "verify", "profile-cache", "demo", "eval", "none"))
    line = Line([kind], model=False)
    if kind == "compare":
        both = [rng.choice(REPORT), rng.choice(REPORT)]
        target = rng.choice(("changes.json", "made/changes.json", "**.json"))
        if spoil:
            where = rng.randrange(3)
            if where < 2:
                both[where] = rng.choice(NOT_REPORT)
            else:
                target = rng.choice(
                    ("report.json", "o.txt", "", "folder.png", "./other.json", "/dev/full", "locked.json")
                )
                both = list(REPORT)
        line.words = ["eval", "compare", *both, *(["--json", target] if spoil or rng.random() < 0.5 else [])]
    elif kind == "info":
        line.words += [rng.choice(SOURCES)] if spoil else ["MODEL"]
        if spoil and rng.random() < 0.3:
            line.words = ["info", "MODEL-TRANSFORMER", "--family", rng.choice(("nope", "", "MMADA", "5"))]
    elif kind == "pack":
        parts = ["t", "i", "x", "packed"]
        flags = ["--text-length", "10", "--image-size", "24x16"]
        if spoil:
            where = rng.randrange(6)
            if where < 3:
                parts[where] = rng.choice((*SOURCES[:6], "i" if where != 1 else "t"))
            elif where == 3:
                parts[3] = rng.choice(
                    ("words.png", "in.png", "words.png/x", "full.png", "notes", "loop.png", "fifo.png")
                )
            else:
                flags[1 if where == 4 else 3] = rng.choice((*WHOLE, "24x", "x16", "24x16x3", "-24x16", "0", "7"))
                if flags[1] == "1e3":
                    flags[1] = "x"
        line.words += [*parts, *flags]
    elif kind in ("convert", "verify"):
        line.words += [rng.choice(SOURCES), *(["target"] if kind == "convert" else [])]
        spoil = True
    elif kind == "profile-cache":
        line.words += ["MODEL", "-o", "profile", "--steps", "3", "--prompt", "a dog", "--task", "text_to_image"]
        if spoil:
            line.words += rng.choice(_PROFILES)
    elif kind == "demo":
        line.words += [
            "--model",
            "MODEL",
            "-o",
            rng.choice(("words.png", "words.png/x", "demo", "fifo.png", "loop.png")),
        ]
        spoil = True  # its pictures are not square
    elif kind == "eval":
        line.words = ["eval", "emoji", "--model", "MODEL", *rng.choice(_EVALS)]
        spoil = True
    else:
        line.words = rng.choice(
            ([], ["paint"], ["--version"], ["eval"], ["eval", "paint"], ["generate", "--help"], ["-h"])
        )
        spoil = line.words not in (["generate", "--help"], ["-h"])
        if line.words in ([], ["eval"]):
            spoil = False
    line.spoiled = kind if spoil else None
    return line


_PROFILES = (
    ["-o", "words.png"], ["-o", "words.png/x"], ["-o", "full.png"], ["--steps", "0"], ["--steps", "x"], ["--steps", "1"],
    ["--steps", str(10**8)], ["--keep", "nan"], ["--keep", "2"], ["--task", "nope"], ["--task", ""], ["--prompt", ""],
    ["--prompt", LONG], ["--seed", str(2**63)], ["--device", "meta"], ["--dtype", "int4"],
)  # fmt: skip
_EVALS = (
    ["--n", "0"], ["--n", "100000000"], ["--per-task", str(2**63)], ["--per-task", "0"], ["--json", "o.txt"], ["--task", "x"],
    ["--outcomes"], ["--against", "none.json"], ["--against", "words.png"], ["--json", "report.json", "--against", "report.json"],
    ["--json", "words.png/o.json"], ["--json", ""], ["--candidates", "0"], ["--steps", "x"], ["--task", "second_reader"],
    ["--json", "hard-report.json", "--against", "report.json"],
)  # fmt: skip
MAKERS: tuple[Callable[[random.Random, bool], Line], ...] = (
    *[generate_line] * 3, *[caption_line] * 2, answer_line, *[inpaint_line] * 2, *[other_line] * 3
)  # fmt: skip


def make_line(number: int) -> Line:
    rng = random.Random(number)
    line = rng.choice(MAKERS)(rng, rng.random() < 0.65)
    if rng.random() < 0.03 and line.words:
        line.words.append(rng.choice(UNKNOWN))
        line.spoiled = line.spoiled or "unknown option"
    return line
