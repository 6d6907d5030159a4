"""Feature names, in the one order that training, export and serving share.

``feature_repo/`` declares these views to Feast; ``platform.features.assembly`` turns their values into model
inputs; the ONNX graphs take those inputs by the names below. Adding a feature means adding it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from reelway.platform.contracts.events import TOPICS


@dataclass(frozen=True)
class Window:
    """A trailing window: its short name in feature names, and its length in seconds."""

    name: str
    length_s: int


VIEWER_WINDOWS: Final = (Window("1d", 86_400), Window("7d", 7 * 86_400), Window("30d", 30 * 86_400))
VIDEO_WINDOWS: Final = (
    Window("1h", 3_600),
    Window("6h", 6 * 3_600),
    Window("24h", 86_400),
    Window("7d", 7 * 86_400),
    Window("30d", 30 * 86_400),
)
CREATOR_WINDOW: Final = Window("7d", 7 * 86_400)

HISTORY_LENGTH: Final = 50

# Views as Feast knows them, and their fields.
VIEWER_PROFILE: Final = ("region", "language", "segment", "created_at_s")
VIEWER_ACTIVITY: Final = tuple(
    f"{measure}_{w.name}"
    for w in VIEWER_WINDOWS
    for measure in ("impressions", "long_watch_ratio", "like_ratio", "skip_ratio", "watch_s_mean")
)
VIEWER_HISTORY: Final = ("history_videos", "history_weights", "history_times_s")  # oldest first
VIEWER_TOPIC_AFFINITY: Final = ("topic_affinity",)  # TOPICS values, 30-day, sum of |values| at most 1
VIDEO_CONTENT: Final = (
    "creator_id", "topic", "video_language", "duration_s", "uploaded_at_s", "visual", "audio", "text",
)  # fmt: skip
VIDEO_ENGAGEMENT: Final = tuple(
    f"video_{measure}_{w.name}"
    for w in VIDEO_WINDOWS
    for measure in ("impressions", "long_watch_rate", "like_rate", "skip_rate", "watch_s_mean")
)
CREATOR_STATISTICS: Final = (
    "creator_followers", "creator_uploads", "creator_impressions_7d", "creator_long_watch_rate_7d",
    "creator_follow_rate_7d",
)  # fmt: skip
REQUEST_CONTEXT: Final = (
    "hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "account_age_d", "hours_since_upload",
)  # fmt: skip
"""On demand: one function (``platform.features.on_demand``) that Feast and serving both run."""

VIEWS: Final[dict[str, tuple[str, ...]]] = {
    "viewer_profile": VIEWER_PROFILE,
    "viewer_activity": VIEWER_ACTIVITY,
    "viewer_history": VIEWER_HISTORY,
    "viewer_topic_affinity": VIEWER_TOPIC_AFFINITY,
    "video_content": VIDEO_CONTENT,
    "video_engagement": VIDEO_ENGAGEMENT,
    "creator_statistics": CREATOR_STATISTICS,
}
VIEWER_VIEWS: Final = ("viewer_profile", "viewer_activity", "viewer_history", "viewer_topic_affinity")

TRAINING_SERVICE: Final = "training_row_v1"
"""Feast feature service of a training row: every view and the on-demand context."""
VIEWER_SERVICE: Final = "viewer_row_v1"
"""Feast feature service of what the ingress reads online for one viewer."""

# Model inputs. Raw values: the logarithms, the scaling and the missing-value handling live inside the models,
# so that an exported graph carries them and nothing has to be kept the same in two places.
VIEWER_DENSE: Final = (
    *VIEWER_ACTIVITY,
    *(f"topic_affinity_{i}" for i in range(TOPICS)),
    "hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "account_age_d",
    "hours_since_last_activity",
)  # fmt: skip
VIEWER_CATEGORIES: Final = ("region", "language", "segment", "device")
VIDEO_STATIC_DENSE: Final = ("duration_s", "has_visual", "has_audio", "has_text")
VIDEO_LIVE_DENSE: Final = (*VIDEO_ENGAGEMENT, *CREATOR_STATISTICS)
VIDEO_DENSE: Final = (*VIDEO_STATIC_DENSE, *VIDEO_LIVE_DENSE, "hours_since_upload")
VIDEO_CATEGORIES: Final = ("topic", "video_language")

CATEGORY_BUCKETS: Final = 64
"""Words (region, language, segment, device) are hashed to 1..CATEGORY_BUCKETS-1; 0 is missing."""
ID_BUCKETS: Final = 1 << 15
"""Ids are hashed twice to 1..ID_BUCKETS-1; 0 is padding. Two hashes make a shared code unlikely to be shared twice."""
ID_HASHES: Final = 2

VIEWER_TOWER_INPUTS: Final = (
    "viewer_dense", "viewer_categories", "history_codes", "history_weights", "history_age_h",
)  # fmt: skip
VIDEO_TOWER_INPUTS: Final = (
    "video_codes", "creator_codes", "video_categories", "video_static_dense", "visual", "audio", "text",
)  # fmt: skip
RANKER_INPUTS: Final = (
    "viewer_dense", "viewer_categories", "viewer_embedding",
    "video_dense", "video_categories", "creator_codes", "video_embedding",
)  # fmt: skip
RANKER_TASKS: Final = ("long_watch", "like", "share", "save", "follow", "comment", "skip", "watch_s")
"""Order of the ranker's outputs. All are logits of a probability but ``watch_s``, which is log1p(seconds)."""
BINARY_TASKS: Final = RANKER_TASKS[:-1]
