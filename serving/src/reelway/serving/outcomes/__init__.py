"""Joins outcomes to impressions and sums them per viewer, so that a rollout can be assessed from counters.

Impressions come from the routers in batches (``exposures``), outcomes from clients over HTTP (``outcomes_api``).
``OutcomeCollector`` counts both: per (rollout, arm, release, slice) the sufficient statistics of ``rollout.evidence``,
clustered by viewer, cumulative since the rollout began.

Every outcome gets one status. Statuses are checked in this order, counted in ``reelway_outcomes_received_total`` and
returned to the client:

- refused: the token is invalid, or the value does not fit the type. The other outcomes of the request are handled.
- ``outside``: the video was shown outside of any rollout. Such an outcome is counted on every delivery and has no other
  effect.
- ``late``: it arrived, or happened by its ``event_time``, more than 24 h (``OUTCOME_HORIZON_S``) after the impression.
  Both arms lose their late outcomes, so no arm gains.
- ``retired``: its rollout has ended. A rollout ends when ``retire`` is called, or when four others were shown more
  recently. Until then, outcomes of a release that was rolled back are counted and change no decision.
- ``duplicate``: an outcome of the same type was counted for the same impression. The first one stands, so a second
  ``watch`` changes nothing. The file remembers counted types until the outcome would be late anyway.
- ``counted``: it was added to the sums of its rollout, arm and slices, with the weight in its token.

The token alone identifies an outcome's impression, so an outcome may arrive before its impression is counted, after a
restart, or twenty hours later. The answer is sent when the outcomes are on disk. A client without an answer sends the
request again, and nothing is counted twice. The same holds for the routers' numbered batches.

If there is an event log, every outcome that is not refused is appended to it too, whatever its status. The answer waits
for both, and the stream processor computes features from all outcomes, in a rollout or not.

Viewer totals and counted types are on disk, so memory does not grow with the number of viewers. One process, and
therefore one replica, holds the file.
"""

from reelway.serving.outcomes.collector import OutcomeCollector
from reelway.serving.outcomes.event_log_writer import EventLogWriter
from reelway.serving.outcomes.exposures import ArmKey, ExposureBatch, ExposureBuffer, forward_exposures
from reelway.serving.outcomes.outcomes_api import build_outcomes_api

__all__ = [
    "ArmKey",
    "EventLogWriter",
    "ExposureBatch",
    "ExposureBuffer",
    "OutcomeCollector",
    "build_outcomes_api",
    "forward_exposures",
]
