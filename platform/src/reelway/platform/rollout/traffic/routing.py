"""Routing of viewers to releases: the configuration of every router (Ray Serve's ``user_config``).

A promotion or rollback writes a new ``Routing``. Equal routings give equal traffic.
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
    """One arm and its weight. The holdout uses only the popular lists of its release."""

    arm: Arm
    release: Annotated[str, Field(min_length=1)]
    weight_bp: BasisPoints


class ShadowRoute(_Strict):
    """A release that receives mirrored requests; its responses are discarded."""

    release: Annotated[str, Field(min_length=1)]
    weight_bp: BasisPoints


class RollbackMark(_Strict):
    """A rollback that was written to the traffic because it could not be recorded. Whoever can record it does so."""

    reason: Annotated[str, Field(max_length=2_000)]
    decided_at: float = Field(description="Unix seconds")


class Routing(_Strict):
    """Arms with their weights, and the releases that routers keep open.

    Arms occupy buckets in a fixed order: canary from the bottom, then stable, holdout at the top. A growing canary
    therefore takes viewers from stable only, and the holdout keeps its viewers.
    """

    salt: Annotated[str, Field(min_length=1, description="salt of the viewer buckets; each rollout has its own")]
    rollout: str = Field(default="", description="id of the rollout; empty between rollouts")
    arms: Annotated[tuple[ArmRoute, ...], Field(min_length=1, max_length=3)]
    shadow: ShadowRoute | None = None
    warm: tuple[str, ...] = Field(
        default=(), description="further releases that routers keep open, ready to take traffic"
    )

    rollback: RollbackMark | None = Field(
        default=None, description="set by a rollback that is not recorded yet; no viewer is on the canary"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Routing:
        kinds = [route.arm for route in self.arms]
        if any(kind not in _ORDER for kind in kinds) or kinds != sorted(set(kinds), key=_ORDER.__getitem__):
            raise ValueError(
                f"arms {[k.value for k in kinds]}, expected a subset of canary, stable, holdout in this order"
            )
        if (total := sum(route.weight_bp for route in self.arms)) != BUCKETS:
            raise ValueError(f"weights sum to {total} basis points, expected {BUCKETS}")
        if self.rollback is not None and (points := self.weight_of(Arm.CANARY)):
            raise ValueError(f"rollback is set and the canary has {points} basis points, expected 0")
        return self

    @classmethod
    def single_release(cls, release: str, *, salt: str = "reelway", warm: Iterable[str] = ()) -> Routing:
        """Returns a routing with all viewers on one release."""
        arms = (ArmRoute(arm=Arm.STABLE, release=release, weight_bp=BUCKETS),)
        return cls(salt=salt, arms=arms, warm=tuple(warm))

    @property
    def releases(self) -> tuple[str, ...]:
        """All releases that a router must keep open, without duplicates."""
        shadow = (self.shadow.release,) if self.shadow else ()
        return tuple(dict.fromkeys((*(route.release for route in self.arms), *shadow, *self.warm)))

    def weight_of(self, arm: Arm) -> int:
        """Returns the basis points of an arm; 0 if the routing has no such arm."""
        return sum(route.weight_bp for route in self.arms if route.arm is arm)

    def route_of(self, viewer_id: int) -> ArmRoute:
        """Returns the arm of a viewer. Sticky for one salt, monotone while the canary grows."""
        bucket, end = bucket_of(viewer_id, self.salt), 0
        for route in self.arms:
            end += route.weight_bp
            if bucket < end:
                return route
        raise AssertionError("the weights cover all buckets")
