"""Stored records of rollouts, and the interface of a rollout store.

SQLite stores them in local mode, the status of a ReleaseRollout on a cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from reelway.platform.errors import RolloutError
from reelway.platform.rollout.alerts import AlertKey, KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import Command, RolloutState


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rollout(_Record):
    """A stored rollout. ``version`` increases with every change; a writer passes the version that it read."""

    state: RolloutState
    policy: RolloutPolicy
    version: int = Field(ge=1)


class HistoryEntry(_Record):
    """A decision that changed the rollout or rejected a command. ``reason`` is the decision's, verbatim."""

    number: int = Field(default=0, description="assigned by the store, ascending over all rollouts")
    rollout_id: str
    time: float
    action: str
    reason: str
    phase_before: str
    phase: str
    step: int
    canary_bp: int
    evidence: dict[str, Any] = Field(
        default_factory=dict, description="`summarise_evidence` of the assessment behind the decision"
    )


class LastReconcile(_Record):
    """What the controller observed in its last reconcile. For display only: it is overwritten each time and is no input
    to a decision.
    """

    rollout_id: str
    time: float
    action: str
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    traffic: dict[str, Any] = Field(default_factory=dict)


class RolloutStore(Protocol):
    """Stores rollouts. Every method is one transaction and safe across processes."""

    def create(self, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Stores a new rollout. Raises RolloutError if a rollout is in progress."""
        ...

    def get(self, rollout_id: str) -> Rollout:
        """Returns the rollout with this id or unique prefix. Raises RolloutError if none or several match."""
        ...

    def latest(self) -> Rollout | None:
        """Returns the latest rollout, in any phase."""
        ...

    def all(self) -> Sequence[Rollout]:
        """Returns all rollouts, oldest first."""
        ...

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        """Writes the new state and its history entry durably.

        Keeps commands that were submitted after ``before`` was read. Raises RolloutError if another writer changed the
        rollout meanwhile.
        """
        ...

    def submit_command(self, rollout_id: str, command: Command) -> Rollout:
        """Adds a user's command to the newest state (``state.add_command``)."""
        ...

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        """Returns the history entries of one rollout, or of all rollouts, oldest first."""
        ...

    def alerts(self) -> dict[AlertKey, KnownAlert]: ...

    def replace_alerts(self, alerts: Mapping[AlertKey, KnownAlert]) -> None: ...

    def save_last_reconcile(self, last_reconcile: LastReconcile) -> None: ...

    def last_reconcile(self, rollout_id: str) -> LastReconcile | None: ...

    def revision(self, *, include_own: bool = True) -> int:
        """Returns a number that changes with every write. Cheap enough to poll ten times a second.

        Args:
            include_own: whether writes through this object count.
        """
        ...


def with_commands_since(before: Rollout, newest: Rollout, state: RolloutState) -> RolloutState:
    """Returns ``state``, which was decided from ``before``, with the commands that ``newest`` has in addition.

    Raises:
        RolloutError: if more than commands differs, because another writer changed the rollout.
    """
    command = {"command": None, "commands_seen": ()}
    if newest.state.model_copy(update=command) != before.state.model_copy(update=command):
        raise RolloutError(
            f"rollout {state.id} is at version {newest.version} ({newest.state.phase}), was read at {before.version} "
            f"({before.state.phase}); another writer changed it, nothing was written; stop any second controller"
        )
    # ``state`` has handled the command that was read; only a later command is still pending.
    pending = newest.state.command if newest.state.command != before.state.command else state.command
    return state.model_copy(update={"command": pending, "commands_seen": newest.state.commands_seen})
