"""A slate put into words: titles, reasons, signed impression tokens. The arrays end here, at the edge."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Final

from reelway.platform.contracts.api import RecommendedVideo
from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import MAX_ID
from reelway.platform.tokens import ImpressionToken, TokenSigner
from reelway.serving.popular import PopularLists
from reelway.serving.stages.arrays import SOURCES, Slate
from reelway.serving.video_table import ABSENT, VideoTable


@dataclass(frozen=True, slots=True)
class RolloutSide:
    """One arm of one rollout, as every impression of it has to say.

    ``overlap_weight`` is what an impression counts under the weights it is shown with (``sequential.overlap_weight``);
    0 outside of a rollout and where nothing is there to be compared with.
    """

    arm: Arm
    rollout: str = ""
    overlap_weight: float = 0.0


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
    now_s: float


def new_id() -> int:
    """A random id of 53 bits, so that routers need not agree. Two of a million are the same once in 18,000 times."""
    return secrets.randbelow(MAX_ID + 1)


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
    slate: Slate, showing: Showing, table: VideoTable, lists: PopularLists, signer: TokenSigner
) -> list[RecommendedVideo]:
    """The places of the answer, each with the token that its outcomes must bring back."""
    rows = slate.rows.tolist()
    videos = table.video_id[slate.rows].tolist()
    sources = [SOURCES[code] for code in slate.source.tolist()]
    watched = [
        None if row == ABSENT else (title or "")
        for row, title in zip(slate.because.tolist(), table.titles(slate.because), strict=True)
    ]
    tokens = signer.sign_many(
        ImpressionToken(
            new_id(), showing.request_id, showing.viewer_id, video, position,
            showing.release, showing.side.arm, source, propensity, showing.now_s,
        )
        for position, (video, source, propensity) in enumerate(
            zip(videos, sources, slate.propensity.tolist(), strict=True)
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
