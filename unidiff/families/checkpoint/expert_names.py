"""How checkpoints name the experts of a mixture: matrix by matrix, stacked by kind, or stacked with gate above up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

UP, DOWN = "blocks.{i}.feed_forward.experts.up", "blocks.{i}.feed_forward.experts.down"
ExpertLayout = Literal["apart", "stacked", "fused"]
_MARKS: dict[ExpertLayout, str] = {
    "stacked": r"\.mlp\.experts\.gate_proj$",
    "fused": r"\.mlp\.w1$",
}
EXPERT_KEYS = r"\.mlp\.(experts\.(0\.)?gate_proj(\.weight)?|w1)$"
"""What names of weights with experts match."""


def expert_layout(names: Iterable[str]) -> ExpertLayout:
    """In which of the layouts weights of these names have their experts."""
    names = list(names)
    return next((kind for kind, mark in _MARKS.items() if any(re.search(mark, n) for n in names)), "apart")


def expert_names(layout: ExpertLayout, count: int) -> dict[str, str]:
    """Names of the stacked experts of layers `model.layers.{i}`, for `KeyMap.of`.

    - apart: `experts.E.{gate,up,down}_proj.weight`, matrices of each expert.
    - stacked: `experts.{gate,up,down}_proj`, `[experts, ...]` of all.
    - fused: `w1`, `[experts, 2 width, size]` with gate above up, and `w2`.
    """
    mlp = "model.layers.{i}.mlp"
    if layout == "fused":
        return {UP: f"{mlp}.w1", DOWN: f"{mlp}.w2"}
    if layout == "stacked":
        return {UP: f"{mlp}.experts." + "{gate_proj,up_proj}", DOWN: f"{mlp}.experts.down_proj"}
    pairs = ",".join(f"{e}.gate_proj,{e}.up_proj" for e in range(count))
    downs = ",".join(f"{e}.down_proj" for e in range(count))
    down = f"{{{downs}}}" if count > 1 else downs
    return {UP: f"{mlp}.experts.{{{pairs}}}.weight", DOWN: f"{mlp}.experts.{down}.weight"}


def expert_dims(layout: ExpertLayout) -> Mapping[str, int]:
    """Along which dimension several of their weights are one of ours, for `KeyMap.of`."""
    return {UP: 1} if layout == "stacked" else {}
