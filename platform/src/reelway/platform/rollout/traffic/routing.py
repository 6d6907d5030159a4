"""Why: the one thing that every router must be told, small enough to be written in one go: who gets which release.

It is the router's configuration (Serve's ``user_config``) and nothing else: no metric, no policy, no clock. Promotion
and rollback are a new ``Routing``; two equal ones are the same traffic.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.traffic.bucketing import BUCKETS, bucket_of

BasisPoints = Annotated[int, Field(ge=0, le=BUCKETS)]
_ORDER = {Arm.CANARY: 0, Arm.STABLE: 1, Arm.HOLDOUT: 2}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ArmRoute(_Strict):
    """One arm and its share. The holdout's release only lends its popular lists."""

    arm: Arm
    release: Annotated[str, Field(min_length=1)]
    weight_bp: BasisPoints


class ShadowRoute(_Strict):
    """A release that is asked too and whose answers are thrown away."""

    release: Annotated[str, Field(min_length=1)]
    weight_bp: BasisPoints


class Routing(_Strict):
    """The whole of it.

    Arms take buckets in a fixed order: canary from the bottom up, stable, holdout at the top. So a canary that grows
    takes from stable only, and the holdout keeps its viewers.
    """

    salt: Annotated[str, Field(min_length=1, description="of the buckets; one rollout, one salt")]
    rollout: str = Field(default="", description="id of the rollout that this belongs to; empty between rollouts")
    arms: Annotated[tuple[ArmRoute, ...], Field(min_length=1, max_length=3)]
    shadow: ShadowRoute | None = None
    warm: tuple[str, ...] = Field(
        default=(), description="further releases to be held open, so that giving them weight needs no preparation"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Routing:
        kinds = [route.arm for route in self.arms]
        if any(kind not in _ORDER for kind in kinds) or kinds != sorted(set(kinds), key=_ORDER.__getitem__):
            raise ValueError(f"arms {[k.value for k in kinds]}, expected some of canary, stable, holdout in this order")
        if (total := sum(route.weight_bp for route in self.arms)) != BUCKETS:
            raise ValueError(f"weights sum to {total} basis points, expected {BUCKETS}")
        return self

    @classmethod
    def whole(cls, release: str, *, salt: str = "reelway", warm: Iterable[str] = ()) -> Routing:
        """Everybody on one release."""
        arms = (ArmRoute(arm=Arm.STABLE, release=release, weight_bp=BUCKETS),)
        return cls(salt=salt, arms=arms, warm=tuple(warm))

    @property
    def releases(self) -> tuple[str, ...]:
        """All releases that a router must hold open, each once."""
        shadow = (self.shadow.release,) if self.shadow else ()
        return tuple(dict.fromkeys((*(route.release for route in self.arms), *shadow, *self.warm)))

    def weight_of(self, arm: Arm) -> int:
        """Basis points of an arm; 0 where there is none."""
        return sum(route.weight_bp for route in self.arms if route.arm is arm)

    def route_of(self, viewer_id: int) -> ArmRoute:
        """The arm that a viewer is on. Sticky under one salt, monotone while the canary grows."""
        bucket, end = bucket_of(viewer_id, self.salt), 0
        for route in self.arms:
            end += route.weight_bp
            if bucket < end:
                return route
        raise AssertionError("weights that sum to all buckets leave none over")
