"""What every family's tasks share: a request that a family builds, the one sampler that fills it, and the result.

request = UniDiscRows(vocabulary, encode).text_to_image(["a red fox"])
result = run_task(model, vocabulary, request, seeds=[0])
result.codes[0][0]                                              # int64 [h, w], for the family's image tokenizer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff.decoding.cache import RefreshPolicy
from unidiff.decoding.config import SamplerConfig
from unidiff.decoding.sampler import Sampler, SamplerOutput
from unidiff.decoding.state import Callback
from unidiff.models.denoiser import Denoiser
from unidiff.models.image_spans import image_spans
from unidiff.tokens import Modality, TokenBatch, Vocabulary

Encode = Callable[[str], Sequence[int]]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class TaskRequest:
    """Rows of one task, ready for the sampler.

    Attributes:
        batch: what is given and what is to be decoded.
        config: the family's sampler settings for the task; `dataclasses.replace` for others.
        words: bool `[B, L]`, positions that the returned text is read from.
        unconditional: rows of the unconditional streams where hiding given tokens does not make them.
    """

    batch: TokenBatch
    config: SamplerConfig
    words: Tensor
    unconditional: tuple[TokenBatch, ...] = ()

    def to(self, device: torch.device | str) -> TaskRequest:
        others = tuple(rows.to(device) for rows in self.unconditional)
        return TaskRequest(self.batch.to(device), self.config, self.words.to(device), others)


@dataclass(frozen=True)
class TaskResult:
    """A finished task.

    Attributes:
        texts: per row, the ids of its text up to before its end.
        codes: per row, the codes int64 `[h, w]` of its pictures in order, given ones included.
        output: everything the sampler says.
    """

    texts: list[list[int]]
    codes: list[list[Tensor]]
    output: SamplerOutput


def run_task(
    model: Denoiser,
    vocabulary: Vocabulary,
    request: TaskRequest,
    seeds: Sequence[int] | Tensor,
    policy: RefreshPolicy | None = None,
    callback: Callback | None = None,
    record: bool = False,
) -> TaskResult:
    """Decode a request; a row's result depends on its own seed and tokens only.

    Args:
        model: the family's network; the rows go to its device where it has parameters.
        request: from the family's rows.
        seeds: one per row.
        policy, callback, record: see `Sampler`.

    Raises:
        ValueError: another number of seeds than rows, or nothing to decode.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.long)
    if seeds.shape != request.batch.ids.shape[:1]:
        raise ValueError(f"got {seeds.numel()} seeds for {len(request.batch.ids)} rows; give one per row")
    if not bool(request.batch.targets.any(1).all()):
        raise ValueError("a row has nothing to decode: its text and picture are known in full; hide a part of it")
    if isinstance(model, torch.nn.Module):
        device = next(model.parameters()).device
        request, seeds = request.to(device), seeds.to(device)
    sampler = Sampler(model, vocabulary, request.config, policy)
    others = request.unconditional or None
    output = sampler(request.batch, seeds, callback=callback, record=record, unconditional=others)
    ends = {i for i in (vocabulary.specials.get("eos"), *request.config.ends) if i is not None}
    return TaskResult(read_texts(output.batch, request.words, ends), read_codes(output.batch, vocabulary), output)


def read_texts(batch: TokenBatch, words: Tensor, ends: set[int]) -> list[list[int]]:
    """The ids at `words` `[B, L]` of every row, up to before the first id of `ends`."""
    texts = []
    for ids, chosen in zip(batch.ids, words, strict=True):
        row = ids[chosen].tolist()
        stop = next((place for place, i in enumerate(row) if i in ends), len(row))
        texts.append(row[:stop])
    return texts


def read_codes(batch: TokenBatch, vocabulary: Vocabulary) -> list[list[Tensor]]:
    """The pictures of every row as codes without offset, int64 `[h, w]` each, by their places in the batch."""
    image = batch.is_modality(Modality.IMAGE)
    number, _ = image_spans(batch.positions, batch.modality)
    samples = batch.sample_ids
    pictures: list[list[Tensor]] = []
    for row in range(len(batch.ids)):
        own = []
        for sample, k in torch.stack((samples[row], number[row]), -1)[image[row]].unique(dim=0).tolist():
            here = image[row] & (samples[row] == sample) & (number[row] == k)
            width = int(batch.positions[row, here, 2].max()) + 1
            own.append((batch.ids[row, here] - vocabulary.image[0]).unflatten(0, (-1, width)))
        pictures.append(own)
    return pictures


def prompt_ids(prompt: Prompt, encode: Encode | None) -> list[int]:
    """Ids of a prompt, which may be given as ids.

    Raises:
        ValueError: words without a tokenizer, or an empty prompt.
    """
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    if encode is None:
        raise ValueError("the prompt is a string but the rows have no tokenizer; pass encode=tokenizer.encode, or ids")
    if not prompt.strip():
        raise ValueError("the prompt is empty; write at least one word")
    return list(encode(prompt))


def image_ids(codes: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Codes int64 `[B, h, w]` to ids; `ValueError` for another shape or a code outside the codebook."""
    if codes.ndim != 3:
        raise ValueError(f"image codes have shape {tuple(codes.shape)}; expected [B, h, w]")
    if int(codes.min()) < 0 or int(codes.max()) >= vocabulary.image_size:
        raise ValueError(f"image codes must lie in [0, {vocabulary.image_size}); these reach {int(codes.max())}")
    return codes.long() + vocabulary.image[0]


def hide_codes(ids: Tensor, holes: Tensor | None, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Ids `[B, h, w]` with [MASK] at `holes` (bool of that shape), and what stays given; None hides nothing.

    Raises:
        ValueError: holes of another shape.
    """
    if holes is None:
        return ids, torch.ones_like(ids, dtype=torch.bool)
    if holes.shape != ids.shape or holes.dtype != torch.bool:
        raise ValueError(f"holes have shape {tuple(holes.shape)}, {holes.dtype}; expected bool {tuple(ids.shape)}")
    return torch.where(holes, vocabulary.image_mask, ids), ~holes


def text_targets(batch: TokenBatch) -> Tensor:
    """bool `[B, L]`: text positions to decode."""
    return batch.targets & (batch.modality == Modality.TEXT)
