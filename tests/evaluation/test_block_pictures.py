"""The benchmark of pictures that are drawn block after block: what it counts, and its table."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from unidiff.evaluation.benchmark.block_pictures import BlockPicture, measure_block_picture, picture_table


def test_every_way_makes_as_many_passes_and_the_exact_cache_computes_least(capsys):
    picture = BlockPicture(side=6, words=10, away=3, block=8, passes=4, layers=2)
    found = measure_block_picture(picture, torch.device("cpu"), 1)
    names = list(found)
    assert (names[0], names[-1]) == ("upstream", "block-causal")
    first, *pruned, exact = found.values()
    passes = {own.evaluations for own in found.values()}
    assert len(passes) == 1
    # the first block holds two words: its six codes take three passes
    assert first.tokens == 2 * (3 * 16 + 4 * (24 + 32 + 40 + 48)) and first.evaluations == 2 * (3 + 4 * 4)
    assert first.tokens > pruned[0].tokens > pruned[1].tokens > exact.tokens
    table = picture_table(picture, found, "a test")
    Console(width=110).print(table)
    out = capsys.readouterr().out
    assert "block-causal" in out and f"{exact.tokens:,}" in out and f"{first.tokens / exact.tokens:.1f}" in out


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="away is 9; expected no more than words, 4"):
        BlockPicture(words=4, away=9)
    with pytest.raises(ValueError, match="side is 0"):
        BlockPicture(side=0)
    with pytest.raises(ValueError, match="unknown way 'dual'; expected some of upstream"):
        measure_block_picture(BlockPicture(2, 4, 2, 4, 2, layers=1), torch.device("cpu"), 1, ("dual",))
