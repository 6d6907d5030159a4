"""Row-level feature parity: compares served feature vectors with the offline point-in-time join, value by value.

The offline join is the reference. A difference above the tolerance, a value of another type, an unexpected value and a
missing field all count as mismatches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from reelway.pipelines.features.materialisation import materialised_at_s
from reelway.pipelines.features.point_in_time import join_view
from reelway.pipelines.features.training_rows import CATALOGUE_FILE, VIDEO_VIEWS, read_feature_file
from reelway.platform.contracts.feature_names import VIEWER_VIEWS, VIEWS
from reelway.platform.errors import ParityError
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.on_demand import hours_since_upload
from reelway.platform.features.vector_log import ServedVector, read_vectors
from reelway.platform.features.viewer_rows import AS_OF

TOLERANCE: Final = 1e-6
"""Maximum difference, relative, and absolute for values below 1. Float32 values survive JSON exactly; the tolerance
is for arithmetic.
"""
ABSENT: Final = "<absent>"


@dataclass(frozen=True)
class Mismatch:
    """One served value that differs from the offline join."""

    view: str
    feature: str
    entity: str  # "viewer 17", "video 4"
    request_id: int
    served: Any
    offline: Any
    release: str = ""

    def __str__(self) -> str:
        return (
            f"{self.view}.{self.feature} of {self.entity} (request {self.request_id}): "
            f"served {self.served!r}, offline {self.offline!r}"
        )


@dataclass
class ParityReport:
    """Result of a parity replay: compared values and mismatches."""

    vectors: int = 0
    values: int = 0
    mismatches: list[Mismatch] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    """Replayed viewer rows and video rows per release."""

    @property
    def by_feature(self) -> Counter[str]:
        """Mismatches per ``view.feature``."""
        return Counter(f"{m.view}.{m.feature}" for m in self.mismatches)

    def by_release(self, checked_at: float) -> dict[str, dict[str, Any]]:
        """Returns the findings of each release in the log, as the rollout's parity guardrail reads them."""
        findings = {}
        for release, rows in self.rows.items():
            mismatches = [miss for miss in self.mismatches if miss.release == release]
            detail = f"first: {mismatches[0]}" if mismatches else ""
            findings[release] = {
                "rows": rows,
                "mismatches": len(mismatches),
                "checked_at": checked_at,
                "detail": detail,
            }
        return findings

    def raise_if_bad(self) -> None:
        """Raises an error if parity does not hold.

        Raises:
            ParityError: if a value differs, or no values were compared.
        """
        if not self.values:
            raise ParityError("vector log: no served vectors to compare; send requests with the vector log on")
        if self.mismatches:
            worst = ", ".join(f"{name} ({count}x)" for name, count in self.by_feature.most_common(5))
            raise ParityError(
                f"{len(self.mismatches)} of {self.values} served values differ from the offline join: {worst}; "
                f"first: {self.mismatches[0]}"
            )


def replay(
    features_dir: Path,
    log_path: Path,
    tolerance: float = TOLERANCE,
    *,
    viewer_as_of_s: float | None = None,
    videos_as_of_s: float | None = None,
) -> ParityReport:
    """Compares every logged value with the offline join.

    The time of the join depends on the vector. If the vector states the time of its rows (in total or per view), that
    time is used. Otherwise the first known value is used:

    - viewer rows: ``viewer_as_of_s``, the online store's time, the request's time;
    - video rows: ``videos_as_of_s``, the request's time.

    Raises:
        FeatureError: if the run's views are not built.
        MalformedFileError: if the log is damaged.
    """
    vectors = list(read_vectors(log_path))
    report = ParityReport(vectors=len(vectors))
    if not vectors:
        return report
    for vector in vectors:
        report.rows[vector.release] += 1 + len(vector.videos)
    stored_s = viewer_as_of_s if viewer_as_of_s is not None else materialised_at_s(features_dir)
    viewer_us = np.array(
        [_first_time_us(v.viewer_as_of_s, stored_s, v.request_time_s) for v in vectors], dtype=np.int64
    )
    videos_us = np.array(
        [_first_time_us(v.videos_as_of_s, videos_as_of_s, v.request_time_s) for v in vectors], dtype=np.int64
    )
    _compare_viewers(report, features_dir, vectors, viewer_us, tolerance)
    _compare_videos(report, features_dir, vectors, videos_us, tolerance)
    return report


def _first_time_us(*choices_s: float | None) -> int:
    return round(next(choice for choice in choices_s if choice is not None) * 1e6)


def _compare_viewers(
    report: ParityReport, features_dir: Path, vectors: list[ServedVector], at_us: Any, tolerance: float
) -> None:
    store = open_feature_store(features_dir)
    viewer = np.array([vector.viewer_id for vector in vectors], dtype=np.int64)
    for view in VIEWER_VIEWS:
        stated_s = [v.viewer.get(AS_OF, {}).get(view) if v.viewer_as_of_s is None else None for v in vectors]
        moments = np.array([u if s is None else round(s * 1e6) for s, u in zip(stated_s, at_us, strict=True)], np.int64)
        rows = join_view(store, view, viewer, moments).to_pylist()
        for vector, offline in zip(vectors, rows, strict=True):
            entity = f"viewer {vector.viewer_id}"
            for name in VIEWS[view]:
                _compare(report, view, name, entity, vector, vector.viewer.get(name, ABSENT), offline[name], tolerance)


def _compare_videos(
    report: ParityReport, features_dir: Path, vectors: list[ServedVector], at_us: Any, tolerance: float
) -> None:
    store = open_feature_store(features_dir)
    owner = np.array([i for i, vector in enumerate(vectors) for _ in vector.videos], dtype=np.int64)
    if not len(owner):
        return
    served = [row for vector in vectors for row in vector.videos]
    video = np.array([row["video_id"] for row in served], dtype=np.int64)
    catalogue = read_feature_file(features_dir / CATALOGUE_FILE)
    creators = dict(zip(catalogue["video_id"].to_pylist(), catalogue["creator_id"].to_pylist(), strict=True))
    creator = np.array([creators.get(v, -1) for v in video.tolist()], dtype=np.int64)
    rows: list[dict[str, Any]] = [{} for _ in served]
    for view in VIDEO_VIEWS:
        entities = creator if view == "creator_statistics" else video
        for known, values in zip(rows, join_view(store, view, entities, at_us[owner]).to_pylist(), strict=True):
            known.update(values)
    for i, (row, offline) in enumerate(zip(served, rows, strict=True)):
        vector = vectors[owner[i]]
        for view, name, value in _video_values(offline, vector.request_time_s):
            if name in row:
                _compare(report, view, name, f"video {row['video_id']}", vector, row[name], value, tolerance)


def _video_values(offline: Mapping[str, Any], request_time_s: float) -> Iterator[tuple[str, str, Any]]:
    for view in VIDEO_VIEWS:
        for name in VIEWS[view]:
            yield view, name, offline[name]
    for name in ("visual", "audio", "text"):
        yield "video_content", f"has_{name}", float(offline[name] is not None)
    uploaded_s = offline["uploaded_at_s"]
    age = None
    if uploaded_s is not None:
        age = float(hours_since_upload(np.array([request_time_s]), np.array([uploaded_s]))[0])
    yield "request_context", "hours_since_upload", age


def _compare(
    report: ParityReport,
    view: str,
    feature: str,
    entity: str,
    vector: ServedVector,
    served: Any,
    offline: Any,
    tolerance: float,
) -> None:
    report.values += 1
    if not same_value(served, offline, tolerance):
        report.mismatches.append(Mismatch(view, feature, entity, vector.request_id, served, offline, vector.release))


def same_value(served: Any, offline: Any, tolerance: float = TOLERANCE) -> bool:
    """Returns whether two values have the same type and are equal within ``tolerance``. NaN equals None."""
    if _is_missing(served) or _is_missing(offline):
        return _is_missing(served) and _is_missing(offline)
    if isinstance(offline, list):
        return (
            isinstance(served, list)
            and len(served) == len(offline)
            and all(same_value(a, b, tolerance) for a, b in zip(served, offline, strict=True))
        )
    if _is_number(served) and _is_number(offline):
        return bool(abs(served - offline) <= tolerance * max(1.0, abs(offline)))
    return type(served) is type(offline) and bool(served == offline)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
