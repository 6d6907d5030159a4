"""``blend.yaml``: retrieval quotas, value weights and re-ranking settings. It is part of the release."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reelway.platform.contracts.feature_names import RANKER_TASKS

SourceName = Literal[
    "ann", "popular", "trending", "fresh", "neighbours", "content", "followed_creators", "similar_creators"
]
"""Retrieval sources; see ``serving.stages.retrieval``. Codes of sources depend on this order, so append only."""

MAX_SHOWN_HOURS: Final = 48
"""How long the service remembers a shown video, in hours."""
MAX_SHOWN_VIDEOS: Final = 2_000
"""How many shown videos the service remembers of a viewer."""
MAX_WATCHED_DAYS: Final = 30
"""How long the service certainly remembers a video that was watched to the end, in days."""

Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RetrievalSettings(_Strict):
    """Number of candidates passed to ranking, the share of each source, and how long shown videos are left out."""

    candidates: Annotated[int, Field(ge=1, le=10_000)] = 500
    quotas: dict[SourceName, Share] = Field(
        default={
            "followed_creators": 0.05,
            "fresh": 0.05,
            "trending": 0.15,
            "similar_creators": 0.05,
            "content": 0.1,
            "neighbours": 0.1,
            "popular": 0.1,
            "ann": 0.4,
        },
        description="share of the candidates kept for each source; what one source cannot fill, the next ones do. A "
        "video of several sources counts for the first of them, so sources that propose few videos come first",
    )
    index_probes: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="lists of the index to look into; absent: as many as the build found to be needed"
    )
    fresh_hours: Annotated[float, Field(gt=0)] = 48.0
    shown_hours: Annotated[float, Field(ge=0, le=MAX_SHOWN_HOURS)] = Field(
        default=24.0, description="a video is not shown again to the same viewer for this long; 0: at once"
    )
    shown_videos: Annotated[int, Field(ge=0, le=MAX_SHOWN_VIDEOS)] = Field(
        default=MAX_SHOWN_VIDEOS, description="only this many of the videos that were shown last are left out"
    )
    watched_days: Annotated[float, Field(ge=0, le=MAX_WATCHED_DAYS)] = Field(
        default=30.0, description="a video that was watched to the end is not shown again for this long; 0: at once"
    )

    @model_validator(mode="after")
    def _quotas_make_a_whole(self) -> RetrievalSettings:
        total = sum(self.quotas.values())
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"quotas sum to {total:g}, expected 1; change retrieval.quotas")
        return self


class RankingSettings(_Strict):
    """Weights of the heads in a video's value: probabilities for binary heads, log1p(seconds) for ``watch_s``."""

    value_weights: dict[str, float] = Field(
        default={
            "long_watch": 1.0, "like": 0.5, "share": 0.5, "save": 0.4, "follow": 0.5, "comment": 0.3,
            "skip": -0.5, "watch_s": 0.1,
        }
    )  # fmt: skip
    retrieval_weight: float = Field(default=0.0, description="weight of the retrieval similarity in the value")

    @model_validator(mode="after")
    def _weights_are_heads(self) -> RankingSettings:
        if unknown := sorted(set(self.value_weights) - set(RANKER_TASKS)):
            raise ValueError(f"value_weights names {unknown}, expected names among {list(RANKER_TASKS)}")
        return self


class RerankingSettings(_Strict):
    """How the slate is composed from the ranked candidates."""

    diversity: Share = Field(default=0.15, description="MMR: 0 orders by value alone, 1 by novelty alone")
    max_per_creator: Annotated[int, Field(ge=1)] = 2
    exploration_slots: Annotated[int, Field(ge=0)] = 0
    head: Annotated[int, Field(ge=1)] = Field(default=100, description="ranked candidates that MMR re-ranks")
    min_shares: dict[SourceName, Share] = Field(
        default={
            "followed_creators": 0.05,
            "fresh": 0.05,
            "trending": 0.1,
            "similar_creators": 0.05,
            "content": 0.05,
            "neighbours": 0.05,
            "popular": 0.05,
        },
        description="least share of a slate for the source's candidates, rounded down to whole videos",
    )

    @model_validator(mode="after")
    def _min_shares_fit(self) -> RerankingSettings:
        total = sum(self.min_shares.values())
        if total > 1.0 + 1e-6:
            raise ValueError(f"min_shares sum to {total:g}, expected at most 1; change reranking.min_shares")
        return self


class Blend(_Strict):
    """Content of ``blend.yaml``."""

    retrieval: RetrievalSettings = Field(default_factory=RetrievalSettings)
    ranking: RankingSettings = Field(default_factory=RankingSettings)
    reranking: RerankingSettings = Field(default_factory=RerankingSettings)
