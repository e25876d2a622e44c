"""The path of every task where pictures are latents: words by the sampler, pictures by flow matching, both in one loop."""

from __future__ import annotations

import time as wall
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unidiff.decoding import Guidance, NoCache, RefreshPolicy, Sampler, SamplerConfig, SamplerOutput
from unidiff.decoding.cache.config import choose_cache, no_cache
from unidiff.decoding.flow import FlowDraw, guided, row_normals
from unidiff.decoding.state import DecodeState
from unidiff.decoding.stats import DecodeStats
from unidiff.families.layout import DecodeRequest
from unidiff.models.denoiser import CachePlan
from unidiff.pipelines.decode import StepWatcher, TaskCall, check_rows, notes_of, pictures_of, row_seeds, settings_of
from unidiff.pipelines.options import DecodeOptions
from unidiff.pipelines.output import UniDiffOutput, trajectory_of
from unidiff.tokens import Modality
from unidiff.weights.model import HOOKS, bring


@torch.no_grad()
def decode_latents(pipe: Any, task: str, call: TaskCall, options: DecodeOptions) -> UniDiffOutput:
    """Decode the rows of a task; `ValueError` for nothing to decode, and for what does not go with the task."""
    inputs, layout, begun = call.inputs, pipe.layout, wall.perf_counter()
    # 1. rows of the task; what of them is to be written, and whether a picture is drawn
    request: DecodeRequest = getattr(layout, task)(inputs)
    drawn, written = request.batch.features is None, bool(request.batch.targets.any())
    if not drawn and not bool(request.batch.targets.any(1).all()):
        raise ValueError(
            "nothing is left to decode: text and picture are known in full; hide words with <mask> or paint a mask"
        )
    config, _ = settings_of(pipe, request, options)
    _refuse(layout.family, options, drawn, written)
    # 2. a seed for each row
    check_rows(inputs.count)
    seeds = row_seeds(options.generator, inputs.count, call.per_entry)
    if HOOKS & vars(pipe.transformer).keys():
        bring(pipe.transformer)
    request = request.repeated(1, pipe._execution_device)
    # 3. what a person should know
    notes = notes_of(pipe, task, call)
    # 4. words, the picture, or both
    pipe.interrupt = False
    run = _Run(pipe, request, config, options, seeds)
    flow = run.flow(inputs) if drawn else None
    out, choice = run.words(flow) if written else (None, no_cache())
    if flow is not None:
        batch = request.batch if out is None else out.batch
        latents = run.draw(flow, batch.ids).float().cpu()
    else:
        assert inputs.codes is not None, "words are about a picture that is given"
        latents = inputs.codes
    # 5. back to words and pixels
    done = request.finished(request.batch if out is None else out.batch, 1)
    text_ids, texts = done.read_words(pipe.texts, layout.vocabulary, inputs.texts, config.ends)
    codes = pipe.images.codes(latents).cpu() if hasattr(pipe.images, "codes") else latents
    trajectory = None if out is None or out.trajectory is None else out.trajectory
    sure = torch.ones(done.batch.shape) if out is None else out.confidence.cpu()
    return UniDiffOutput(
        images=pictures_of(
            pipe, call, codes if options.output_type == "codes" else latents, options.output_type, seeds
        ),
        texts=texts,
        codes=codes,
        text_ids=text_ids,
        ids=done.batch.ids,
        confidences=sure,
        nfe=run.evaluations,
        tokens_per_forward=torch.zeros(inputs.count).double() if out is None else out.tokens_per_forward.cpu(),
        seconds=wall.perf_counter() - begun,
        seeds=seeds,
        trajectory=None if trajectory is None else trajectory_of(pipe, done, trajectory, config.ends, seeds),
        stats=DecodeStats() if out is None else out.stats,
        cache=choice.config,
        cache_note=choice.note,
        notes=notes,
    )


def _refuse(family: str, options: DecodeOptions, drawn: bool, written: bool) -> None:
    """Raise `ValueError` for options that would do nothing."""
    if (options.num_candidates or 1) > 1:
        raise ValueError(
            f"num_candidates is {options.num_candidates}, but {family} does not rank its decodes; leave it out"
        )
    if not drawn:
        return
    no_steps = {"threshold": options.threshold, "block_length": options.block_length} if not written else {}
    others: dict[str, Any] = {"cache": None if options.cache == "none" else options.cache, "policy": options.policy}
    others |= {"record_trajectory": options.record_trajectory or None, "guidance_hides": options.guidance_hides}
    for name, value in {**no_steps, **others}.items():
        if value is not None:
            raise ValueError(f"{name} is for words; {family} draws pictures by flow matching, so leave it out")


class _EveryRow(NoCache):
    """Rows whose words are complete are computed as well: their pictures are not."""

    def plan(self, state: DecodeState, candidates: Tensor) -> CachePlan:
        return replace(super().plan(state, candidates), every_row=True)


@dataclass
class _Run:
    """One call: network, rows and settings."""

    pipe: Any
    request: DecodeRequest
    config: SamplerConfig
    options: DecodeOptions
    seeds: Tensor
    evaluations: int = 0  # of the network, for a row

    def flow(self, inputs: Any) -> FlowDraw:
        """Noise, where a picture is drawn."""
        layout, device = self.pipe.layout, self.request.batch.ids.device
        p, channels = self.pipe.transformer.config.patch_size, self.pipe.transformer.config.in_channels
        height, width = layout.grid if inputs.grid is None else inputs.grid
        if inputs.codes is not None:
            height, width = (side // p for side in inputs.codes.shape[2:])
        noise = row_normals(self.seeds, (channels, height * p, width * p)).to(device)
        known = holes = None
        if inputs.holes is not None:
            known = inputs.codes.to(device)
            holes = inputs.holes[:, None].to(device).repeat_interleave(p, 2).repeat_interleave(p, 3)
        return FlowDraw(layout.flow, noise, self.config.image.steps, known=known, holes=holes)

    def words(self, flow: FlowDraw | None) -> tuple[SamplerOutput, Any]:
        """Unmask the words, with one step of the picture in each pass where there is one; and the cache that was used."""
        layout, batch, options = self.pipe.layout, self.request.batch, self.options
        watcher_bar = self.pipe.progress_bar(total=int(batch.targets.sum()))
        with watcher_bar as bar:
            watcher = StepWatcher(self.pipe, bar, options, self.request)
            if flow is not None:
                config = replace(self.config, guidance=Guidance())
                model, choice = _Joint(self, flow), no_cache()
                policy: RefreshPolicy | None = _EveryRow()
            elif layout.compat is not None:
                out = layout.written(self.pipe.transformer, batch, self.config, self.seeds, options.record_trajectory)
                watcher.finish()
                self.evaluations += out.nfe
                return out, no_cache()
            else:
                config, model = self.config, layout.denoiser(self.pipe.transformer)
                plain = options.cache is options.policy is None
                choice = no_cache() if plain else choose_cache(options.cache, options.policy, batch, config, model)
                policy = choice.policy
            sampler = Sampler(model, layout.vocabulary, config, policy, graphs=options.graphs)
            seeds, condition = self.seeds.to(batch.ids.device), self.request.condition(config.guidance.hide)
            out = sampler(batch, seeds, condition, watcher, options.record_trajectory)
            watcher.finish()
        self.evaluations += out.nfe if flow is None else 0
        return out, choice

    def draw(self, flow: FlowDraw, ids: Tensor) -> Tensor:
        """The rest of the picture, with the words as they are."""
        features = self.read(ids)
        with self.pipe.progress_bar(total=flow.left) as bar:
            while flow.left:
                velocity = self.velocity(flow, features)[0]
                flow.stop(velocity) if self.pipe.interrupt else flow.advance(velocity)
                bar.update(1)
                self._tell(flow)
        return flow.latents

    def _tell(self, flow: FlowDraw) -> None:
        if self.options.callback_on_step_end is None:
            return
        tensors = {"latents": flow.latents.clone()}
        answer = self.options.callback_on_step_end(self.pipe, flow.done - 1, float(flow.sigma), tensors)
        if answer is False:
            self.pipe.interrupt = True

    def read(self, ids: Tensor) -> Tensor:
        """Features of the texts, behind those that guidance leads away from where it does."""
        away = self.request.unconditional
        both = torch.cat((away[0].ids, ids)) if self.scale != 1 and away else ids
        return self.pipe.layout.encoder(both)

    @property
    def scale(self) -> float:
        """Strength of the picture's guidance."""
        return self.config.guidance.full_scale(Modality.IMAGE)

    def velocity(self, flow: FlowDraw, features: Tensor) -> tuple[Tensor, Tensor]:
        """The guided velocity of the coming step, and features `[B, L, D]` of the words beside it."""
        rows, streams = len(flow.latents), len(features) // len(flow.latents)
        out = self.pipe.transformer(
            flow.latents.repeat(streams, 1, 1, 1).to(self.pipe.transformer.dtype), features, flow.time.repeat(streams)
        )
        self.evaluations += streams
        velocity = out.image.float()
        return (guided(velocity, self.scale) if streams > 1 else velocity), out.text[-rows:]


class _Joint:
    """A `Denoiser` for words beside a picture that is drawn in the same passes: every pass is a step of its flow.

    The time of the network is that of the picture; as many words are hidden as there is noise in it, as training with
    `generate` has it.
    """

    def __init__(self, run: _Run, flow: FlowDraw) -> None:
        self.run, self.flow = run, flow

    def hidden(
        self,
        ids: Tensor,
        modality: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """See `Denoiser.hidden`; rows are texts alone."""
        features = self.run.read(ids)
        velocity, words = self.run.velocity(self.flow, features)
        if self.flow.left > 1:
            self.flow.advance(velocity)
        return F.pad(words, (0, 0, 0, ids.shape[1] - words.shape[1]))

    def head(self, hidden: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Denoiser.head`."""
        return self.run.pipe.transformer.text_head(hidden, start, stop)
