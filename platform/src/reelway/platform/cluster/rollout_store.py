"""Why: on a cluster the memory of a rollout is its resource's status, so that whoever looks sees what is acted upon.

``records.RolloutStore`` over ReleaseRollouts: the resource version is the lock, a lost update is refused like SQLite's.
A rollout that has not begun is read as pending; the operator begins it (``admission``), never who made it. Alerts lie
in the status of the newest rollout, as far as they can concern it. It decides nothing.
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
"""Stands for the stable release of a rollout that has not begun: whatever is live then."""
NOT_SEEN: Final = "the operator has not seen it yet"
DELETED: Final = "whoever deleted it"
_ATTEMPTS: Final = 6
_SHOWN_OF_A_LOOK: Final = ("reached", "trouble", "detail", "failed", "ready", "releases", "routing")

Change = Callable[[Resource], ReleaseRolloutStatus | None]


class KubeRolloutStore:
    """The rollouts of one namespace, or those of one backend of it that have begun (for its controller).

    Args:
        backend: key of the backend; None for all, begun or not (for people).
        made_for: the backend of rollouts that ``create`` makes.
        told: called with each new history entry once it is written.

    Raises:
        KubernetesError: the API server could not be reached or refused. Every method may raise this.
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
        """Make the resource; the operator begins it when it is its turn. Unlike a file it takes one beside another.

        Raises:
            RolloutError: there is one of that name, or the API server refuses it.
        """
        if self._made_for is None:
            raise RolloutError("a rollout needs a backend; name a RayService with --ray-service")
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
            raise RolloutError(f"there is a rollout {state.id} already; give another name") from None
        except AbsentError as error:
            raise RolloutError(f"{error}; are Reelway's CRDs installed?") from error
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
        """As ``status.phase`` says it: also Waiting and Refused, which no state knows."""
        return self._find(rollout_id).status.phase

    def all(self) -> Sequence[Rollout]:
        return [rollout_of(resource) for resource in self._mine()]

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        numbered = entry and entry.model_copy(update={"number": self._next_number()})

        def change(resource: Resource) -> ReleaseRolloutStatus:
            newest, status = rollout_of(resource), resource.status
            merged = with_commands_since(before, newest, state) if newest.version != before.version else state
            history = (*status.history, numbered) if numbered else status.history
            sighting = self._seen.get(state.id, status.sighting)
            return drawn(
                resource,
                status.model_copy(
                    update={"state": merged, "policy": before.policy, "version": status.version + 1,
                            "history": history, "sighting": sighting}
                ),
                self._clock(),
            )  # fmt: skip

        written = self._write(self._find(before.state.id, exact=True), change)
        if numbered:
            self._told(written, numbered)
        return rollout_of(written)

    def begin(self, resource: Resource, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Write the first state of a rollout. Raises RolloutError: it has begun already."""

        def change(newest: Resource) -> ReleaseRolloutStatus:
            if newest.status.state is not None:
                raise RolloutError(f"rollout {newest.name} has begun already; is there a second operator?")
            made = ReleaseRolloutStatus(
                state=state, policy=policy, version=newest.status.version + 1, conditions=newest.status.conditions
            )
            return drawn(newest, made, self._clock())

        return rollout_of(self._write(resource, change))

    def set_aside(self, resource: Resource, phase: str, reason: str) -> bool:
        """Write that a rollout has not begun, and why. Whether that is news."""
        if (resource.status.phase, resource.status.reason) == (phase, reason):
            return False
        self._write(
            resource, lambda newest: None if newest.status.state else not_begun(newest, phase, reason, self._clock())
        )
        return True

    def supersede(self, resource: Resource, by: Resource) -> None:
        """It is followed no longer; another one begins."""
        self._write(resource, lambda newest: newest.status.model_copy(update={"superseded_by": by.rollout_id}))

    def ask(self, rollout_id: str, command: Command) -> Rollout:
        """Add the command to ``spec.commands``: one patch, and nobody but the operator writes a status."""
        resource = self._find(rollout_id)
        asked = AskedCommand.model_validate(command.model_dump())
        for _ in range(_ATTEMPTS):
            given = resource.spec.commands
            if any(known.id == asked.id for known in given) or asked.id in _commands_seen(resource):
                return rollout_of(resource)
            kept = (*_not_seen(resource), asked)
            if len(kept) > COMMANDS_LIMIT:
                raise RolloutError(
                    f"{len(kept) - 1} commands of {resource.name} wait already, at most {COMMANDS_LIMIT} may; "
                    "does the operator run?"
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
        raise RolloutError(f"rollout {resource.name} changed {_ATTEMPTS} times while it was written; try again")

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        some = [self._find(rollout_id)] if rollout_id is not None else self._mine()
        entries = [entry for resource in some for entry in resource.status.history]
        return sorted(entries, key=lambda entry: entry.number)

    def alerts(self) -> dict[AlertKey, KnownAlert]:
        resource = self._latest()
        return {alert.key: alert for alert in resource.status.alerts} if resource else {}

    def replace_alerts(self, book: Mapping[AlertKey, KnownAlert]) -> None:
        """Keeps what can concern the newest rollout: alerts that name its release and began after it did."""
        resource = self._latest()
        if resource is None or resource.status.state is None:
            return

        def change(newest: Resource) -> ReleaseRolloutStatus | None:
            kept = _about(book.values(), newest.status.state)
            return None if kept == newest.status.alerts else newest.status.model_copy(update={"alerts": kept})

        self._write(resource, change)

    def see(self, sighting: Sighting) -> None:
        """Written at once when something else is seen than before; otherwise with the next record."""
        self._seen[sighting.rollout_id] = sighting

        def change(resource: Resource) -> ReleaseRolloutStatus | None:
            if _alike(sighting, resource.status.sighting):
                return None
            return drawn(resource, resource.status.model_copy(update={"sighting": sighting}), self._clock())

        self._write(self._find(sighting.rollout_id, exact=True), change)

    def sighting(self, rollout_id: str) -> Sighting | None:
        resource = self._find(rollout_id)
        return self._seen.get(resource.rollout_id, resource.status.sighting)

    def changes(self, *, own: bool = True) -> int:
        return self._shelf.changes(own=own)

    def _mine(self) -> list[Resource]:
        """Oldest first. A controller's are those that have begun."""
        mine = [
            resource
            for resource in self._shelf.all()
            if self._backend is None or (resource.status.state and resource.spec.backend.key == self._backend)
        ]
        return sorted(mine, key=_order)

    def _latest(self) -> Resource | None:
        """For a controller the one that it follows; for people that one too, or the one that comes after it."""
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
            raise RolloutError(f"there is no rollout {rollout_id!r}; `reelway rollout history --all` names them")
        if len(found) > 1:
            some = ", ".join(one.name for one in found[:3])
            raise RolloutError(f"{rollout_id!r} begins several rollouts ({some} ...); give more of the id")
        return found[0]

    def _next_number(self) -> int:
        numbers = [entry.number for resource in self._shelf.all() for entry in resource.status.history[-1:]]
        return max(numbers, default=0) + 1

    def _write(self, resource: Resource, change: Change) -> Resource:
        """Write a status on top of the newest one. ``change`` gives None when there is nothing to write."""
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
                    raise RolloutError(f"rollout {resource.name} was deleted meanwhile") from None
                else:
                    self._shelf.put(written)
                    return written
        raise RolloutError(f"rollout {resource.name} changed {_ATTEMPTS} times while it was written; try again")

    def _ask_again(self, resource: Resource) -> Resource:
        document = self._api.get(f"{PATH}/{resource.name}")
        if document is None or document["metadata"]["uid"] != resource.uid:
            raise RolloutError(f"rollout {resource.name} was deleted meanwhile")
        newest = read(document)
        self._shelf.put(newest)
        return newest


def rollout_of(resource: Resource) -> Rollout:
    """A resource as the rollout that it is: the recorded state with the commands in it that it has not seen.

    Deleting a rollout that is under way is asking for its rollback.
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
    """The newest commands, without those dealt with that must make room for others."""
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
    if spec.policy is not None:  # null switches a guardrail off, so it has to be said
        document["policy"] = spec.policy.model_dump(mode="json")
    return document


def _status_document(resource: Resource, status: ReleaseRolloutStatus) -> dict[str, Any]:
    document = status.document()
    for name in ("state", "policy", "sighting"):
        value = getattr(status, name)
        if value is not None:
            document[name] = value.model_dump(mode="json")
    document["history"] = [entry.model_dump(mode="json") for entry in status.history]
    head = _head(resource.name)
    head["metadata"] |= {"namespace": resource.namespace, "resourceVersion": resource.resource_version}
    return {**head, "status": document}
