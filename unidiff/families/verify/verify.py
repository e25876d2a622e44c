"""`verify`: is this checkpoint the published one, and does it compute?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unidiff.families.checkpoint.describe import plain_settings
from unidiff.families.checkpoint.load import load_released
from unidiff.families.family import Family
from unidiff.families.verify.published import closest_release
from unidiff.families.verify.smoke import agrees, answer, known_answer


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, whether it holds, and the details."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        family: name. release: the closest published model; None where nothing of the family is published.
        checks: all findings.
    """

    family: str
    release: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(
    name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **options: Any
) -> Verification:
    """Load a checkpoint completely, compare it with its family's published values, and let it compute.

    1. Every weight is there, in shape and finite (loading raises otherwise).
    2. Its settings and id layout are those of the closest published model.
    3. Its number of parameters is the stated one.
    4. The family's arithmetic on this machine gives the recorded numbers of a tiny model (`Family.tiny`).
    5. One small pass of the checkpoint itself is finite and not constant.

    Args:
        name, dtype, device, options: as in `load_released`.

    Raises:
        FileNotFoundError, ValueError: as `load_released`.
    """
    released = load_released(name, dtype, device, **options)
    count = sum(p.numel() for p in released.model.parameters())
    checks = [Check("weights", True, f"{count:,} parameters, all there and finite")]
    found = closest_release(released.family, plain_settings(released.model), released.vocabulary)
    if found is not None:
        release, differences = found
        shown = "; ".join(str(d) for d in differences[:5]) + ("; ..." if len(differences) > 5 else "")
        detail = f"as {release.name}" if not differences else f"{len(differences)} differ from {release.name}: {shown}"
        checks.append(Check("published settings", not differences, detail))
        if release.parameters is not None:
            off = abs(count - release.parameters) / release.parameters
            detail = f"{count:,} here, {release.parameters:,} stated"
            checks.append(Check("number of parameters", off <= release.tolerance, detail))
    checks.append(_known(released.family))
    values = answer(released.model if released.images is None else released.images, released.vocabulary)
    alive = bool(torch.isfinite(values).all()) and float(values.std()) > 0
    detail = f"{values.numel()} values, mean {float(values.mean()):.4g}, deviation {float(values.std()):.4g}"
    checks.append(Check("a pass of this checkpoint", alive, detail))
    return Verification(released.family.name, None if found is None else found[0].name, tuple(checks))


def _known(family: Family) -> Check:
    expected, found = family.tiny.answer, known_answer(family)
    detail = "a tiny model answers as recorded"
    if not agrees(found, expected):
        detail = f"a tiny model answers {found}, recorded {expected}; the arithmetic here differs"
    return Check("known answer", agrees(found, expected), detail)
