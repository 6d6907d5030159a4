"""Compares served values with recomputed ones. The recomputed values are the reference.

A difference above the tolerance, a value of another type, an unexpected value and a missing field all count as
mismatches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from reelway.platform.errors import ParityError
from reelway.platform.features.vector_log import ServedVector

TOLERANCE: Final = 1e-6
"""Maximum difference, relative, and absolute for values below 1. Float32 values survive JSON exactly; the tolerance
is for arithmetic.
"""
ABSENT: Final = "<absent>"


@dataclass(frozen=True)
class Mismatch:
    """One served value that differs from the recomputed one."""

    view: str
    feature: str
    entity: str  # "viewer-3f9c0a1b2c3d", "video 4"
    request_id: int
    served: Any
    offline: Any
    release: str = ""

    def __str__(self) -> str:
        return (
            f"{self.view}.{self.feature} of {self.entity} (request {self.request_id}): "
            f"served {self.served!r}, offline {self.offline!r}"
        )


MAX_KEPT: Final = 1000
"""Mismatches that a report keeps; all are counted."""


@dataclass
class ParityReport:
    """Result of a parity replay: compared values and mismatches."""

    tolerance: float = TOLERANCE
    vectors: int = 0
    values: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    """The first ``MAX_KEPT``."""
    by_feature: Counter[str] = field(default_factory=Counter)
    """Mismatches per ``view.feature``."""
    rows: Counter[str] = field(default_factory=Counter)
    """Replayed viewer rows and video rows per release."""
    differing: Counter[str] = field(default_factory=Counter)
    """Mismatches per release."""
    first: dict[str, Mismatch] = field(default_factory=dict)
    """First mismatch of each release."""

    @property
    def mismatch_count(self) -> int:
        return self.by_feature.total()

    def compare(self, view: str, feature: str, entity: str, vector: ServedVector, served: Any, offline: Any) -> None:
        """Counts one value, and a mismatch if the values differ."""
        self.values += 1
        if not same_value(served, offline, self.tolerance):
            self.add(Mismatch(view, feature, entity, vector.request_id, served, offline, vector.release))

    def add(self, mismatch: Mismatch) -> None:
        self.by_feature[f"{mismatch.view}.{mismatch.feature}"] += 1
        self.differing[mismatch.release] += 1
        self.first.setdefault(mismatch.release, mismatch)
        if len(self.mismatches) < MAX_KEPT:
            self.mismatches.append(mismatch)

    def raise_if_bad(self) -> None:
        """Raises an error if parity does not hold.

        Raises:
            ParityError: if a value differs.
        """
        if self.mismatch_count:
            worst = ", ".join(f"{name} ({count}x)" for name, count in self.by_feature.most_common(5))
            raise ParityError(
                f"{self.mismatch_count} of {self.values} served values differ from the recomputed ones: {worst}; "
                f"first: {self.mismatches[0]}"
            )


def compare_row(
    report: ParityReport, view: str, names: tuple[str, ...], entity: str, vector: ServedVector,
    served: Mapping[str, Any], offline: Mapping[str, Any],
) -> None:  # fmt: skip
    """Compares the fields of one view."""
    for name in names:
        report.compare(view, name, entity, vector, served.get(name, ABSENT), offline[name])


def same_value(served: Any, offline: Any, tolerance: float = TOLERANCE) -> bool:
    """Returns whether two values have the same type and are equal within ``tolerance``. NaN equals None."""
    if type(served) is float and type(offline) is float and served == offline:
        return True  # nearly all values
    if is_missing(served) or is_missing(offline):
        return is_missing(served) and is_missing(offline)
    if isinstance(offline, list):
        return (
            isinstance(served, list)
            and len(served) == len(offline)
            and all(same_value(a, b, tolerance) for a, b in zip(served, offline, strict=True))
        )
    if _is_number(served) and _is_number(offline):
        return bool(abs(served - offline) <= tolerance * max(1.0, abs(offline)))
    return type(served) is type(offline) and bool(served == offline)


def is_missing(value: Any) -> bool:
    """Returns whether a value is None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
