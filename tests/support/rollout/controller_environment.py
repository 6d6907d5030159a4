"""A controller with a real store, named evidence, traffic in a file and a manual clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.support.rollout.canary_events import POLICY, RELEASE, STABLE, HistoryGenerator

from reelway.platform.errors import RolloutError, StorageError
from reelway.platform.rollout.alerts import KnownAlert, PolledAlerts, Relevance
from reelway.platform.rollout.control.alert_registry import AlertRegistry
from reelway.platform.rollout.control.controller import Controller
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.decision import start_state
from reelway.platform.rollout.evidence import EvidenceSnapshot
from reelway.platform.rollout.policy import RolloutPolicy, parse_policy
from reelway.platform.rollout.records import HistoryEntry, Rollout, RolloutStore
from reelway.platform.rollout.state import RolloutState
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget

QUICK = parse_policy(POLICY, source="quick")
KINDS = HistoryGenerator(0).kinds


class FileBackend:
    """Traffic in a file, which survives a killed process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            self.write(TrafficTarget(Routing.single_release(STABLE), (STABLE,)))

    def write(self, target: TrafficTarget) -> None:
        """Writes the traffic, as ``apply`` or a manual change does."""
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps({"routing": target.routing.model_dump(mode="json"), "releases": target.releases}))
        aside.replace(self.path)

    def read(self) -> TrafficTarget:
        seen = json.loads(self.path.read_text())
        return TrafficTarget(Routing.model_validate(seen["routing"]), tuple(seen["releases"]))

    def observe(self) -> TrafficObservation:
        seen = self.read()
        return TrafficObservation(seen.routing, seen.releases, frozenset(seen.releases), configured=seen.routing)

    def apply(self, target: TrafficTarget) -> None:
        self.write(target)


def nothing(*_: object) -> None:
    """Default of the hooks around a write."""


@dataclass
class HookedBackend:
    """Wraps a backend and calls ``before`` and ``after`` around every write.

    With ``blind``, ``observe`` returns nothing.
    """

    inner: FileBackend
    before: Callable[[TrafficTarget], None] = nothing
    after: Callable[[TrafficTarget], None] = nothing
    blind: bool = False

    def observe(self) -> TrafficObservation:
        return TrafficObservation(detail="not reachable") if self.blind else self.inner.observe()

    def apply(self, target: TrafficTarget) -> None:
        self.before(target)
        self.inner.apply(target)
        self.after(target)


@dataclass
class ScriptedEvidence:
    """Returns evidence of a kind of ``canary_events``; raises for any other name."""

    kind: str = "good"
    asked: int = 0

    def fetch(self, policy: RolloutPolicy, state: RolloutState, now: float) -> EvidenceSnapshot:
        del policy, state
        self.asked += 1
        if self.kind not in KINDS:
            raise RolloutError(f"evidence: {self.kind}")
        return replace(KINDS[self.kind], time=now, alerts=())


class HookedStore(SqliteRolloutStore):
    """A SQLite store that calls ``before`` and ``after`` around every record."""

    before: Callable[[], None] = staticmethod(nothing)
    after: Callable[[], None] = staticmethod(nothing)

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        self.before()
        written = super().record(before, state, entry)
        self.after()
        return written


@dataclass
class Clock:
    now: float = 10_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class ControllerEnvironment:
    """A controller with its store, traffic and clock in one folder."""

    folder: Path
    policy: RolloutPolicy = QUICK
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.store = HookedStore(self.folder / "state.db")
        self.backend = HookedBackend(FileBackend(self.folder / "traffic.json"))
        self.source = ScriptedEvidence()
        self.restart()

    def restart(self) -> None:
        """Creates a new controller over the same store and traffic."""
        self.book = AlertRegistry(self.store)
        self.controller = Controller(self.store, self.backend, self.source, self.book, clock=self.clock)

    def begin(self, rollout_id: str = "r-1") -> Rollout:
        state = start_state(
            self.policy, rollout_id=rollout_id, canary_release=RELEASE, stable_release=STABLE, now=self.clock.now
        )
        return self.store.create(state.model_copy(update={"salt": "the same in every run"}), self.policy)

    def tick(self, times: int = 1, *, after_s: float = 30.0) -> list[str]:
        """Reconciles ``times`` times, ``after_s`` apart, and returns the actions."""
        actions = []
        for _ in range(times):
            self.clock.now += after_s
            decision = self.controller.reconcile()
            actions.append(decision.action.value if decision else "-")
        return actions

    @property
    def state(self) -> RolloutState:
        return newest(self.store).state

    @property
    def traffic(self) -> TrafficTarget:
        return self.backend.inner.read()

    def alert(self, *, release: str = RELEASE, resolved: bool = False, starts_at: float | None = None) -> None:
        """Delivers an alert as the webhook does."""
        self.book.deliver([firing(release, self.clock.now if starts_at is None else starts_at, resolved=resolved)])


def firing(release: str, starts_at: float, *, resolved: bool = False) -> KnownAlert:
    labels = (("alertname", "CanaryErrors"), ("release", release))
    return KnownAlert(group_key="g", labels=labels, starts_at=starts_at, resolved=resolved, summary="many errors")


def newest(store: RolloutStore) -> Rollout:
    latest = store.latest()
    assert latest is not None
    return latest


def moves(entries: Iterable[HistoryEntry]) -> list[str]:
    return [entry.action for entry in entries]


def stepping(world: ControllerEnvironment) -> ControllerEnvironment:
    """A rollout at its first step."""
    world.begin()
    assert world.tick(2) == ["prepare", "step"]
    return world


def disk_full() -> None:
    raise StorageError("disk full")


class FakeAlertSource:
    """An alert source with the test's alerts."""

    def __init__(self) -> None:
        self.answer: list[KnownAlert] | None = []
        self.problem = ""

    def poll(self, is_relevant: Relevance) -> PolledAlerts:
        if self.answer is None:
            raise RolloutError("Alertmanager: connection refused")
        return PolledAlerts(tuple(one for one in self.answer if is_relevant(dict(one.labels))), self.problem)
