"""Outcomes joined to their impressions and summed per viewer, so that a rollout can be judged from counters.

Impressions come from the routers in batches (``exposures``), outcomes from clients over HTTP (``outcomes_api``). Both
end in ``OutcomeCollector``: per (rollout, arm, release, slice) the sufficient statistics that ``rollout.evidence``
wants, with the viewer as the cluster, cumulative from the rollout's beginning.

What becomes of an outcome is looked at in this order; each is counted in ``reelway_outcomes_received_total`` and
answered by name:

- refused: its token is not ours, or its value makes no sense for its type. The other outcomes of the request go on.
- ``outside``: the video was shown outside of any rollout. There is nothing to compare; it is counted, as often as it
  is sent, and that is all.
- ``late``: it arrived, or by its ``event_time`` was done, more than 24 h (``OUTCOME_HORIZON_S``) after the video was
  shown. The other arm's late ones are not counted either, so leaving them out favours nobody.
- ``retired``: its rollout has ended: the collector was told so (``retire``), or four others were shown more recently.
  Outcomes of a release that was rolled back go on counting for its rollout until then; they change no decision.
- ``duplicate``: the same type for the same impression was counted before. The first one stands, so a second ``watch``
  changes nothing, whatever its value. Remembered on disk until it would be late anyway.
- ``counted``: it entered the sums of its rollout, arm and slices, at the weight that its token carries.

An outcome joins by its token alone, so it may arrive before its impression is counted, at any replica's restart, or
twenty hours later. An answer is sent when its outcomes are on disk. A client that got none sends the same request
again and nothing is counted twice. The same holds for the routers' batches, which are numbered.

Where there is an event log, every outcome that is not refused is appended to it as well, whatever becomes of it here,
and the answer waits for both: the stream processor makes features of all of them, of rollouts or not.

Viewers' totals and what was counted before are on disk, so memory does not grow with viewers. The file belongs to one
process at a time: one replica. Nothing here knows Ray.
"""

from reelway.serving.outcomes.appender import OutcomeAppender
from reelway.serving.outcomes.collector import OutcomeCollector
from reelway.serving.outcomes.exposures import ExposedArm, ExposureBatch, ExposureBuffer, forward_exposures
from reelway.serving.outcomes.outcomes_api import build_outcomes_api

__all__ = [
    "ExposedArm",
    "ExposureBatch",
    "ExposureBuffer",
    "OutcomeAppender",
    "OutcomeCollector",
    "build_outcomes_api",
    "forward_exposures",
]
