"""Why: a rollout's whole memory, small enough to be written before every act and read back after a crash.

Immutable; refuses to hold evidence (it can be fetched again) and to know what happens next (``decision`` does). Timers
are sums of observed ticks, not differences of clock readings: a clock that jumps cannot end a hold or a deadline.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reelway.platform.contracts.events import Arm
from reelway.platform.rollout.sequential import BASIS_POINTS


class Phase(StrEnum):
    """Where a rollout is. ``promoted`` and ``rolled_back`` are final, but for a rollback while the old one is warm."""

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


RAMPING = frozenset({Phase.STEPPING, Phase.HOLDING, Phase.PAUSED})
ON_STABLE = frozenset({Phase.PENDING, Phase.PREPARING, Phase.SHADOW, Phase.ROLLING_BACK, Phase.ROLLED_BACK})

Verb = Literal["pause", "resume", "promote", "rollback"]
REMEMBERED_COMMANDS = 32


class Command(BaseModel):
    """What a person asked for. ``id`` makes asking twice the same as asking once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    verb: Verb
    actor: str = "unknown"
    force: bool = False
    note: str = ""


class RolloutState(BaseModel):
    """One rollout from start to end. All times are seconds since the epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    stable_release: str
    canary_release: str
    phase: Phase = Phase.PENDING
    step: int = Field(default=-1, ge=-1, description="index into the policy's steps; -1 before the first")
    canary_bp: int = Field(default=0, ge=0, le=BASIS_POINTS)
    holdout_bp: int = Field(default=0, ge=0, lt=BASIS_POINTS)
    shadow_bp: int = Field(default=0, ge=0, le=BASIS_POINTS, description="mirrored on top, not a part of the weights")
    started_at: float
    changed_at: float = Field(description="clock at the last change of phase or step; for people, never for timers")
    tick_at: float = Field(description="clock at the last decision")
    evidence_at: float = Field(default=0.0, description="time of the newest evidence judged; 0 before the first")
    phase_s: float = Field(default=0, ge=0, description="observed in this phase or step; holding does not restart it")
    held_insufficient_s: float = Field(default=0, ge=0)
    held_telemetry_s: float = Field(default=0, ge=0)
    command: Command | None = None
    commands_seen: tuple[str, ...] = ()
    retired: bool = Field(default=False, description="promoted, and the previous release need not be kept any more")
    forced: bool = Field(default=False, description="started with --force, past a rollback or a cooldown")
    reason: str = ""

    @model_validator(mode="after")
    def _weights_leave_room(self) -> RolloutState:
        if self.canary_bp + self.holdout_bp > BASIS_POINTS:
            raise ValueError(f"canary {self.canary_bp} + holdout {self.holdout_bp} basis points exceed {BASIS_POINTS}")
        if self.stable_release == self.canary_release:
            raise ValueError(f"release {self.canary_release[:12]} cannot be rolled out over itself")
        return self

    @property
    def weights(self) -> dict[Arm, int]:
        """Basis points by arm; they sum to 10,000 whatever the phase."""
        return {
            Arm.STABLE: BASIS_POINTS - self.canary_bp - self.holdout_bp,
            Arm.CANARY: self.canary_bp,
            Arm.HOLDOUT: self.holdout_bp,
        }

    @property
    def warm_releases(self) -> frozenset[str]:
        """Releases that must be up at the capacity for *all* traffic: a rollback is a weight write, never a start."""
        return frozenset({self.canary_release}) if self.retired else frozenset({self.stable_release})

    @property
    def deployed_releases(self) -> frozenset[str]:
        """Releases that must be running at all."""
        if self.phase is Phase.PENDING or self.phase is Phase.ROLLED_BACK:
            return frozenset({self.stable_release})
        if self.retired:
            return frozenset({self.canary_release})
        return frozenset({self.stable_release, self.canary_release})

    @property
    def live_release(self) -> str:
        """The release that a new rollout would be compared with."""
        return self.canary_release if self.phase in (Phase.PROMOTING, Phase.PROMOTED) else self.stable_release

    @property
    def active(self) -> bool:
        """Whether it still moves by itself; a new rollout has to wait for it."""
        return self.phase not in (Phase.PROMOTED, Phase.ROLLED_BACK)


def ask(state: RolloutState, command: Command) -> RolloutState:
    """Put a person's command into the state; the same id twice changes nothing, and a later one replaces an earlier.

    A rollback that waits is never replaced by anything milder.
    """
    if command.id in state.commands_seen:
        return state
    seen = (*state.commands_seen, command.id)[-REMEMBERED_COMMANDS:]
    waiting = state.command
    keep = waiting is not None and waiting.verb == "rollback" and command.verb != "rollback"
    return state.model_copy(update={"command": waiting if keep else command, "commands_seen": seen})
