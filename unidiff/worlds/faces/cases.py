"""The cases of the evaluation of faces: prompts, pictures to describe, questions and holes, fixed by the seed."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from itertools import count

import torch
from torch import Tensor

from unidiff.worlds.asked import HoledCaption
from unidiff.worlds.faces.cells import DETAIL, FACTOR
from unidiff.worlds.faces.language import (
    FACETS,
    QUESTION_KINDS,
    Facts,
    choices,
    draw_caption,
    draw_question,
    facts_hold,
    parse_caption,
    phrases,
    worded,
)
from unidiff.worlds.faces.scenes import ATTRIBUTES, HELD_OUT, NONE, Face, FaceGenerator, Pair, default_layers

HOLES = ("hair", "eyes", "mouth", "beard", "glasses", "hat", "clothing")
"""Facets that have a place of their own."""


@dataclass(frozen=True)
class FacePrompt:
    """A prompt and what it states; `pair` is the held-out pair that it names, if it does."""

    prompt: str
    facts: Facts
    pair: Pair | None = None


@dataclass(frozen=True)
class FaceQuestion:
    """A question about the picture of a face and its one right answer."""

    kind: str
    face: Face
    question: str
    answer: str


@dataclass(frozen=True)
class FaceHole(HoledCaption):
    """A face whose one facet is hidden, in the picture (`facet` names the cells) and in its caption."""

    face: Face
    facet: str
    caption: str
    before: str
    name: str
    after: str


def task_seed(task: str, seed: int) -> int:
    """A generator seed of its own for each task, away from the small seeds that training uses."""
    return int.from_bytes(hashlib.sha256(f"faces eval|{task}|{seed}".encode()).digest()[:6], "big") | 1 << 48


def case_faces(task: str, n: int, seed: int, split: str = "train") -> list[Face]:
    """`n` faces of a task."""
    generator = FaceGenerator(task_seed(task, seed), split)
    return [generator.face(i) for i in range(n)]


def prompt_cases(n: int, seed: int) -> list[FacePrompt]:
    """Captions of the training split's distribution, about faces that training need not have seen."""
    prompts = [draw_caption(f, _rng("prompt", seed, i)) for i, f in enumerate(case_faces("prompt", n, seed))]
    return [FacePrompt(prompt, parse_caption(prompt) or {}) for prompt in prompts]


def held_out_cases(n: int, seed: int) -> list[FacePrompt]:
    """Captions that name both values of a held-out pair, the pairs in turn."""
    cases = []
    for i, face in enumerate(case_faces("held out", n, seed, "held_out")):
        pair, rng = HELD_OUT[i % len(HELD_OUT)], _rng("held out", seed, i)
        named = {facet for facet, names in FACETS.items() if {pair[0], pair[2]} & set(names)}
        prompt = worded(face, rng.choice([chosen for chosen in choices(face) if named <= set(chosen)]), rng)
        cases.append(FacePrompt(prompt, parse_caption(prompt) or {}, pair))
    return cases


def question_cases(n: int, seed: int) -> list[FaceQuestion]:
    """Questions of all kinds in turn; yes and no alternate within their kinds."""
    generator, fresh, cases = FaceGenerator(task_seed("answer", seed)), count(), []
    for i in range(n):
        kind, turn = QUESTION_KINDS[i % len(QUESTION_KINDS)], i // len(QUESTION_KINDS)
        while True:
            number = next(fresh)
            face = generator.face(number)
            question, answer = draw_question(face, generator.rng(number, "question"), kind)
            if answer not in ("yes", "no") or answer == ("yes", "no")[turn % 2]:
                break
        cases.append(FaceQuestion(kind, face, question, answer))
    return cases


def hole_cases(n: int, seed: int) -> list[FaceHole]:
    """Holes over one facet each, the facets in turn, whose words are hidden in the caption too."""
    cases = []
    for i, face in enumerate(case_faces("inpaint", n, seed)):
        facet, rng = HOLES[i % len(HOLES)], _rng("inpaint", seed, i)
        caption = worded(face, rng.choice([chosen for chosen in choices(face) if facet in chosen]), rng)
        name = max((p for p in phrases(facet, face) if f" {p}," in f"{caption},"), key=len)
        start = f"{caption},".index(f" {name},") + 1
        cases.append(FaceHole(face, facet, caption, caption[:start], name, caption[start + len(name) :]))
    return cases


@cache
def hole(facet: str) -> Tensor:
    """bool `[64, 64]`, True in the cells that some value of a facet touches."""
    cells = default_layers().touched(facet).unfold(0, DETAIL, DETAIL).unfold(1, DETAIL, DETAIL).flatten(2).any(-1)
    return cells.repeat_interleave(FACTOR, 0).repeat_interleave(FACTOR, 1)


def holes(cases: list[FaceHole]) -> Tensor:
    """bool `[n, 64, 64]`."""
    return torch.stack([hole(case.facet) for case in cases])


def wrong_captions(caption: str, face: Face, amount: int, rng: random.Random) -> list[str]:
    """Captions that differ from a true one in one phrase and do not hold for the face."""
    facts, found = parse_caption(caption) or {}, dict[str, None]()
    named = [facet for facet in FACETS if facet in facts]
    while len(found) < amount:
        facet = rng.choice(named)
        name = rng.choice([n for n in FACETS[facet] if n in facts])
        values = [v for v in ATTRIBUTES[name] if v not in (NONE, facts[name])]
        if facet == "hair" and face.hair == NONE:
            other = face.altered(hair=rng.choice(values), hair_colour=rng.choice(ATTRIBUTES["hair_colour"][1:]))
        else:
            other = face.altered(**{name: rng.choice(values)})
        said = next(p for p in phrases(facet, face) if f" {p}," in f"{caption},")
        changed = f"{caption},".replace(f" {said},", f" {rng.choice(phrases(facet, other))},", 1).removesuffix(",")
        if parse_caption(changed) is not None and not facts_hold(parse_caption(changed), face):
            found[changed] = None
    return list(found)


def _rng(task: str, seed: int, number: int) -> random.Random:
    return random.Random(f"faces|{task}|{seed}|{number}")
