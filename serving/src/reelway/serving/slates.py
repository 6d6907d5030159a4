"""Converts a slate of arrays into the videos of a response: titles, reasons and signed impression tokens."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

import numpy as np

from reelway.platform.contracts.api import RecommendedVideo
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.rollout.policy import Slice
from reelway.platform.tokens import SLICE_BITS, ImpressionToken, TokenSigner
from reelway.serving.popular import PopularLists
from reelway.serving.stages.arrays import SOURCES, Rows, Slate
from reelway.serving.video_table import ABSENT, VideoTable


@dataclass(frozen=True, slots=True)
class RolloutArm:
    """One arm of one rollout, as recorded in every impression of the arm.

    ``overlap_weight`` is the weight of an impression under the present traffic weights (``sequential.overlap_weight``).
    It is 0 outside of a rollout and for an arm that is compared with no other.
    """

    arm: Arm
    rollout: str = ""
    overlap_weight: float = 0.0  # a float32, as in the token


_NEW_VIEWERS, _NEW_VIDEOS, _SMALL_CREATORS = (
    SLICE_BITS[slice_] for slice_ in (Slice.NEW_VIEWERS, Slice.NEW_VIDEOS, Slice.SMALL_CREATORS)
)

NO_ROLLOUT: Final = RolloutArm(Arm.STABLE)
"""The only arm between rollouts."""


@dataclass(frozen=True, slots=True)
class ImpressionContext:
    """Fields that all impressions of a slate share: viewer, time, release and arm."""

    request_id: int
    viewer_id: int
    release: str
    rollout_arm: RolloutArm
    region: str | None
    now_s: float  # time of the request
    shown_at_s: float  # time of the clock
    new_viewer: bool = False  # the viewer has no history


NEW_VIDEO_S: Final = 48 * 3600.0
"""Age up to which a video counts as new."""
SMALL_CREATOR_FOLLOWERS: Final = 100.0
"""A creator with fewer followers, or an unknown number of followers, counts as small."""


def slices_of(rows: Rows, context: ImpressionContext, table: VideoTable) -> list[int]:
    """Returns the slices of each shown video as a bit mask of ``SLICE_BITS``; 0 outside of a rollout."""
    if not context.rollout_arm.rollout:
        return [0] * len(rows)
    new = context.now_s - table.uploaded_at_s[rows] < NEW_VIDEO_S
    small = ~(table.creator_followers(rows) >= SMALL_CREATOR_FOLLOWERS)
    bits = (
        _NEW_VIEWERS * context.new_viewer
        + _NEW_VIDEOS * new.astype(np.int64)
        + _SMALL_CREATORS * small.astype(np.int64)
    )
    masks: list[int] = bits.tolist()
    return masks


def new_ids(count: int) -> list[int]:
    """Returns random 53-bit ids, which routers generate independently.

    A million ids contain a duplicate with probability 1 in 18,000. One system call generates all ids of a slate,
    because a call costs more than the bytes it returns.
    """
    bits = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64) & np.uint64(MAX_ID)
    ids: list[int] = bits.tolist()
    return ids


_REASONS: Final = {
    "fresh": "new upload",
    "popular": "popular now",
    "followed_creators": "from a creator you follow",
    "similar_creators": "from a creator like those you watch",
}


def reason_text(source: str, row: int, watched: str | None, region: str | None, lists: PopularLists) -> str:
    """Returns the reason shown to the viewer, by the source that proposed the video.

    Args:
        watched: title of the watched video that led to the recommendation; ``""`` if that video has no title, ``None``
            if no video led to it.
    """
    if source in ("ann", "neighbours", "content"):
        if watched is None:
            return "picked for you"
        return f"because you watched {watched}" if watched else "because of what you watched"
    if source == "trending":
        return f"rising in {region}" if lists.is_trending_in(row, region) else "rising now"
    return _REASONS[source]


def build_videos(
    slate: Slate,
    slices: list[int],
    context: ImpressionContext,
    table: VideoTable,
    lists: PopularLists,
    signer: TokenSigner,
) -> list[RecommendedVideo]:
    """Returns the videos of the response, each with the token that clients send back with its outcomes.

    Args:
        slices: result of ``slices_of`` for the slate.
    """
    rows = slate.rows.tolist()
    videos = table.video_id[slate.rows].tolist()
    sources = [SOURCES[code] for code in slate.source.tolist()]
    watched = [
        None if row == ABSENT else (title or "")
        for row, title in zip(slate.trigger_rows.tolist(), table.titles(slate.trigger_rows), strict=True)
    ]
    rollout_arm = context.rollout_arm
    tokens = signer.sign_many(
        ImpressionToken(
            impression, context.request_id, context.viewer_id, video, position, context.release, rollout_arm.arm,
            source, propensity, context.shown_at_s, rollout_arm.rollout, rollout_arm.overlap_weight, mask, duration_ms,
        )
        for position, (impression, video, source, propensity, mask, duration_ms) in enumerate(
            zip(
                new_ids(len(videos)), videos, sources, slate.propensity.tolist(), slices,
                table.duration_ms(slate.rows), strict=True,
            )
        )
    )  # fmt: skip
    positions = zip(
        videos, table.creator_id[slate.rows].tolist(), slate.score.tolist(), sources, rows, watched,
        table.titles(slate.rows), tokens, strict=True,
    )  # fmt: skip
    return [
        RecommendedVideo.model_construct(
            video_id=video,
            creator_id=creator,
            position=position,
            score=score,
            source=source,
            reason=reason_text(source, row, title_watched, context.region, lists),
            title=title,
            token=token,
        )
        for position, (video, creator, score, source, row, title_watched, title, token) in enumerate(positions)
    ]
