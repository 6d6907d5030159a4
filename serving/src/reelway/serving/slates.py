"""Converts a slate of arrays into the videos of a response: titles, reasons and signed impression tokens."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from reelway.platform.contracts.api import RecommendedVideo
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.rollout.policy import Slice
from reelway.platform.tokens import SLICE_BITS, ImpressionToken, TokenSigner
from reelway.serving.outcomes.exposures import ArmKey, SlateExposure
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
    device: str = "unknown"
    language: str | None = None
    authenticated: bool = False  # the viewer proved its identity


NEW_VIDEO_S: Final = 48 * 3600.0
"""Age up to which a video counts as new."""
SMALL_CREATOR_FOLLOWERS: Final = 100.0
"""A creator with fewer followers, or an unknown number of followers, counts as small."""


def slices_of(rows: Rows, context: ImpressionContext, table: VideoTable) -> NDArray[np.int8]:
    """Returns the slices of each shown video as a bit mask of ``SLICE_BITS``; 0 outside of a rollout."""
    if not context.rollout_arm.rollout:
        return np.zeros(len(rows), np.int8)
    new = context.now_s - table.uploaded_at_s[rows] < NEW_VIDEO_S
    small = ~(table.creator_followers(rows) >= SMALL_CREATOR_FOLLOWERS)
    bits = (
        _NEW_VIEWERS * context.new_viewer
        + _NEW_VIDEOS * new.astype(np.int64)
        + _SMALL_CREATORS * small.astype(np.int64)
    )
    masks: NDArray[np.int8] = bits.astype(np.int8)
    return masks


def exposure_of(slate: Slate, context: ImpressionContext, table: VideoTable) -> SlateExposure:
    """Returns what is recorded about the slate: in its tokens, and in the event log. Impressions get their ids."""
    rows, rollout_arm = slate.rows, context.rollout_arm
    return SlateExposure(
        request_id=context.request_id,
        viewer_id=context.viewer_id,
        arm=ArmKey(rollout_arm.rollout, rollout_arm.arm, context.release),
        weight=rollout_arm.overlap_weight,
        shown_at_s=context.shown_at_s,
        request_time_s=context.now_s,
        device=context.device,
        region=context.region,
        language=context.language,
        impression_id=np.array(new_ids(len(rows)), np.int64),
        video_id=table.video_id[rows],
        slices=slices_of(rows, context, table),
        source=slate.source,
        score=slate.score,
        propensity=slate.propensity,
        creator_id=table.creator_id[rows],
        topic=table.topic[rows],
        duration_ms=np.array(table.duration_ms(rows), np.int32),
        authenticated=context.authenticated,
    )


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


def sign_tokens(exposure: SlateExposure, signer: TokenSigner) -> list[str]:
    """Returns the impression token of each video of a slate."""
    release, arm, rollout = exposure.arm.release, exposure.arm.arm, exposure.arm.rollout
    columns = zip(
        exposure.impression_id.tolist(), exposure.video_id.tolist(), exposure.source.tolist(),
        exposure.propensity.tolist(), exposure.slices.tolist(), exposure.duration_ms.tolist(),
        exposure.creator_id.tolist(), exposure.topic.tolist(), strict=True,
    )  # fmt: skip
    return signer.sign_many(
        ImpressionToken(
            impression, exposure.request_id, exposure.viewer_id, video, position, release, arm, SOURCES[source],
            propensity, exposure.shown_at_s, rollout, exposure.weight, mask, duration_ms, creator, topic,
        )
        for position, (impression, video, source, propensity, mask, duration_ms, creator, topic) in enumerate(columns)
    )  # fmt: skip


def build_videos(
    slate: Slate, exposure: SlateExposure, table: VideoTable, lists: PopularLists, signer: TokenSigner
) -> list[RecommendedVideo]:
    """Returns the videos of the response, each with the token that clients send back with its outcomes.

    Args:
        exposure: result of ``exposure_of`` for the slate.
    """
    rows = slate.rows.tolist()
    watched = [
        None if row == ABSENT else (title or "")
        for row, title in zip(slate.trigger_rows.tolist(), table.titles(slate.trigger_rows), strict=True)
    ]
    positions = zip(
        exposure.video_id.tolist(), exposure.creator_id.tolist(), slate.score.tolist(),
        [SOURCES[code] for code in slate.source.tolist()], rows, watched, table.titles(slate.rows),
        sign_tokens(exposure, signer), strict=True,
    )  # fmt: skip
    return [
        RecommendedVideo.model_construct(
            video_id=video,
            creator_id=creator,
            position=position,
            score=score,
            source=source,
            reason=reason_text(source, row, title_watched, exposure.region, lists),
            title=title,
            token=token,
        )
        for position, (video, creator, score, source, row, title_watched, title, token) in enumerate(positions)
    ]
