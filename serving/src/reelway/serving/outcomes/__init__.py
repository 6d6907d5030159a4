"""Records what was shown and what viewers did, and sums it per viewer, so that a rollout can be assessed from counters.

::

    router ─ ExposureWriter ──────────────► exposures ─┐
    router ─ OutcomeIntake, EventLogWriter ► outcomes ─┴─ OutcomeCollector ─► GET /v1/outcomes/metrics

Every router appends to the event log. One ``OutcomeCollector`` follows the log and keeps, per (rollout, arm, release,
slice), the sufficient statistics of ``rollout.evidence``, clustered by viewer, cumulative since the rollout began. Its
position in the log is part of the same transaction, so each event is counted once. All times are the log's, so the sums
do not depend on when the log is read.

Every outcome in the log gets one status, counted in ``reelway_outcomes_received_total``. Statuses are checked in this
order:

- ``outside``: the video was shown outside of any rollout. Such an outcome is counted on every delivery and has no other
  effect.
- ``unauthenticated``: its viewer did not prove its identity, and the service requires it. Its slates are not counted
  either.
- ``late``: it was logged, or happened by its ``event_time``, more than 24 h (``OUTCOME_HORIZON_S``) after the
  impression. Both arms lose their late outcomes, so no arm gains.
- ``future``: it happened, or its video was shown, more than 5 minutes after it was logged.
- ``early``: it happened more than 5 minutes before its impression.
- ``retired``: its rollout has ended. A rollout ends when four others were shown more recently. Until then, outcomes of
  a release that was rolled back are counted and change no decision.
- ``duplicate``: an outcome of the same type was counted for the same impression. The first one stands, so a second
  ``watch`` changes nothing. The file remembers counted types until the outcome would be late anyway.
- ``contradicting``: a skip after a long watch of the same impression was counted, or the reverse.
- ``counted``: it was added to the totals of its viewer, with the weight in its token and within the bounds of
  ``viewer_sums``, which also decides whether the viewer is evidence.

An outcome with an invalid token, or a value that does not fit the type, is refused by the router and not logged. The
token alone identifies an outcome's impression, so an outcome may be read before its slate. The router answers when the
outcomes are in the log. A client without an answer sends the request again, and nothing is counted twice. The same
holds for slates, which are recognised by their request id.

Viewer totals and counted types are on disk, so memory does not grow with the number of viewers.
"""

from reelway.serving.outcomes.collector import OutcomeCollector
from reelway.serving.outcomes.event_log_writer import EventLogWriter
from reelway.serving.outcomes.exposure_writer import ExposureWriter
from reelway.serving.outcomes.exposures import ArmKey, SlateExposure
from reelway.serving.outcomes.outcome_intake import OutcomeIntake
from reelway.serving.outcomes.outcomes_api import build_outcomes_api

__all__ = [
    "ArmKey",
    "EventLogWriter",
    "ExposureWriter",
    "OutcomeCollector",
    "OutcomeIntake",
    "SlateExposure",
    "build_outcomes_api",
]
