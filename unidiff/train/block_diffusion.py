"""Training rows of block diffusion (BD3-LM, Arriola et al. 2025, arXiv 2503.09573, section 3.1 and algorithm 1).

When a block is decoded, the blocks before it are finished. So every noisy block must learn from *clean* earlier blocks, all
in one pass: a row holds each sample twice, clean and noisy, and `Visibility` says what each copy sees. Each block has a time of its own. The loss is the sum of the blocks' NELBOs given the blocks before them, which bounds
-log p of the row more tightly than the joint NELBO with one time for all.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from unidiff.tokens import TokenBatch, Visibility
from unidiff.train.data.tasks import TaskBatch


def double_rows(micro: TaskBatch, block_length: int) -> TaskBatch:
    """`[B, L]` rows as `[B, 2 L]`: the clean tokens, all given, then the tokens that will be masked.

    Args:
        micro: with `rate` and `task` per token, `[B, L]`.
        block_length: positions per block, counted in each sample.
    """
    batch = micro.batch
    clean = batch.replace(given=torch.ones_like(batch.given))
    both = TokenBatch(**{name: torch.cat([value, getattr(batch, name)], 1) for name, value in vars(clean).items()})
    return replace(
        micro,
        batch=both,
        task=micro.task.repeat(1, 2),
        rate=micro.rate.repeat(1, 2),
        noise=torch.cat([torch.ones_like(micro.noise), micro.noise], 1),
        weight=torch.cat([torch.zeros_like(micro.weight), micro.weight], 1),
        visible=block_visibility(batch, block_length),
    )


def block_visibility(batch: TokenBatch, block_length: int) -> Visibility:
    """What the `[B, 2 L]` tokens of `double_rows` may see."""
    block = torch.div(batch.positions[..., 0], block_length, rounding_mode="floor")  # [B, L]
    sample = batch.sample_ids.masked_fill(~batch.valid, -1)
    clean = torch.zeros_like(batch.valid)
    return Visibility(sample.repeat(1, 2), block.repeat(1, 2), torch.cat([clean, ~clean], 1))
