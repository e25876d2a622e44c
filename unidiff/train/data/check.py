"""What raw shards hold, before anything is trained on them: counts, sizes, captions, words, and a sheet to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median

from PIL import Image

from unidiff.data.report import SkipReport
from unidiff.data.rows import qa_pairs
from unidiff.data.shards import ShardSource
from unidiff.pipelines.sheet import Cell, draw_sheet
from unidiff.tokens.text import TextTokenizer, unknown_words, words_of

SHOWN = 32  # pictures of a sheet
_LINE = 8


@dataclass
class DataCheck:
    """What was found. `tokens` counts those of captions, where a tokenizer was given."""

    shards: int
    skipped: SkipReport
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)
    words: list[int] = field(default_factory=list)  # of each caption
    tokens: list[int] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    questions: int = 0
    shown: list[Cell] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The findings for a person."""
        count = len(self.words)
        yield f"samples      {count} in {self.shards} shards, {self.questions} questions"
        if not count:
            yield self.skipped.summary()
            return
        listed = [f"{width} x {height}: {n}" for (height, width), n in self.sizes.most_common(5)]
        more = f" and {len(self.sizes) - 5} more sizes" if len(self.sizes) > 5 else ""
        yield f"sizes        {', '.join(listed)}{more} (width x height)"
        yield f"captions     {_spread(self.words)} words; {len(self.captions)} different ones"
        if self.tokens:
            yield f"tokens       {_spread(self.tokens)} per caption, task token and an end included"
        repeated = [f"{text[:60]!r} ({n} times)" for text, n in self.captions.most_common(3) if n > 1]
        if repeated:
            yield f"repeated     {', '.join(repeated)}"
        if self.unknown:
            shown = ", ".join(f"{word} ({n})" for word, n in self.unknown.most_common(10))
            yield f"unknown      {len(self.unknown)} words that the tokenizer was not made for: {shown}"
        yield self.skipped.summary()

    def sheet(self) -> Image.Image:
        """The first pictures with their captions."""
        return draw_sheet([self.shown[n : n + _LINE] for n in range(0, len(self.shown), _LINE)])


def check_shards(
    shards: str | Sequence[str],
    tokenizer: TextTokenizer | None = None,
    most: int | None = None,
    on_sample: Callable[[], None] | None = None,
) -> DataCheck:
    """Read raw shards as training does, up to `most` samples. Raises as `ShardSource` for shards that are not there."""
    source = ShardSource(shards, optional=("json",), announce=False)
    found = DataCheck(len(source.shards), SkipReport())
    for sample in islice(source, most):
        picture, text = sample["image"], sample["txt"].strip()  # uint8 [3, H, W]
        found.sizes[tuple(picture.shape[1:])] += 1
        found.words.append(len(words_of(text)))
        found.captions[text] += 1
        found.questions += len(qa_pairs(sample.get("json"))[0])
        if tokenizer is not None:
            found.tokens.append(len(tokenizer.encode(text)) + 2)
            found.unknown.update(unknown_words([text], tokenizer))
        if len(found.shown) < SHOWN:
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            found.shown.append(Cell((image,), text[:200], f"{image.width} x {image.height}"))
        if on_sample is not None:
            on_sample()
    found.skipped = source.report
    return found


def _spread(numbers: list[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}, in the middle {median(numbers):g}"
