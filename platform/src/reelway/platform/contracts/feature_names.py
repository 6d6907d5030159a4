"""Feature names and their order.

Training, export and serving share the order. ``feature_repo/`` declares the views to Feast.
``platform.features.assembly`` turns their values into model inputs, and the ONNX graphs take the inputs by the names
below. A new feature is added here. Widths and vocabulary sizes are in ``contracts.feature_dimensions``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class TrailingWindow:
    """A trailing window: its short name in feature names, and its length in seconds."""

    name: str
    length_s: int


VIEWER_WINDOWS: Final = (
    TrailingWindow("1d", 86_400),
    TrailingWindow("7d", 7 * 86_400),
    TrailingWindow("30d", 30 * 86_400),
)
VIDEO_WINDOWS: Final = (
    TrailingWindow("1h", 3_600),
    TrailingWindow("6h", 6 * 3_600),
    TrailingWindow("24h", 86_400),
    TrailingWindow("7d", 7 * 86_400),
    TrailingWindow("30d", 30 * 86_400),
)
CREATOR_WINDOW: Final = TrailingWindow("7d", 7 * 86_400)

# Names of the Feast views, and their fields.
VIEWER_PROFILE: Final = ("region", "language", "segment", "created_at_s")
VIEWER_ACTIVITY: Final = tuple(
    f"{measure}_{w.name}"
    for w in VIEWER_WINDOWS
    for measure in ("impressions", "long_watch_ratio", "like_ratio", "skip_ratio", "watch_s_mean")
)
VIEWER_HISTORY: Final = ("history_videos", "history_weights", "history_times_s")  # oldest first
VIEWER_TOPIC_AFFINITY: Final = ("topic_affinity",)  # one value per topic, 30-day, sum of |values| at most 1
CONTENT_VECTORS: Final = ("visual", "audio", "text")
VIDEO_CONTENT: Final = (
    "creator_id", "topic", "video_language", "duration_s", "uploaded_at_s", *CONTENT_VECTORS,
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
"""Computed on demand by one function (``platform.features.on_demand``) that Feast and serving both run."""

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
"""Feast feature service of a training row: all views and the on-demand context."""
VIEWER_SERVICE: Final = "viewer_row_v1"
"""Feast feature service of the row that the router reads online for one viewer."""

# Model inputs are raw values. Logarithms, scaling and the handling of missing values are inside the models, so an
# exported graph carries them and they are defined once.
SESSION_FEATURES: Final = ("session_position", "session_watched_10m", "session_skipped_10m", "session_trend")
"""Computed on demand from the viewer's history by ``platform.features.on_demand.session_features``."""
VIEWER_CONTEXT: Final = (
    "hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "account_age_d",
    "hours_since_last_activity", *SESSION_FEATURES,
)  # fmt: skip
"""Last columns of ``viewer_dense``; all of them depend on the time of the request."""
VIEWER_CATEGORIES: Final = ("region", "language", "segment", "device")
VIDEO_STATIC_DENSE: Final = ("duration_s", "has_visual", "has_audio", "has_text")
VIDEO_LIVE_DENSE: Final = (*VIDEO_ENGAGEMENT, *CREATOR_STATISTICS)
VIDEO_DENSE: Final = (*VIDEO_STATIC_DENSE, *VIDEO_LIVE_DENSE, "hours_since_upload")
VIDEO_CATEGORIES: Final = ("topic", "video_language")

ID_HASHES: Final = 2
"""Hash functions per id. With two, ids that share one code rarely share the other as well."""

VIEWER_TOWER_INPUTS: Final = (
    "viewer_dense", "viewer_categories", "history_codes", "history_weights", "history_age_h",
)  # fmt: skip
VIDEO_TOWER_INPUTS: Final = (
    "video_codes", "creator_codes", "video_categories", "video_static_dense", *CONTENT_VECTORS,
)  # fmt: skip
RANKER_INPUTS: Final = (
    "viewer_dense", "viewer_categories", "viewer_embedding",
    "video_dense", "video_categories", "creator_codes", "video_embedding",
)  # fmt: skip
RANKER_TASKS: Final = ("long_watch", "like", "share", "save", "follow", "comment", "skip", "watch_s")
"""Order of the ranker's outputs. ``watch_s`` is log1p(seconds); all others are logits of a probability."""
BINARY_TASKS: Final = RANKER_TASKS[:-1]
