"""`DataLosses`: what of a run's data could not be used, over all its processes and restarts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from unidiff.data.report import Skip, SkipReport
from unidiff.errors import read_json
from unidiff.files import replace_text
from unidiff.schema import check_value
from unidiff.train.data.shard_source import DocumentTokens, WeightedShards
from unidiff.train.data.source import TokenSource
from unidiff.train.run.distributed import Parallel

FILE = "skipped.json"


class DataLosses:
    """OUTPUT/skipped.json: `counts` by reason, and what they are made of.

    `encoding` is what the encoding of raw shards left out, as the token shards' manifests say (its first 1000 per reason by
    name); `reading` is every row or shard that was lost since, met while training. Every process meets its own part of the
    latter, and after a restart the same again: each counts once.

    Args:
        folder: OUTPUT.
        sources: of the run; token tables cannot lose rows and are left out.
    """

    def __init__(self, folder: Path, sources: Sequence[TokenSource | DocumentTokens | None]) -> None:
        self.path = folder / FILE
        self._shards = [s for s in sources if isinstance(s, WeightedShards)]
        self._met: set[Skip] = set()  # by any process, before a restart or since
        if self.path.is_file():
            entries = read_json(self.path, "a record of skipped data").get("reading")
            fix = f"{str(self.path)!r}: reading, which remembers what was skipped before (remove the file to forget it)"
            check_value(entries, list[list[str]], fix)
            for entry in entries:
                check_value(tuple(entry), tuple[str, str, str, str], fix)
            self._met = {Skip(*entry) for entry in entries}
        self._encoding = SkipReport()
        for report in {k: v for source in self._shards for k, v in source.encoding.items()}.values():
            self._encoding = self._encoding.merge(report)

    def counts(self) -> dict[str, int]:
        """Events by reason, as far as this process knows."""
        return dict(Counter(self._encoding.counts) + Counter(skip.reason for skip in self._met | self.met()))

    def line(self) -> str:
        """One line for a person; empty when nothing was left out."""
        counts = self.counts()
        listed = ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
        return f"skipped {sum(counts.values())} of the data ({listed}); see {self.path}" if counts else ""

    def save(self, parallel: Parallel) -> None:
        """Join what all processes met, all of which must call this; rank 0 writes."""
        own = json.dumps([astuple(skip) for skip in self.met()])
        self._met |= {Skip(*entry) for text in parallel.collect(own) for entry in json.loads(text)}
        if parallel.main:
            content: dict[str, Any] = {"counts": dict(sorted(self.counts().items()))}
            content |= {"encoding": self._encoding.state_dict(), "reading": sorted(astuple(s) for s in self._met)}
            replace_text(self.path, json.dumps(content, indent=1))

    def met(self) -> set[Skip]:
        """What this process could not read so far."""
        return {skip for source in self._shards for skips in source.report.examples.values() for skip in skips}
