"""Reads reported outcomes into columns: checks tokens, and the value of each outcome type.

Whether an outcome counts depends on the log's time and on rollouts, and is decided by ``ledger``.
"""

# Shapes: N outcomes

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.api import RefusedOutcome, ReportedOutcome
from reelway.platform.contracts.events import OUTCOME_HORIZON_S, OutcomeType
from reelway.platform.errors import TokenError
from reelway.platform.eventlog.outcome_events import OUTCOME_TYPES
from reelway.platform.tokens import TokenSigner
from reelway.serving.outcomes.exposures import ArmKey

_KIND_CODES: Final = {kind: code for code, kind in enumerate(OUTCOME_TYPES)}
_WATCH: Final = _KIND_CODES[OutcomeType.WATCH]


@dataclass(frozen=True, slots=True)
class OutcomeColumns:
    """Outcomes with valid tokens, in the order of the report."""

    arms: tuple[ArmKey, ...]
    arm: NDArray[np.int64]  # index into arms
    sources: tuple[str, ...]
    source: NDArray[np.int64]  # index into sources
    impression_id: NDArray[np.int64]
    request_id: NDArray[np.int64]
    viewer_id: NDArray[np.int64]
    video_id: NDArray[np.int64]
    position: NDArray[np.int64]
    propensity: NDArray[np.float64]
    issued_at: NDArray[np.float64]  # Unix seconds
    done_at: NDArray[np.float64]  # the client's event_time; -inf if it gave none
    weight: NDArray[np.float64]
    slices: NDArray[np.uint8]
    duration_ms: NDArray[np.int64]  # 0 if unknown
    creator_id: NDArray[np.int64]  # -1 if unknown
    topic: NDArray[np.int64]  # -1 if unknown
    kind: NDArray[np.int64]  # index into OUTCOME_TYPES
    value: NDArray[np.float64]
    authenticated: NDArray[np.bool_]  # whether the viewer that reports proved its identity

    def __len__(self) -> int:
        return len(self.arm)

    def rows_of_type(self, kind: OutcomeType) -> NDArray[np.int64]:
        """Returns the indices of the outcomes of one type."""
        return np.flatnonzero(self.kind == _KIND_CODES[kind])

    @property
    def watched_to_the_end(self) -> NDArray[np.int64]:
        """Indices of the watches that lasted as long as their video, whose length is known."""
        ended = (self.kind == _WATCH) & (self.duration_ms > 0) & (self.value >= self.duration_ms)
        return np.flatnonzero(ended)


def read_outcomes(
    reported: Sequence[ReportedOutcome],
    signer: TokenSigner,
    proven_viewer: int | None = None,
    *,
    received_at_s: float = -math.inf,
) -> tuple[OutcomeColumns, list[RefusedOutcome]]:
    """Returns the outcomes that can be counted, and why the others cannot.

    Args:
        proven_viewer: the viewer that reports them. An outcome of another viewer's impression is refused.
        received_at_s: Unix seconds. An outcome is late ``OUTCOME_HORIZON_S`` after its impression, and nothing reads
            late outcomes from the log.
    """
    arms: dict[ArmKey, int] = {}
    sources: dict[str, int] = {}
    rows: list[tuple[float, ...]] = []
    refused: list[RefusedOutcome] = []
    for index, report in enumerate(reported):
        try:
            (
                impression, request, viewer, video, position, release, arm, source, propensity, issued_at_s,
                rollout, weight, slices, duration_ms, creator, topic,
            ) = signer.read(report.token)  # fmt: skip
        except TokenError as error:
            refused.append(RefusedOutcome(index=index, message=str(error)))
            continue
        if proven_viewer is not None and viewer != proven_viewer:
            message = "impression token: issued to another viewer; report outcomes as the viewer that the slate was for"
            refused.append(RefusedOutcome(index=index, message=message))
            continue
        done_at = report.event_time.timestamp() if report.event_time else -np.inf
        if max(received_at_s, done_at) > issued_at_s + OUTCOME_HORIZON_S:
            message = f"late: more than {OUTCOME_HORIZON_S // 3600} hours after the impression; do not send it again"
            refused.append(RefusedOutcome(index=index, message=message))
            continue
        kind, value = _KIND_CODES[report.type], report.value
        if kind == _WATCH:
            if value is None:
                message = "watch: it has no value; send the watched milliseconds"
                refused.append(RefusedOutcome(index=index, message=message))
                continue
        elif value is not None and value != 1:
            message = f"{report.type}: value {value:g}, expected 1; leave the value out"
            refused.append(RefusedOutcome(index=index, message=message))
            continue
        code = arms.setdefault(ArmKey(rollout, arm, release), len(arms))
        rows.append(
            (
                code, sources.setdefault(source, len(sources)), impression, request, viewer, video, position,
                propensity, issued_at_s, done_at, weight, slices, duration_ms, creator, topic, kind,
                1.0 if value is None else value,
            )
        )  # fmt: skip
    return _columns(tuple(arms), tuple(sources), rows, authenticated=proven_viewer is not None), refused


def _columns(
    arms: tuple[ArmKey, ...], sources: tuple[str, ...], rows: Sequence[tuple[float, ...]], *, authenticated: bool
) -> OutcomeColumns:
    (
        code, source, impression, request, viewer, video, position, propensity,
        issued, done, weight, slices, duration, creator, topic, kind, value,
    ) = zip(*rows, strict=True) if rows else ((),) * 17  # fmt: skip
    return OutcomeColumns(
        arms,
        arm=np.array(code, np.int64),
        sources=sources,
        source=np.array(source, np.int64),
        impression_id=np.array(impression, np.int64),
        request_id=np.array(request, np.int64),
        viewer_id=np.array(viewer, np.int64),
        video_id=np.array(video, np.int64),
        position=np.array(position, np.int64),
        propensity=np.array(propensity, np.float64),
        issued_at=np.array(issued, np.float64),
        done_at=np.array(done, np.float64),
        weight=np.array(weight, np.float64),
        slices=np.array(slices, np.uint8),
        duration_ms=np.array(duration, np.int64),
        creator_id=np.array(creator, np.int64),
        topic=np.array(topic, np.int64),
        kind=np.array(kind, np.int64),
        value=np.array(value, np.float64),
        authenticated=np.full(len(rows), authenticated),
    )
