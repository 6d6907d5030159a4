"""A slate put into words: titles, reasons, signed impression tokens. The arrays end here, at the edge."""

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
class RolloutSide:
    """One arm of one rollout, as every impression of it has to say.

    ``overlap_weight`` is what an impression counts under the weights it is shown with (``sequential.overlap_weight``);
    0 outside of a rollout and where nothing is there to be compared with.
    """

    arm: Arm
    rollout: str = ""
    overlap_weight: float = 0.0  # a float32, as a token carries it


_NEW_VIEWERS, _NEW_VIDEOS, _SMALL_CREATORS = (
    SLICE_BITS[one] for one in (Slice.NEW_VIEWERS, Slice.NEW_VIDEOS, Slice.SMALL_CREATORS)
)

EVERYBODY: Final = RolloutSide(Arm.STABLE)
"""The only side between rollouts."""


@dataclass(frozen=True, slots=True)
class Showing:
    """To whom, when, by which release and on which side of a rollout a slate is shown."""

    request_id: int
    viewer_id: int
    release: str
    side: RolloutSide
    region: str | None
    now_s: float  # of the request
    shown_at_s: float  # by the clock
    new_viewer: bool = False


NEW_VIDEO_S: Final = 48 * 3600.0
"""A video is new for so long after its upload."""
SMALL_CREATOR_FOLLOWERS: Final = 100.0
"""A creator with fewer is small, and so is one of whom nobody knows how many."""


def slices_of(rows: Rows, showing: Showing, table: VideoTable) -> list[int]:
    """The slices that each shown video counts in, as the bits of ``SLICE_BITS``. Outside of a rollout none matters."""
    if not showing.side.rollout:
        return [0] * len(rows)
    new = showing.now_s - table.uploaded_at_s[rows] < NEW_VIDEO_S
    small = ~(table.creator_followers(rows) >= SMALL_CREATOR_FOLLOWERS)
    bits = (
        _NEW_VIEWERS * showing.new_viewer
        + _NEW_VIDEOS * new.astype(np.int64)
        + _SMALL_CREATORS * small.astype(np.int64)
    )
    masks: list[int] = bits.tolist()
    return masks


def new_ids(count: int) -> list[int]:
    """Random ids of 53 bits, so that routers need not agree. Two of a million are the same once in 18,000 times.

    The system is asked once for all of them: a slate has twenty, and each asking costs more than its eight bytes.
    """
    bits = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64) & np.uint64(MAX_ID)
    ids: list[int] = bits.tolist()
    return ids


def readable_reason(source: str, row: int, watched: str | None, region: str | None, lists: PopularLists) -> str:
    """One sentence for a person, by the source that proposed the video.

    Args:
        watched: title of the watched video that led to it, ``""`` for one without a title, ``None`` for none.
    """
    if source in ("ann", "neighbours"):
        if watched is None:
            return "picked for you"
        return f"because you watched {watched}" if watched else "because of what you watched"
    if source == "trending":
        return f"rising in {region}" if lists.rises_in(row, region) else "rising now"
    return {"fresh": "new upload", "popular": "popular now"}[source]


def shown_videos(
    slate: Slate, slices: list[int], showing: Showing, table: VideoTable, lists: PopularLists, signer: TokenSigner
) -> list[RecommendedVideo]:
    """The places of the answer, each with the token that its outcomes must bring back.

    Args:
        slices: ``slices_of`` the slate.
    """
    rows = slate.rows.tolist()
    videos = table.video_id[slate.rows].tolist()
    sources = [SOURCES[code] for code in slate.source.tolist()]
    watched = [
        None if row == ABSENT else (title or "")
        for row, title in zip(slate.trigger_rows.tolist(), table.titles(slate.trigger_rows), strict=True)
    ]
    side = showing.side
    tokens = signer.sign_many(
        ImpressionToken(
            impression, showing.request_id, showing.viewer_id, video, position, showing.release, side.arm, source,
            propensity, showing.shown_at_s, side.rollout, side.overlap_weight, mask, duration_ms,
        )
        for position, (impression, video, source, propensity, mask, duration_ms) in enumerate(
            zip(
                new_ids(len(videos)), videos, sources, slate.propensity.tolist(), slices,
                table.duration_ms(slate.rows), strict=True,
            )
        )
    )  # fmt: skip
    places = zip(
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
            reason=readable_reason(source, row, title_watched, showing.region, lists),
            title=title,
            token=token,
        )
        for position, (video, creator, score, source, row, title_watched, title, token) in enumerate(places)
    ]
