"""Constants of the simulated world, each with its source or reason.

The constants are frozen: a change of one makes figures of the closed loop incomparable, so the change reports the
figures of both. "Set by hand" marks a constant that no public measurement supports. Weights are in logits of the
probability of enjoyment.
"""

from __future__ import annotations

from typing import Final

from reelway.pipelines.simulation.config import DAY_S

WORLD_VERSION: Final = 2
"""Raised with every change that gives another world for the same configuration and seed. Version 1 had no satiation,
no uploads after the log and no drift but one change of taste per viewer."""
_HOUR_S: Final = 3600.0

# Taste and content. Set by hand so that a recommender that counts outcomes earns clearly more than popularity, and an
# oracle more than that (`tests/pipelines/simulation/test_simulated_log.py` holds the distances).
BIAS: Final = -2.2
TOPIC: Final = 5.0
STYLE: Final = 2.0
QUALITY: Final = 0.6
FOREIGN: Final = -2.2
LENGTH: Final = -0.3
"""Per factor e of the duration over 15 s."""
BOREDOM: Final = -0.25
"""Per earlier video with the same main topic in the slate. Set by hand."""

# Satiation. Form: a sum of past exposures that decays exponentially, as in "Rebounding Bandits for Modeling Satiation
# Effects" (Leqi et al., NeurIPS 2021): enjoyment falls with each exposure and recovers without exposure. The penalty is
# weight * ln(1 + sum), so that each further repeat costs less than the one before.
VIDEO_SATIATION: Final = 4.0
"""One watch divides the odds of enjoying the same video by 2 ** 4 = 16. Set by hand: a viewer of a feed rarely wants
the same clip again."""
VIDEO_RECOVERY_S: Final = 7 * DAY_S
"""Half-life of a video's sum. After a week a watch divides the odds by 5, after 30 days by 1.2: about the time for
which services keep a watched video out of the feed. Set by hand."""
TOPIC_SATIATION: Final = 0.3
CREATOR_SATIATION: Final = 0.4
"""Too many similar videos lower satisfaction ("CIRS", Gao et al., TOIS 2023, measured on Kuaishou). Set by hand to a
mild effect: ten videos of a topic in a session divide the odds by 2, ten of a creator by 2.6."""
SESSION_RECOVERY_S: Final = 0.5 * _HOUR_S
"""Half-life of the sums of topics and creators: mostly gone after the hour of inactivity that ends a session
(Halfaker et al., WWW 2015)."""
WATCHED_EXPOSURE: Final = 1.0
SKIPPED_EXPOSURE: Final = 0.5
"""A video that was skipped was seen in part. Set by hand."""

# Age of a video. Interest in new items fades within hours ("Novelty and collective attention", Wu and Huberman, PNAS
# 2007: half-life of 69 minutes for news). Videos live longer, so the half-life is set by hand to 12 hours, and a slow
# logarithmic decline follows.
FRESH: Final = 0.8
"""Bonus at the upload: a new video has 2.2 times the odds of one that is some days old."""
FRESH_HALF_LIFE_S: Final = 12 * _HOUR_S
AGE: Final = -0.25
"""Times ln(1 + days since the upload). Set by hand."""

# Uploads. The number of videos is the configuration's; their rate during the log continues after its end.
UPLOAD_CYCLE: Final = 0.5
"""Relative amplitude of the daily cycle of uploads: at the peak 3 times as many as at the low. Set by hand."""
UPLOAD_PEAK_H: Final = 17.0
"""UTC hour of the peak, before the evening peak of viewing in Europe. Set by hand."""

# Drift. Recommenders lose quality as tastes and topics move on ("Monolith", Liu et al., 2022, on concept drift). Both
# drifts are first-order autoregressions: they return to the mean, so the world stays alike over weeks.
TASTE_CHANGE_S: Final = 1.5 * DAY_S
"""Time scale in which a viewer's early taste gives way to the late one, once per viewer. Set by hand."""
TASTE_DRIFT: Final = 0.12
"""Standard deviation of the drift of a viewer's taste for a topic; a loved topic has taste 1. Times ``TOPIC``, this is
0.6 logits, as much as one standard deviation of quality. Set by hand."""
TASTE_DRIFT_HALF_LIFE_D: Final = 7.0
"""Time in which half of a drift is forgotten: a week-old model is off, a day-old one hardly. Set by hand."""
TOPIC_DRIFT: Final = 0.3
"""Standard deviation of the drift of a topic's popularity, for all viewers. Set by hand: half of a viewer's drift."""
TOPIC_DRIFT_HALF_LIFE_H: Final = 96.0
DRIFT_BOUND: Final = 3.0
"""Drifts stay within this many standard deviations."""

# Trends: a topic gains interest and loses it within a day or two. Set by hand: two new trends a day.
TRENDS_PER_DAY: Final = 2
TREND_HEIGHT: Final = (0.4, 1.2)
TREND_WIDTH_H: Final = (10.0, 36.0)
TREND_LIMIT: Final = 2.5
"""Largest sum of a topic's trends."""

LIVE_DAYS: Final = 14
"""Days after the end of the log for which uploads, trends and drifts are drawn, for live traffic and closed loops."""
