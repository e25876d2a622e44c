"""`SkipReport`: what was left out of a data stream, why, and under which key. Nothing is skipped without an entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from unidiff.schema import from_data

# Shard-level reasons: the rest of the shard is lost, and how many samples it held is unknown. A changed shard is used.
MISSING_SHARD = "missing_shard"
UNREADABLE_SHARD = "unreadable_shard"
TRUNCATED_SHARD = "truncated_shard"
EMPTY_SHARD = "empty_shard"
CHANGED_SHARD = "changed_shard"
# Sample-level reasons.
MISSING_MEMBER = "missing_member"
DUPLICATE_MEMBER = "duplicate_member"
CORRUPT_IMAGE = "corrupt_image"
BAD_CAPTION = "bad_caption"
EMPTY_CAPTION = "empty_caption"
BAD_JSON = "bad_json"
BAD_ARRAY = "bad_array"


class Unusable(ValueError):
    """A shard or a member of a sample cannot be used; `reason` is one of the names above."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Skip:
    """One thing left out."""

    reason: str
    shard: str
    key: str  # of the sample, "" when a whole shard is meant
    detail: str

    def __str__(self) -> str:
        place = f"{self.shard} sample {self.key}" if self.key else self.shard
        return f"{self.reason}: {place} ({self.detail})"


@dataclass
class SkipReport:
    """Counts by reason, and the first `listed` events of each. A stream that repeats counts anew in every epoch.

    `ignored` counts members whose type is not on the allow-list, by extension; the sample itself was used.
    """

    listed: int = 1000
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[Skip]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, skip: Skip) -> None:
        self.counts[skip.reason] = self.counts.get(skip.reason, 0) + 1
        named = self.examples.setdefault(skip.reason, [])
        if len(named) < self.listed:
            named.append(skip)

    def ignore(self, extension: str) -> None:
        """Count a member of a type that is never decoded."""
        self.ignored[extension] = self.ignored.get(extension, 0) + 1

    def merge(self, other: SkipReport) -> SkipReport:
        """A new report with the events of both, this one's first."""
        counts, ignored = Counter(self.counts) + Counter(other.counts), Counter(self.ignored) + Counter(other.ignored)
        named = {r: (self.examples.get(r, []) + other.examples.get(r, []))[: self.listed] for r in counts}
        return SkipReport(self.listed, dict(counts), named, dict(ignored))

    def _counted(self) -> str:
        return ", ".join(f"{n} {r}" for r, n in sorted(self.counts.items()))

    def summary(self, shown: int = 3) -> str:
        """A few lines for a person: counts by reason, each with its first examples."""
        lines = [f"skipped {self.total}: {self._counted()}"] if self.counts else []
        for reason in sorted(self.counts):
            lines += [f"  {skip}" for skip in self.examples.get(reason, [])[:shown]]
            if self.counts[reason] > shown:
                lines.append(f"  {reason}: and {self.counts[reason] - shown} more")
        if self.ignored:
            types = ", ".join(f"{n} {e or 'without extension'}" for e, n in sorted(self.ignored.items()))
            lines.append(f"members of other types, never decoded: {types}")
        return "\n".join(lines) or "nothing was skipped"

    def brief(self) -> str:
        """One line: counts by reason and the first event, for error messages."""
        if not self.counts:
            return "nothing was skipped"
        first = next(iter(self.examples.get(min(self.counts), [])), "none that is named")
        return f"skipped {self.total} ({self._counted()}), for instance {first}"

    def state_dict(self) -> dict:
        """Plain data (JSON-able)."""
        examples = {r: [[s.shard, s.key, s.detail] for s in skips] for r, skips in self.examples.items()}
        return {"listed": self.listed, "counts": dict(self.counts), "examples": examples, "ignored": dict(self.ignored)}

    @classmethod
    def from_state_dict(cls, state: Mapping) -> SkipReport:
        """Inverse of `state_dict`. Raises ValueError for data of another form."""
        plain = from_data(_ReportState, state, "a report of what was skipped")
        examples = {r: [Skip(r, *entry) for entry in entries] for r, entries in plain.examples.items()}
        return cls(plain.listed, dict(plain.counts), examples, dict(plain.ignored))


@dataclass(frozen=True)
class _ReportState:
    listed: int
    counts: dict[str, int]
    examples: dict[str, list[tuple[str, str, str]]]
    ignored: dict[str, int]


def printable(name: str) -> str:
    """A file's name as text that can be printed and saved: bytes that are no UTF-8 become \\xe9 and the like."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
