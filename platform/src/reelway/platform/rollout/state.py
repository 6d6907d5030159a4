"""State of a rollout, and the commands of its users.

The state is immutable and small enough to be recorded before every change of traffic. It contains no evidence, which
can be fetched again. Timers are sums of observed ticks instead of differences of clock readings, so a clock that jumps
ends neither a hold nor a deadline.
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reelway.platform.contracts.events import Arm
from reelway.platform.contracts.ids import short_id
from reelway.platform.rollout.sequential import BASIS_POINTS


class Phase(StrEnum):
    """Phase of a rollout.

    ``rolled_back`` is final. ``promoted`` can still be rolled back while the previous release is warm.
    """

    PENDING = "pending"
    PREPARING = "preparing"
    SHADOW = "shadow"
    STEPPING = "stepping"
    HOLDING = "holding"
    PAUSED = "paused"
    PROMOTING = "promoting"
    PROMOTED = "promoted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"


RAMPING_PHASES = frozenset({Phase.STEPPING, Phase.HOLDING, Phase.PAUSED})
ALL_ON_STABLE_PHASES = frozenset({Phase.PENDING, Phase.PREPARING, Phase.SHADOW, Phase.ROLLING_BACK, Phase.ROLLED_BACK})

Verb = Literal["pause", "resume", "promote", "rollback"]
MAX_REMEMBERED_COMMANDS = 32


class Command(BaseModel):
    """A user's command. A command with a repeated ``id`` has no effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    verb: Verb
    actor: str = "unknown"
    force: bool = False
    note: str = ""


class RolloutState(BaseModel):
    """State of one rollout. Times are Unix seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    salt: str = Field(
        default_factory=lambda: secrets.token_hex(16),
        min_length=1,
        description="salt of the viewer buckets; secret, because it tells which viewer ids get the canary",
    )
    stable_release: str
    canary_release: str
    phase: Phase = Phase.PENDING
    step: int = Field(default=-1, ge=-1, description="index into the policy's steps; -1 before the first")
    canary_bp: int = Field(default=0, ge=0, le=BASIS_POINTS)
    holdout_bp: int = Field(default=0, ge=0, lt=BASIS_POINTS)
    shadow_bp: int = Field(
        default=0, ge=0, le=BASIS_POINTS, description="share of requests that are mirrored, in addition to the weights"
    )
    started_at: float
    changed_at: float = Field(description="time of the last change of phase or step; for display, not for timers")
    tick_at: float = Field(description="time of the last decision")
    evidence_at: float = Field(default=0.0, description="time of the newest assessed evidence; 0 before the first")
    phase_s: float = Field(default=0, ge=0, description="seconds in this phase or step; a hold does not restart it")
    held_insufficient_s: float = Field(default=0, ge=0)
    held_telemetry_s: float = Field(default=0, ge=0)
    command: Command | None = None
    commands_seen: tuple[str, ...] = ()
    retired: bool = Field(default=False, description="promoted, and the previous release is no longer kept warm")
    forced: bool = Field(default=False, description="started with --force despite a rollback or a cooldown")
    reason: str = ""

    @model_validator(mode="after")
    def _weights_leave_room(self) -> RolloutState:
        if self.canary_bp + self.holdout_bp > BASIS_POINTS:
            raise ValueError(f"canary {self.canary_bp} + holdout {self.holdout_bp} basis points exceed {BASIS_POINTS}")
        if self.stable_release == self.canary_release:
            raise ValueError(f"release {short_id(self.canary_release)} cannot be rolled out over itself")
        return self

    @property
    def weights(self) -> dict[Arm, int]:
        """Basis points by arm; the sum is always 10,000."""
        return {
            Arm.STABLE: BASIS_POINTS - self.canary_bp - self.holdout_bp,
            Arm.CANARY: self.canary_bp,
            Arm.HOLDOUT: self.holdout_bp,
        }

    @property
    def warm_releases(self) -> frozenset[str]:
        """Releases that must run with capacity for *all* traffic, so that a rollback only changes weights."""
        return frozenset({self.canary_release}) if self.retired else frozenset({self.stable_release})

    @property
    def deployed_releases(self) -> frozenset[str]:
        """Releases that must be running."""
        if self.phase is Phase.PENDING or self.phase is Phase.ROLLED_BACK:
            return frozenset({self.stable_release})
        if self.retired:
            return frozenset({self.canary_release})
        return frozenset({self.stable_release, self.canary_release})

    @property
    def live_release(self) -> str:
        """The release that a new rollout is compared with."""
        return self.canary_release if self.phase in (Phase.PROMOTING, Phase.PROMOTED) else self.stable_release

    @property
    def active(self) -> bool:
        """Whether the rollout is in progress; another one cannot start meanwhile."""
        return self.phase not in (Phase.PROMOTED, Phase.ROLLED_BACK)


def add_command(state: RolloutState, command: Command) -> RolloutState:
    """Adds a command to the state. A repeated id has no effect; a later command replaces a pending one.

    A pending rollback is never replaced by another command.
    """
    if command.id in state.commands_seen:
        return state
    remembered = (*state.commands_seen, command.id)[-MAX_REMEMBERED_COMMANDS:]
    waiting = state.command
    keep = waiting is not None and waiting.verb == "rollback" and command.verb != "rollback"
    return state.model_copy(update={"command": waiting if keep else command, "commands_seen": remembered})
