"""``RolloutStore`` over ReleaseRollout resources: the state of a rollout is stored in its status.

The resource version is the lock, so a lost update is rejected as it is by SQLite. A rollout that has not started is
read as pending; the operator starts it (``admission``), not the command that creates it. Alerts are stored in the
status of the latest rollout if they can concern it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError

from reelway.platform.cluster.kube_api import AbsentError, ConflictError, KubeApi
from reelway.platform.cluster.resources import (
    ALERTS_LIMIT,
    COMMANDS_LIMIT,
    GROUP,
    ROLLOUT_KIND,
    VERSION,
    AskedCommand,
    Backend,
    ReleaseRolloutSpec,
    ReleaseRolloutStatus,
    Resource,
)
from reelway.platform.cluster.shelf import PATH, Shelf, ToldShelf, read
from reelway.platform.cluster.status import REFUSED, drawn, not_begun
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.alerts import AlertKey, KnownAlert, names_release
from reelway.platform.rollout.policy import RolloutPolicy, default_policy
from reelway.platform.rollout.records import HistoryEntry, Rollout, Sighting, with_commands_since
from reelway.platform.rollout.state import Command, Phase, RolloutState, ask

LIVE: Final = "live"
"""Placeholder for the stable release of a rollout that has not started: the release that is live at its start."""
NOT_SEEN: Final = "the operator has not observed the rollout yet"
DELETED: Final = "the user who deleted it"
_ATTEMPTS: Final = 6
_SHOWN_OF_A_LOOK: Final = ("reached", "trouble", "detail", "failed", "ready", "releases", "routing")

Change = Callable[[Resource], ReleaseRolloutStatus | None]


class KubeRolloutStore:
    """The rollouts of one namespace, or the started rollouts of one backend (for its controller).

    Args:
        backend: key of the backend. None selects all rollouts, started or not (for commands).
        create_backend: backend of the rollouts that ``create`` creates.
        on_decision: called with each new history entry after it is written.

    Raises:
        KubernetesError: from every method, if the API server cannot be reached or rejects the request.
    """

    def __init__(
        self,
        api: KubeApi,
        shelf: Shelf,
        *,
        backend: str | None = None,
        made_for: Backend | None = None,
        told: Callable[[Resource, HistoryEntry], None] = lambda *_: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._shelf = api, shelf
        self._backend, self._made_for = backend, made_for
        self._told, self._clock = told, clock
        self._writing = threading.RLock()
        self._seen: dict[str, Sighting] = {}

    def create(self, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Creates the resource; the operator starts the rollout. Several rollouts of one backend may wait.

        Raises:
            RolloutError: if a rollout of that name exists or the API server rejects the resource.
        """
        if self._made_for is None:
            raise RolloutError("cannot create a rollout without a backend; name a RayService with --ray-service")
        stable = None if state.stable_release == LIVE else state.stable_release
        asked = {"release": state.canary_release, "stable_release": stable, "force": state.forced}
        try:
            spec = ReleaseRolloutSpec.model_validate(
                {**asked, "policy": policy, "backend": self._made_for, "note": state.reason}
            )
        except ValidationError as error:
            wrong = error.errors()[0]
            raise RolloutError(f"spec.{wrong['loc'][0]}: saw {wrong['input']!r}: {wrong['msg']}") from error
        try:
            made = self._api.create(PATH, {**_head(state.id), "spec": _spec_document(spec)})
        except ConflictError:
            raise RolloutError(f"cannot create rollout {state.id}: it exists; choose another name") from None
        except AbsentError as error:
            raise RolloutError(f"{error}; check that Reelway's CRDs are installed") from error
        except KubernetesError as error:
            raise RolloutError(str(error)) from error
        resource = read(made)
        self._shelf.put(resource)
        return rollout_of(resource)

    def get(self, rollout_id: str) -> Rollout:
        return rollout_of(self._find(rollout_id))

    def latest(self) -> Rollout | None:
        resource = self._latest()
        return rollout_of(resource) if resource else None

    def phase(self, rollout_id: str) -> str:
        """Returns ``status.phase``, which has two values that a ``RolloutState`` has not: Waiting and Refused."""
        return self._find(rollout_id).status.phase

    def all(self) -> Sequence[Rollout]:
        return [rollout_of(resource) for resource in self._mine()]

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        numbered = entry and entry.model_copy(update={"number": self._next_number()})

        def change(resource: Resource) -> ReleaseRolloutStatus:
            newest, status = rollout_of(resource), resource.status
            merged = with_commands_since(before, newest, state) if newest.version != before.version else state
            history = (*status.history, numbered) if numbered else status.history
            sighting = self._seen.get(state.id, status.last_reconcile)
            return drawn(
                resource,
                status.model_copy(
                    update={"state": merged, "policy": before.policy, "version": status.version + 1,
                            "history": history, "last_reconcile": sighting}
                ),
                self._clock(),
            )  # fmt: skip

        written = self._write(self._find(before.state.id, exact=True), change)
        if numbered:
            self._told(written, numbered)
        return rollout_of(written)

    def begin(self, resource: Resource, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Writes the first state of a rollout. Raises RolloutError if it has started."""

        def change(newest: Resource) -> ReleaseRolloutStatus:
            if newest.status.state is not None:
                raise RolloutError(f"rollout {newest.name} has started; check that no second operator runs")
            made = ReleaseRolloutStatus(
                state=state, policy=policy, version=newest.status.version + 1, conditions=newest.status.conditions
            )
            return drawn(newest, made, self._clock())

        return rollout_of(self._write(resource, change))

    def set_aside(self, resource: Resource, phase: str, reason: str) -> bool:
        """Writes why a rollout has not started. Returns False if the status said so before."""
        if (resource.status.phase, resource.status.reason) == (phase, reason):
            return False
        self._write(
            resource, lambda newest: None if newest.status.state else not_begun(newest, phase, reason, self._clock())
        )
        return True

    def supersede(self, resource: Resource, by: Resource) -> None:
        """Writes that another rollout started after this one, so that this one is no longer reconciled."""
        self._write(resource, lambda newest: newest.status.model_copy(update={"superseded_by": by.rollout_id}))

    def ask(self, rollout_id: str, command: Command) -> Rollout:
        """Adds the command to ``spec.commands`` in one patch. Only the operator writes the status."""
        resource = self._find(rollout_id)
        asked = AskedCommand.model_validate(command.model_dump())
        for _ in range(_ATTEMPTS):
            given = resource.spec.commands
            if any(known.id == asked.id for known in given) or asked.id in _commands_seen(resource):
                return rollout_of(resource)
            kept = (*_not_seen(resource), asked)
            if len(kept) > COMMANDS_LIMIT:
                raise RolloutError(
                    f"cannot add a command to {resource.name}: {len(kept) - 1} of at most {COMMANDS_LIMIT} commands "
                    "wait; check that the operator runs"
                )
            change = {
                "metadata": {"resourceVersion": resource.resource_version},
                "spec": {"commands": [one.document() for one in kept]},
            }
            try:
                resource = read(self._api.patch(f"{PATH}/{resource.name}", change))
            except ConflictError:
                resource = self._ask_again(resource)
                continue
            self._shelf.put(resource)
            return rollout_of(resource)
        raise RolloutError(f"cannot write rollout {resource.name}: it changed {_ATTEMPTS} times meanwhile; try again")

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        some = [self._find(rollout_id)] if rollout_id is not None else self._mine()
        entries = [entry for resource in some for entry in resource.status.history]
        return sorted(entries, key=lambda entry: entry.number)

    def alerts(self) -> dict[AlertKey, KnownAlert]:
        resource = self._latest()
        return {alert.key: alert for alert in resource.status.alerts} if resource else {}

    def replace_alerts(self, book: Mapping[AlertKey, KnownAlert]) -> None:
        """Stores the alerts that name the latest rollout's release and began after the rollout did."""
        resource = self._latest()
        if resource is None or resource.status.state is None:
            return

        def change(newest: Resource) -> ReleaseRolloutStatus | None:
            kept = _about(book.values(), newest.status.state)
            return None if kept == newest.status.alerts else newest.status.model_copy(update={"alerts": kept})

        self._write(resource, change)

    def see(self, sighting: Sighting) -> None:
        """Writes a reconcile at once if its outcome differs from the last one, otherwise with the next record."""
        self._seen[sighting.rollout_id] = sighting

        def change(resource: Resource) -> ReleaseRolloutStatus | None:
            if _alike(sighting, resource.status.last_reconcile):
                return None
            return drawn(resource, resource.status.model_copy(update={"last_reconcile": sighting}), self._clock())

        self._write(self._find(sighting.rollout_id, exact=True), change)

    def sighting(self, rollout_id: str) -> Sighting | None:
        resource = self._find(rollout_id)
        return self._seen.get(resource.rollout_id, resource.status.last_reconcile)

    def changes(self, *, own: bool = True) -> int:
        return self._shelf.changes(own=own)

    def _mine(self) -> list[Resource]:
        """Returns the rollouts in scope, oldest first; a controller's scope is the started rollouts of its backend."""
        mine = [
            resource
            for resource in self._shelf.all()
            if self._backend is None or (resource.status.state and resource.spec.backend.key == self._backend)
        ]
        return sorted(mine, key=_order)

    def _latest(self) -> Resource | None:
        """Returns the rollout that the controller reconciles; for commands, the next one if that one has ended."""
        mine = self._mine()
        begun = [resource for resource in mine if resource.status.state]
        if self._backend is not None:
            return next((one for one in reversed(begun) if not one.status.superseded_by), None)
        if begun and begun[-1].status.state and begun[-1].status.state.active:
            return begun[-1]
        return mine[-1] if mine else None

    def _find(self, rollout_id: str, *, exact: bool = False) -> Resource:
        mine = self._mine()
        whole = [one for one in mine if rollout_id in (one.rollout_id, one.name)]
        found = whole or [one for one in mine if not exact and rollout_id and one.rollout_id.startswith(rollout_id)]
        if not found:
            raise RolloutError(
                f"rollout {rollout_id!r} does not exist; `reelway rollout history --all` lists all rollouts"
            )
        if len(found) > 1:
            some = ", ".join(one.name for one in found[:3])
            raise RolloutError(f"rollout id {rollout_id!r} is ambiguous ({some} ...); type more of it")
        return found[0]

    def _next_number(self) -> int:
        numbers = [entry.number for resource in self._shelf.all() for entry in resource.status.history[-1:]]
        return max(numbers, default=0) + 1

    def _write(self, resource: Resource, change: Change) -> Resource:
        """Writes the status that ``change`` returns for the latest resource; None writes nothing."""
        with self._writing:
            for _ in range(_ATTEMPTS):
                status = change(resource)
                if status is None:
                    return resource
                if isinstance(self._shelf, ToldShelf):
                    self._shelf.expect(resource.uid, status.version)
                try:
                    written = read(
                        self._api.replace(f"{PATH}/{resource.name}/status", _status_document(resource, status))
                    )
                except ConflictError:
                    resource = self._ask_again(resource)
                except AbsentError:
                    raise RolloutError(f"cannot write rollout {resource.name}: it was deleted") from None
                else:
                    self._shelf.put(written)
                    return written
        raise RolloutError(f"cannot write rollout {resource.name}: it changed {_ATTEMPTS} times meanwhile; try again")

    def _ask_again(self, resource: Resource) -> Resource:
        document = self._api.get(f"{PATH}/{resource.name}")
        if document is None or document["metadata"]["uid"] != resource.uid:
            raise RolloutError(f"cannot write rollout {resource.name}: it was deleted")
        newest = read(document)
        self._shelf.put(newest)
        return newest


def rollout_of(resource: Resource) -> Rollout:
    """Converts a resource: the recorded state plus the commands of its spec that the state does not contain.

    The deletion of an active rollout counts as a rollback command.
    """
    status, spec = resource.status, resource.spec
    policy = status.policy or spec.policy or default_policy()
    state = status.state or _not_begun(resource)
    for asked in spec.commands:
        state = ask(state, asked.command)
    if resource.deleting and state.active and status.state is not None:
        state = ask(state, Command(id=f"deleted-{resource.uid[:8]}", verb="rollback", actor=DELETED))
    return Rollout(state=state, policy=policy, version=max(1, resource.version + resource.deleting))


def _not_begun(resource: Resource) -> RolloutState:
    made_at = datetime.fromisoformat(resource.created_at).timestamp()
    refused = resource.status.phase == REFUSED
    return RolloutState(
        id=resource.rollout_id,
        stable_release=resource.spec.stable_release or LIVE,
        canary_release=resource.spec.release,
        phase=Phase.ROLLED_BACK if refused else Phase.PENDING,
        started_at=made_at,
        changed_at=made_at,
        tick_at=made_at,
        forced=resource.spec.force,
        reason=resource.status.reason or NOT_SEEN,
    )


def _order(resource: Resource) -> tuple[float, str, str]:
    state = resource.status.state
    begun_at = state.started_at if state else float("inf")
    return (begun_at, resource.created_at, resource.name)


def _commands_seen(resource: Resource) -> Sequence[str]:
    return resource.status.state.commands_seen if resource.status.state else ()


def _not_seen(resource: Resource) -> list[AskedCommand]:
    """Returns the commands of the spec; the oldest ones that were processed make room for new ones."""
    seen, given = set(_commands_seen(resource)), list(resource.spec.commands)
    while len(given) >= COMMANDS_LIMIT and given[0].id in seen:
        given.pop(0)
    return given


def _about(alerts: Any, state: RolloutState | None) -> tuple[KnownAlert, ...]:
    if state is None:
        return ()
    about = [
        alert
        for alert in alerts
        if alert.starts_at >= state.started_at
        and names_release(dict(alert.labels).get("release", ""), state.canary_release)
    ]
    return tuple(sorted(about, key=lambda alert: (alert.starts_at, alert.group_key, alert.labels))[-ALERTS_LIMIT:])


def _alike(one: Sighting, other: Sighting | None) -> bool:
    if other is None or one.action != other.action:
        return False
    return all(one.traffic.get(key) == other.traffic.get(key) for key in _SHOWN_OF_A_LOOK)


def _head(name: str) -> dict[str, Any]:
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": ROLLOUT_KIND, "metadata": {"name": name}}


def _spec_document(spec: ReleaseRolloutSpec) -> dict[str, Any]:
    document = spec.document()
    if spec.policy is not None:  # null disables a guardrail, so nulls are kept
        document["policy"] = spec.policy.model_dump(mode="json")
    return document


def _status_document(resource: Resource, status: ReleaseRolloutStatus) -> dict[str, Any]:
    document = status.document()
    parts = {"state": status.state, "policy": status.policy, "lastReconcile": status.last_reconcile}
    document |= {name: part.model_dump(mode="json") for name, part in parts.items() if part is not None}
    document["history"] = [entry.model_dump(mode="json") for entry in status.history]
    head = _head(resource.name)
    head["metadata"] |= {"namespace": resource.namespace, "resourceVersion": resource.resource_version}
    return {**head, "status": document}
