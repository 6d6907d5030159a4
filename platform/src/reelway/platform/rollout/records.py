"""Why: what is written down of a rollout, apart from where. One shape for SQLite here and a resource's status there.

Types and the interface of a store; no I/O. The rule of the controller stands on it: a state is recorded before the
world is changed for it.
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
    """A rollout as it is stored. ``version`` grows with every change; a writer names the one that it read."""

    state: RolloutState
    policy: RolloutPolicy
    version: int = Field(ge=1)


class HistoryEntry(_Record):
    """One decision that changed something, or was refused. ``reason`` is the decision's, word for word."""

    number: int = Field(default=0, description="given by the store, ascending over all rollouts")
    rollout_id: str
    time: float
    action: str
    reason: str
    phase_before: str
    phase: str
    step: int
    canary_bp: int
    evidence: dict[str, Any] = Field(
        default_factory=dict, description="`summary_of` the assessment that the decision was made on"
    )


class Sighting(_Record):
    """What the controller saw at its last look, for people: overwritten at every look, never decided upon."""

    rollout_id: str
    time: float
    action: str
    reason: str
    evidence: dict[str, Any] = Field(default_factory=dict)
    traffic: dict[str, Any] = Field(default_factory=dict)


class RolloutStore(Protocol):
    """Where rollouts are kept. Every method is one transaction, and safe between processes."""

    def create(self, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Raises RolloutError: one is under way already."""
        ...

    def get(self, rollout_id: str) -> Rollout:
        """By id or its unique beginning. Raises RolloutError: there is none, or several."""
        ...

    def latest(self) -> Rollout | None:
        """The newest one, whatever its phase."""
        ...

    def all(self) -> Sequence[Rollout]:
        """Oldest first."""
        ...

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        """Write the new state and its history entry, durably, before anything is done for it.

        Commands asked for since ``before`` was read are kept. Raises RolloutError: somebody else wrote it meanwhile.
        """
        ...

    def ask(self, rollout_id: str, command: Command) -> Rollout:
        """Put a person's command into the newest state (``state.ask``)."""
        ...

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        """Oldest first; of all rollouts when no id is given."""
        ...

    def alerts(self) -> dict[AlertKey, KnownAlert]: ...

    def replace_alerts(self, book: Mapping[AlertKey, KnownAlert]) -> None: ...

    def see(self, sighting: Sighting) -> None: ...

    def sighting(self, rollout_id: str) -> Sighting | None: ...

    def changes(self, *, own: bool = True) -> int:
        """A number that differs after any write by anybody: cheap enough to ask ten times a second.

        ``own`` False leaves out what was written through this object.
        """
        ...


def with_commands_since(before: Rollout, newest: Rollout, state: RolloutState) -> RolloutState:
    """``state``, decided upon ``before``, with the commands that ``newest`` has beyond it.

    Raises:
        RolloutError: more than commands differs: somebody else moved the rollout.
    """
    command = {"command": None, "commands_seen": ()}
    if newest.state.model_copy(update=command) != before.state.model_copy(update=command):
        raise RolloutError(
            f"rollout {state.id} is at version {newest.version} ({newest.state.phase}), was read at {before.version} "
            f"({before.state.phase}); somebody else moved it, nothing was written; is there a second controller?"
        )
    # The command that was read was dealt with by ``state``; only one that came after it is still to be done.
    asked = newest.state.command if newest.state.command != before.state.command else state.command
    return state.model_copy(update={"command": asked, "commands_seen": newest.state.commands_seen})
