"""The premise of every cache, measured: how little features change from pass to pass.

A decode without a cache is watched. For every pass, layer and segment of the rows:

- the cosine, in float32 over the full width, between a position's features in successive passes, for the keys K (after
  QK norm), the values V, and what attention and feed-forward add to the residual stream (as a `FeatureStore` keeps them);
- Pearson's correlation over the positions between the change of V (1 - cosine) and the change of either output: what the
  comparison of values in `AdaptiveCache` relies on (dLLM-Cache, arXiv 2506.06295, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from unidiff.charts import chart_picture
from unidiff.decoding import DecodeState, NoCache
from unidiff.decoding.cache.combined import SEGMENTS
from unidiff.decoding.cache.config import CacheConfig
from unidiff.evaluation.report import table_of
from unidiff.files import write_json
from unidiff.models.denoiser import CachePlan, DenoiserTraits
from unidiff.models.partial import cosine
from unidiff.models.transformer import MaskedTransformer
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.sheet import save_image
from unidiff.tokens import Modality

FEATURES = ("K", "V", "AttnOut", "FFNOut")
PAIRS = ("V with AttnOut", "V with FFNOut")
_FEWEST = 3  # positions that a correlation needs


@dataclass(frozen=True)
class TaskProfile:
    """What one task's decode showed; NaN where a segment has no (or for correlations too few) positions.

    Attributes:
        similarity: float32 `[4, segments, passes, layers]` by `FEATURES`, mean cosine with the pass before.
        correlation: float32 `[2, segments, passes, layers]` by `PAIRS`.
        moved: float32 `[segments, passes, layers]`, share of positions whose AttnOut has a cosine below `keep`.
        tokens: mean number of positions of each segment in a row.
        keep: cosine down to which a feature counts as unchanged.

    The first pass has nothing to be compared with and is not among the passes.
    """

    similarity: Tensor
    correlation: Tensor
    moved: Tensor
    tokens: dict[str, float]
    keep: float

    @property
    def segments(self) -> list[str]:
        """Those that have positions."""
        return [name for name, count in self.tokens.items() if count > 0]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data: per segment and feature, `[passes][layers]`, None for NaN."""
        data: dict[str, Any] = {}
        for name in self.segments:
            s = SEGMENTS.index(name)
            own = dict(zip(FEATURES, self.similarity[:, s], strict=True))  # [passes, layers] each
            pairs = dict(zip(PAIRS, self.correlation[:, s], strict=True))
            data[name] = {
                "tokens": self.tokens[name],
                "mean": {key: _known(float(values.nanmean())) for key, values in (own | pairs).items()},
                "similarity": {key: _listed(values) for key, values in own.items()},
                "correlation": {key: _listed(values) for key, values in pairs.items()},
                "moved": _listed(self.moved[s]),
            }
        return data


@dataclass
class Watcher(NoCache):
    """Watches a decode without a cache; give it to a pipeline as its policy, inside `watch`. `keep`: see `TaskProfile`."""

    keep: float = 0.95
    _now: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False, repr=False)
    _before: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False, repr=False)
    _passes: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, init=False, repr=False)
    _counts: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def start(self, batch: Any, model: Any) -> Watcher:
        # nothing in a request is compared with another one
        self._now, self._before = {}, {}
        return self

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        return replace(super().plan(state, candidates), every_row=True)

    def note(self, layer: int, name: str, feature: Tensor) -> None:
        """A feature `[streams x B, L, D]` of the running pass."""
        self._now[layer, name] = feature

    def observe(self, state: DecodeState, plan: CachePlan) -> None:
        """Compare the pass with the one before, in rows that took part."""
        rows = len(state.ids)
        now = {key: feature[:rows].float() for key, feature in self._now.items()}  # the conditional stream
        if self._before:
            where = segments_of(state) & state.users[0][None, :, None]  # [segments, B, L]
            self._passes.append(self._compare(now, where))
            self._counts.append(where.sum((1, 2)) / state.users[0].sum().clamp_min(1))
        self._before = now

    def _compare(self, now: dict[tuple[int, str], Tensor], where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Similarity `[4, segments, layers]`, correlation `[2, ...]` and moved share `[segments, layers]` of a pass."""
        layers = 1 + max(layer for layer, _ in now)
        similar, related, moved = [], [], []
        for layer in range(layers):
            own = torch.stack([cosine(now[layer, f], self._before[layer, f]) for f in FEATURES])  # [4, B, L]
            parts = [own[:, inside] for inside in where]  # [4, n] each
            similar.append(torch.stack([part.mean(1) for part in parts], 1))
            pairs = [torch.stack([pearson(1 - part[1], 1 - part[2 + i]) for i in range(2)]) for part in parts]
            related.append(torch.stack(pairs, 1))
            moved.append(torch.stack([(part[2] < self.keep).float().mean() for part in parts]))
        return torch.stack(similar, -1), torch.stack(related, -1), torch.stack(moved, -1)

    def profile(self) -> TaskProfile:
        """All passes so far. Raises `ValueError`: no decode of at least two passes was watched."""
        if not self._passes:
            raise ValueError("nothing was compared; a profile needs a decode of at least 2 passes")
        similarity, correlation, moved = (torch.stack(parts, -2).cpu() for parts in zip(*self._passes, strict=True))
        mean = torch.stack(self._counts).mean(0).tolist()
        return TaskProfile(similarity, correlation, moved, dict(zip(SEGMENTS, mean, strict=True)), self.keep)


@contextmanager
def watch(model: MaskedTransformer, watcher: Watcher) -> Iterator[Watcher]:
    """Inside the block, `watcher` is told the features of every pass of the model."""
    handles = []

    def listen(module: nn.Module, layer: int, names: Sequence[str], pick: Callable[[Tensor], Sequence[Tensor]]) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            for name, feature in zip(names, pick(output), strict=True):
                watcher.note(layer, name, feature)

        handles.append(module.register_forward_hook(hook))

    for layer, block in enumerate(model.blocks):
        attention: Any = block.attention
        kv = attention.num_kv_heads * attention.head_dim
        listen(attention.qkv, layer, ("K", "V"), partial(_keys_and_values, kv))
        if attention.qk_norm != "none":  # runs behind the projection and replaces what was noted of it
            listen(attention.k_norm, layer, ("K",), lambda x: (x.flatten(2),))
        listen(block.attention_out_norm or attention.out, layer, ("AttnOut",), lambda x: (x,))  # type: ignore[arg-type]
        listen(block.ffn_out_norm or block.feed_forward, layer, ("FFNOut",), lambda x: (x,))  # type: ignore[arg-type]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()


def _keys_and_values(width: int, projected: Tensor) -> Sequence[Tensor]:
    """The last two parts of a qkv projection `[B, L, ...]`, each `width` wide."""
    return projected[..., -2 * width :].split(width, -1)


def segments_of(state: DecodeState) -> Tensor:
    """bool `[segments, B, L]`, by `SEGMENTS`."""
    batch = state.batch
    image, prompt = batch.modality == Modality.IMAGE, batch.valid & batch.given
    return torch.stack([batch.targets & ~image, batch.targets & image, prompt & ~image, prompt & image])


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of two float vectors `[n]`; NaN where there are too few entries or one does not vary."""
    if a.numel() < _FEWEST:
        return torch.full((), torch.nan, device=a.device)
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].float()


def _known(value: float) -> float | None:
    return None if value != value else value


def _listed(values: Tensor) -> list[list[float | None]]:
    return [[_known(round(v, 6)) for v in line] for line in values.tolist()]


LONGEST = 100
"""Most passes that anything is kept without being computed again."""
LEAST_GAIN = 1.2
"""A cache that cannot save more than this is not worth its error."""
RELATED = 0.3
"""Correlation of the changes of V and AttnOut above which comparing values finds what has changed."""


class Advice(NamedTuple):
    """A cache, the speed-up that its FLOPs allow, and why."""

    cache: CacheConfig
    bound: float
    reason: str


def advise(profile: TaskProfile, traits: DenoiserTraits) -> Advice:
    """The adaptive cache with measured settings, or none where it cannot pay.

    The angle between a feature's directions in successive passes is at most added up from pass to pass, so features
    with a mean cosine c stay above `keep` for acos(keep) / acos(c) passes. That gives the two intervals, by the fastest
    feature of given and of generated tokens. The share to recompute in between is the share of generated positions
    that moved by more than that in one pass; where the changes of values and outputs do not go together, comparing
    values is no use, and nothing is compared.
    """
    prompt, answer = (_interval(profile, names) for names in (("text_prompt", "image_prompt"), ("text", "image")))
    related = _targets(profile, profile.correlation[PAIRS.index("V with AttnOut")])
    moved = _targets(profile, profile.moved)
    ratio = min(0.5, max(0.05, math.ceil(20 * moved) / 20)) if related >= RELATED else 0.0
    layer = traits.layers[0]
    tokens = profile.tokens
    given, made = tokens["text_prompt"] + tokens["image_prompt"], tokens["text"] + tokens["image"]
    checked = ratio + (1 - ratio) * layer.value / layer.token if ratio else 0.0
    share = (given / prompt + made / answer + made * (1 - 1 / answer) * checked) / (given + made)
    first = 1 / len(traits.layers)
    bound = 1 / (first + (1 - first) * share)
    why = (
        f"given tokens keep a cosine of {profile.keep} for {prompt} passes and generated ones for {answer}; "
        f"{moved:.0%} of the generated move further in one pass, and the changes of values and attention outputs "
        f"correlate by {related:.2f}; a row has {given + made:.0f} tokens"
    )
    if bound < LEAST_GAIN:
        return Advice(CacheConfig("none"), 1.0, f"{why}: adaptive at most {bound:.2f} times faster, which does not pay")
    options = {"prompt_interval": prompt, "response_interval": answer, "ratio": ratio}
    return Advice(CacheConfig("adaptive", options), bound, f"{why}: adaptive at most {bound:.2f} times faster")


def _interval(profile: TaskProfile, names: tuple[str, str]) -> int:
    """Passes that the fastest of the features of these segments can be kept; the longest where there are none."""
    found = [profile.similarity[:, SEGMENTS.index(name)] for name in names if name in profile.segments]
    cosines = [float(feature.nanmean()) for segment in found for feature in segment]
    angle = math.acos(min(1.0, max(-1.0, min(cosines, default=1.0))))
    return LONGEST if angle == 0 else max(1, min(LONGEST, int(math.acos(profile.keep) / angle)))


def _targets(profile: TaskProfile, values: torch.Tensor) -> float:
    """Mean of `[segments, passes, layers]` over the generated tokens; layer 0, whose values never change alone, apart."""
    later = values[..., 1:] if values.shape[-1] > 1 else values
    made = [name for name in ("text", "image") if name in profile.segments]
    means = {name: float(later[SEGMENTS.index(name)].nanmean()) for name in made}
    weights = {name: profile.tokens[name] for name, mean in means.items() if not math.isnan(mean)}
    return sum(means[name] * w for name, w in weights.items()) / sum(weights.values()) if weights else 0.0


TASKS = ("text_to_image", "caption", "inpaint")


def profile_pipeline(
    pipe: UniDiffPipeline,
    prompts: Sequence[str],
    tasks: Sequence[str] = TASKS,
    steps: int | None = None,
    seed: int = 0,
    keep: float = 0.95,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, TaskProfile]:
    """Draw the prompts, all in one batch, describe what was drawn, and repaint its left half.

    Args:
        tasks: some of `TASKS`. steps: passes; the pipeline's own settings for each task when None.
        keep: see `TaskProfile`.

    Raises:
        ValueError: an unknown task, a keep outside (0, 1), prompts that the pipeline cannot take, or a decode of one pass.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; expected some of {', '.join(TASKS)}")
    if not 0 < keep < 1:
        raise ValueError(f"keep is {keep}; expected a cosine between 0 and 1")
    options: dict[str, Any] = {"generator": list(range(seed, seed + len(prompts))), "steps": steps, "output_type": "pt"}
    profiles: dict[str, TaskProfile] = {}

    def watched(task: str, call: Callable[..., Any], *args: Any) -> Any:
        progress(task)
        with watch(pipe.transformer, Watcher(keep)) as watcher:
            out = call(*args, policy=watcher, **options)
        if task in tasks:
            profiles[task] = watcher.profile()
        return out

    pictures = watched("text_to_image", pipe.text_to_image, list(prompts)).images  # [B, 3, H, W]
    if "caption" in tasks:
        watched("caption", pipe.caption, pictures)
    if "inpaint" in tasks:
        half = torch.zeros(len(pictures), *pipe.image_size, dtype=torch.bool)
        half[..., : pipe.image_size[1] // 2] = True
        watched("inpaint", pipe.inpaint, list(pictures), list(half), list(prompts))
    return profiles


def write(folder: Path, model: str, traits: DenoiserTraits, profiles: dict[str, TaskProfile]) -> list[Path]:
    """`profile.json`, and a sheet of heat maps for every task and segment."""
    data: dict[str, Any] = {}
    files = [folder / "profile.json"]
    for task, profile in profiles.items():
        passes, layers = profile.similarity.shape[2:]
        data[task] = {"keep": profile.keep, "passes": passes + 1, "layers": layers, "segments": profile.to_dict()}
        cache, bound, reason = advise(profile, traits)
        data[task] |= {"recommended": cache.to_dict(), "bound": bound, "reason": reason}
        for segment in profile.segments:
            files.append(folder / f"{task}.{segment}.png")
            save_image(_sheet(profile, SEGMENTS.index(segment), f"{task}, {segment}"), files[-1])
    write_json(files[0], {"model": model, "tasks": data})
    return files


def summary(profiles: dict[str, TaskProfile], traits: DenoiserTraits) -> tuple[Table, dict[str, Advice]]:
    """Mean similarities and correlations of every task and segment, and the advice for each task."""
    title = "Mean cosine between successive passes; correlation of changes"
    table = table_of(title, "task", "segment", "tokens", *FEATURES, *PAIRS, left=2)
    for task, profile in profiles.items():
        for segment, numbers in profile.to_dict().items():
            mean = ["" if m is None else f"{m:.3f}" for m in numbers["mean"].values()]
            table.add_row(task, segment, f"{numbers['tokens']:.0f}", *mean)
    return table, {task: advise(profile, traits) for task, profile in profiles.items()}


def _sheet(profile: TaskProfile, segment: int, title: str) -> Image.Image:
    """Heat maps with layers down and passes across, two in a line."""
    least = lambda values: min(0.9, float(values.nan_to_num(0.9).min()))  # noqa: E731
    maps = {f"cosine of {n}": (v, least(v)) for n, v in zip(FEATURES, profile.similarity[:, segment], strict=True)}
    related = zip(PAIRS, profile.correlation[:, segment], strict=True)
    maps |= {f"correlation of changes, {name}": (values, -1.0) for name, values in related}
    return heat_maps({name: (values.T, low, 1.0) for name, (values, low) in maps.items()}, title)


def heat_maps(maps: Mapping[str, tuple[Tensor, float, float]], title: str) -> Image.Image:
    """Matrices `[layers, passes]` in colours between a lowest and a highest value, two in a line; NaN stays white.

    Raises:
        ValueError: values that are no matrix, or a lowest value that is not below the highest.
    """
    for values, low, high in maps.values():
        if values.ndim != 2 or not low < high:
            raise ValueError(f"a heat map needs a matrix and low < high; got {tuple(values.shape)}, {low} and {high}")
    rows = -(-len(maps) // 2)

    def draw(grid: Any) -> None:
        for own, (name, (values, low, high)) in zip(grid.flat, maps.items(), strict=False):
            drawn = own.imshow(values.double().numpy(), "inferno", vmin=low, vmax=high, aspect="auto")
            own.set_title(name, fontsize=10)
            own.figure.colorbar(drawn, ax=own)
        for own in grid.flat[len(maps) :]:
            own.set_axis_off()
        grid.flat[0].figure.suptitle(title)
        grid.flat[0].figure.supxlabel("pass")
        grid.flat[0].figure.supylabel("layer")

    return chart_picture(draw, 9, 2.4 * rows, (rows, 2))
