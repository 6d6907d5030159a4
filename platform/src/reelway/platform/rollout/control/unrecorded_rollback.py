"""The rollback that is written to the traffic although it cannot be recorded, and its record afterwards.

A state is recorded before the traffic is changed, with this exception. If the record of a rollback fails, its weights
are written to the traffic all the same, in one write with a mark (``routing.RollbackMark``) that says why and when. The
mark is the journal: it is there exactly if the weights are. Every controller that can record, this one or its
successor, takes over the mark as its own decision and records it. A recorded rollback is not recorded again, so it is
recorded once. Writing the recorded target then removes the mark.

While nothing can be recorded, another controller may have become active. It takes over the mark as well, so that the
two do not undo each other. A routing that neither stood there before nor is the marked one is the work of another
controller, and this one writes nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from reelway.platform.rollout.decision import Action, Decision
from reelway.platform.rollout.state import Phase, RolloutState
from reelway.platform.rollout.traffic.routing import RollbackMark, Routing
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget, marked

_REASON_CHARACTERS = 1_900


def can_roll_back(state: RolloutState) -> bool:
    """Returns whether a rollback of this recorded state is neither recorded nor impossible."""
    return state.phase not in (Phase.ROLLING_BACK, Phase.ROLLED_BACK) and not state.retired


def find_mark(state: RolloutState, observation: TrafficObservation) -> RollbackMark | None:
    """Returns the mark of this rollout in the traffic; None if there is none or the rollback is recorded."""
    configured = observation.configured
    if configured is None or configured.rollout != state.id or not can_roll_back(state):
        return None
    return configured.rollback


@dataclass
class UnrecordedRollback:
    """What a controller knows about a rollback that is not recorded. One thread at a time."""

    rollout: str = ""
    mark: RollbackMark | None = None
    """The decision of this process, or one that it has found in the traffic."""
    cut_off: bool = False
    """Whether the last record failed."""
    baseline: Routing | None = None
    """The routing when records began to fail; None if it is unknown."""
    superseded: bool = False
    """Whether another controller has written the traffic since then."""

    def observe(self, state: RolloutState, observation: TrafficObservation) -> None:
        """Compares the traffic with what this process knows of it."""
        if self.rollout != state.id or not can_roll_back(state):
            self.rollout, self.mark = state.id, None
        if (mark := find_mark(state, observation)) is not None:
            self.mark = mark
        configured = observation.configured
        if configured is None or not self.cut_off:
            return
        if self.baseline is None:
            self.baseline = configured
        foreign = configured != self.baseline and (configured.rollout != state.id or configured.rollback is None)
        self.superseded = self.superseded or foreign

    def record_failed(self) -> None:
        """States that a record failed."""
        self.cut_off = True

    def record_succeeded(self, state: RolloutState) -> None:
        """States that this state is recorded."""
        self.cut_off, self.baseline, self.superseded = False, None, False
        if not can_roll_back(state):
            self.mark = None

    def decision(self, state: RolloutState) -> Decision | None:
        """Returns the rollback that is to be recorded; None if there is none."""
        if self.mark is None or self.rollout != state.id or not can_roll_back(state):
            return None
        decided_at = datetime.fromtimestamp(self.mark.decided_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        reason = f"{self.mark.reason} (rolled back at {decided_at}, when it could not be recorded)"
        return Decision(Action.ROLL_BACK, reason, consumes_command=state.command is not None)

    def begin(self, state: RolloutState, decision: Decision, now: float) -> bool:
        """Makes a decision that could not be recorded the one to write. Returns whether it is a new one."""
        if self.mark is not None and self.rollout == state.id:
            return False
        self.rollout, self.mark = state.id, RollbackMark(reason=decision.reason[:_REASON_CHARACTERS], decided_at=now)
        return True

    def target(self, target: TrafficTarget) -> TrafficTarget:
        """Returns the target of the rollback, marked."""
        assert self.mark is not None
        return marked(target, self.mark)
