"""``RolloutStore`` over ReleaseRollout resources: the state of a rollout is stored in its status.

The resource version is the lock, so a lost update is rejected as it is by SQLite. A rollout that has not started is
read as pending; the operator starts it (``admission``), not the command that creates it. Alerts are stored in the
status of the latest rollout if they can concern it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from reelway.platform.cluster.kube_api import ConflictError, KubeApi, NotFoundError
from reelway.platform.cluster.resources import (
    MAX_COMMANDS,
    Backend,
    CommandRequest,
    ReleaseRolloutSpec,
    ReleaseRolloutStatus,
    RolloutResource,
)
from reelway.platform.cluster.rollout_cache import PATH, InformerCache, RolloutCache, parse_rollout
from reelway.platform.cluster.rollout_documents import object_head, spec_document, status_document
from reelway.platform.cluster.status import REFUSED, not_started, relevant_alerts, same_outcome, with_derived_fields
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.alerts import AlertKey, KnownAlert
from reelway.platform.rollout.policy import RolloutPolicy, default_policy
from reelway.platform.rollout.records import HistoryEntry, LastReconcile, Rollout, with_commands_since
from reelway.platform.rollout.state import Command, Phase, RolloutState, add_command

LIVE: Final = "live"
"""Placeholder for the stable release of a rollout that has not started: the release that is live at its start."""
NOT_OBSERVED_REASON: Final = "the operator has not observed the rollout yet"
DELETED_ACTOR: Final = "the user who deleted it"
ROLLBACK_TIMEOUT_S: Final = 1.0
"""How long a rollback waits for its record. After that it is written to the traffic and recorded later."""
_ATTEMPTS: Final = 6

Change = Callable[[RolloutResource], ReleaseRolloutStatus | None]


class KubeRolloutStore:
    """The rollouts of one namespace, or the started rollouts of one backend (for its controller).

    Args:
        backend: key of the backend. None selects all rollouts, started or not (for commands).
        create_backend: backend of the rollouts that ``create`` creates.
        on_decision: called with each new history entry after it is written.
        require_lease: called before each write; raises RolloutError if another replica may be active.

    Raises:
        KubernetesError: from every method, if the API server cannot be reached or rejects the request.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: RolloutCache,
        *,
        backend: str | None = None,
        create_backend: Backend | None = None,
        on_decision: Callable[[RolloutResource, HistoryEntry], None] = lambda *_: None,
        require_lease: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._cache = api, cache
        self._backend, self._create_backend = backend, create_backend
        self._on_decision, self._require_lease, self._clock = on_decision, require_lease, clock
        self._writing = threading.RLock()
        self._last_reconciles: dict[str, LastReconcile] = {}

    def create(self, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Creates the resource; the operator starts the rollout. Several rollouts of one backend may wait.

        Raises:
            RolloutError: if a rollout of that name exists or the API server rejects the resource.
        """
        if self._create_backend is None:
            raise RolloutError("cannot create a rollout without a backend; name a RayService with --ray-service")
        stable = None if state.stable_release == LIVE else state.stable_release
        requested = {"release": state.canary_release, "stable_release": stable, "force": state.forced}
        try:
            spec = ReleaseRolloutSpec.model_validate(
                {**requested, "policy": policy, "backend": self._create_backend, "note": state.reason}
            )
        except ValidationError as error:
            wrong = error.errors()[0]
            raise RolloutError(f"spec.{wrong['loc'][0]}: saw {wrong['input']!r}: {wrong['msg']}") from error
        try:
            created = self._api.create(PATH, {**object_head(state.id), "spec": spec_document(spec)})
        except ConflictError:
            raise RolloutError(f"cannot create rollout {state.id}: it exists; choose another name") from None
        except NotFoundError as error:
            raise RolloutError(f"{error}; check that Reelway's CRDs are installed") from error
        except KubernetesError as error:
            raise RolloutError(str(error)) from error
        resource = parse_rollout(created)
        self._cache.store_written(resource)
        return to_rollout(resource)

    def get(self, rollout_id: str) -> Rollout:
        return to_rollout(self._find(rollout_id))

    def latest(self) -> Rollout | None:
        resource = self._latest()
        return to_rollout(resource) if resource else None

    def phase(self, rollout_id: str) -> str:
        """Returns ``status.phase``, which has two values that a ``RolloutState`` has not: Waiting and Refused."""
        return self._find(rollout_id).status.phase

    def all(self) -> Sequence[Rollout]:
        return [to_rollout(resource) for resource in self._in_scope()]

    def record(self, before: Rollout, state: RolloutState, entry: HistoryEntry | None) -> Rollout:
        numbered = entry and entry.model_copy(update={"number": self._next_number()})

        def change(resource: RolloutResource) -> ReleaseRolloutStatus:
            newest, status = to_rollout(resource), resource.status
            merged = with_commands_since(before, newest, state) if newest.version != before.version else state
            history = (*status.history, numbered) if numbered else status.history
            last_reconcile = self._last_reconciles.get(state.id, status.last_reconcile)
            return with_derived_fields(
                resource,
                status.model_copy(
                    update={"state": merged, "policy": before.policy, "version": status.version + 1,
                            "history": history, "last_reconcile": last_reconcile}
                ),
                self._clock(),
            )  # fmt: skip

        timeout_s = ROLLBACK_TIMEOUT_S if state.phase is Phase.ROLLING_BACK else None
        written = self._write(self._find(before.state.id, exact=True), change, timeout_s)
        if numbered:
            self._on_decision(written, numbered)
        return to_rollout(written)

    def begin(self, resource: RolloutResource, state: RolloutState, policy: RolloutPolicy) -> Rollout:
        """Writes the first state of a rollout. Raises RolloutError if it has started."""

        def change(newest: RolloutResource) -> ReleaseRolloutStatus:
            if newest.status.state is not None:
                raise RolloutError(f"rollout {newest.name} has started; check that no second operator runs")
            started = ReleaseRolloutStatus(
                state=state, policy=policy, version=newest.status.version + 1, conditions=newest.status.conditions
            )
            return with_derived_fields(newest, started, self._clock())

        return to_rollout(self._write(resource, change))

    def record_not_started(self, resource: RolloutResource, phase: str, reason: str) -> bool:
        """Writes why a rollout has not started. Returns False if the status said so before."""
        if (resource.status.phase, resource.status.reason) == (phase, reason):
            return False
        self._write(
            resource, lambda newest: None if newest.status.state else not_started(newest, phase, reason, self._clock())
        )
        return True

    def supersede(self, resource: RolloutResource, by: RolloutResource) -> None:
        """Writes that another rollout started after this one, so that this one is no longer reconciled."""
        self._write(resource, lambda newest: newest.status.model_copy(update={"superseded_by": by.rollout_id}))

    def submit_command(self, rollout_id: str, command: Command) -> Rollout:
        """Adds the command to ``spec.commands`` in one patch. Only the operator writes the status."""
        resource = self._find(rollout_id)
        request = CommandRequest.model_validate(command.model_dump())
        for _ in range(_ATTEMPTS):
            commands = resource.spec.commands
            if any(known.id == request.id for known in commands) or request.id in _commands_seen(resource):
                return to_rollout(resource)
            remaining = (*_unseen_commands(resource), request)
            if len(remaining) > MAX_COMMANDS:
                raise RolloutError(
                    f"cannot add a command to {resource.name}: {len(remaining) - 1} of at most {MAX_COMMANDS} commands "
                    "wait; check that the operator runs"
                )
            change = {
                "metadata": {"resourceVersion": resource.resource_version},
                "spec": {"commands": [one.document() for one in remaining]},
            }
            try:
                resource = parse_rollout(self._api.patch(f"{PATH}/{resource.name}", change))
            except ConflictError:
                resource = self._refetch(resource)
                continue
            self._cache.store_written(resource)
            return to_rollout(resource)
        raise RolloutError(f"cannot write rollout {resource.name}: it changed {_ATTEMPTS} times meanwhile; try again")

    def history(self, rollout_id: str | None = None) -> Sequence[HistoryEntry]:
        resources = [self._find(rollout_id)] if rollout_id is not None else self._in_scope()
        entries = [entry for resource in resources for entry in resource.status.history]
        return sorted(entries, key=lambda entry: entry.number)

    def alerts(self) -> dict[AlertKey, KnownAlert]:
        """Returns the alerts of all rollouts in scope, so that one of an earlier rollout is recognised."""
        return {alert.key: alert for resource in self._in_scope() for alert in resource.status.alerts}

    def replace_alerts(self, alerts: Mapping[AlertKey, KnownAlert]) -> None:
        """Stores the alerts that were received during the latest rollout and name its release."""
        resource = self._latest()
        if resource is None or resource.status.state is None:
            return

        def change(newest: RolloutResource) -> ReleaseRolloutStatus | None:
            relevant = relevant_alerts(alerts.values(), newest.status.state)
            return None if relevant == newest.status.alerts else newest.status.model_copy(update={"alerts": relevant})

        self._write(resource, change)

    def save_last_reconcile(self, last_reconcile: LastReconcile) -> None:
        """Writes a reconcile at once if its outcome differs from the last one, otherwise with the next record."""
        self._last_reconciles[last_reconcile.rollout_id] = last_reconcile

        def change(resource: RolloutResource) -> ReleaseRolloutStatus | None:
            if same_outcome(last_reconcile, resource.status.last_reconcile):
                return None
            return with_derived_fields(
                resource, resource.status.model_copy(update={"last_reconcile": last_reconcile}), self._clock()
            )

        self._write(self._find(last_reconcile.rollout_id, exact=True), change)

    def last_reconcile(self, rollout_id: str) -> LastReconcile | None:
        resource = self._find(rollout_id)
        return self._last_reconciles.get(resource.rollout_id, resource.status.last_reconcile)

    def revision(self, *, include_own: bool = True) -> int:
        return self._cache.revision(include_own=include_own)

    def _in_scope(self) -> list[RolloutResource]:
        """Returns the rollouts in scope, oldest first; a controller's scope is the started rollouts of its backend."""
        in_scope = [
            resource
            for resource in self._cache.all()
            if self._backend is None or (resource.status.state and resource.spec.backend.key == self._backend)
        ]
        return sorted(in_scope, key=_order)

    def _latest(self) -> RolloutResource | None:
        """Returns the rollout that the controller reconciles; for commands, the next one if that one has ended."""
        in_scope = self._in_scope()
        started = [resource for resource in in_scope if resource.status.state]
        if self._backend is not None:
            return next((one for one in reversed(started) if not one.status.superseded_by), None)
        if started and started[-1].status.state and started[-1].status.state.active:
            return started[-1]
        return in_scope[-1] if in_scope else None

    def _find(self, rollout_id: str, *, exact: bool = False) -> RolloutResource:
        in_scope = self._in_scope()
        exact_matches = [one for one in in_scope if rollout_id in (one.rollout_id, one.name)]
        found = exact_matches or [
            one for one in in_scope if not exact and rollout_id and one.rollout_id.startswith(rollout_id)
        ]
        if not found:
            raise RolloutError(
                f"rollout {rollout_id!r} does not exist; `reelway rollout history --all` lists all rollouts"
            )
        if len(found) > 1:
            examples = ", ".join(one.name for one in found[:3])
            raise RolloutError(f"rollout id {rollout_id!r} is ambiguous ({examples} ...); give more characters")
        return found[0]

    def _next_number(self) -> int:
        numbers = [entry.number for resource in self._cache.all() for entry in resource.status.history[-1:]]
        return max(numbers, default=0) + 1

    def _write(self, resource: RolloutResource, change: Change, timeout_s: float | None = None) -> RolloutResource:
        """Writes the status that ``change`` returns for the latest resource; None writes nothing.

        Args:
            timeout_s: how long to wait for another thread's write, and for each answer of the API server.
        """
        with self._exclusive(timeout_s):
            if isinstance(self._cache, InformerCache):  # another thread may have written while this one waited
                resource = self._cache.by_uid(resource.uid) or resource
            for _ in range(_ATTEMPTS):
                status = change(resource)
                if status is None:
                    return resource
                if isinstance(self._cache, InformerCache):
                    self._cache.expect_own_write(resource.uid, status.version)
                try:
                    written = parse_rollout(
                        self._api.replace(
                            f"{PATH}/{resource.name}/status", status_document(resource, status), timeout_s=timeout_s
                        )
                    )
                except ConflictError:
                    resource = self._refetch(resource)
                except NotFoundError:
                    raise RolloutError(f"cannot write rollout {resource.name}: it was deleted") from None
                else:
                    self._cache.store_written(written)
                    return written
        raise RolloutError(f"cannot write rollout {resource.name}: it changed {_ATTEMPTS} times meanwhile; try again")

    @contextmanager
    def _exclusive(self, timeout_s: float | None) -> Iterator[None]:
        """Holds the right to write: no other thread writes, and no other replica may be active.

        Raises:
            KubernetesError: if another thread's write takes longer than ``timeout_s``, or the Lease is not valid.
        """
        if not self._writing.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise KubernetesError(
                f"status not written: another write has waited for the API server for {timeout_s:g} s"
            )
        try:
            try:
                self._require_lease()
            except RolloutError as error:
                raise KubernetesError(f"status not written: {error}") from error
            yield
        finally:
            self._writing.release()

    def _refetch(self, resource: RolloutResource) -> RolloutResource:
        document = self._api.get(f"{PATH}/{resource.name}")
        if document is None or document["metadata"]["uid"] != resource.uid:
            raise RolloutError(f"cannot write rollout {resource.name}: it was deleted")
        newest = parse_rollout(document)
        self._cache.store_written(newest)
        return newest


def to_rollout(resource: RolloutResource) -> Rollout:
    """Converts a resource: the recorded state plus the commands of its spec that the state does not contain.

    The deletion of an active rollout counts as a rollback command.
    """
    status, spec = resource.status, resource.spec
    policy = status.policy or spec.policy or default_policy()
    state = status.state or _pending_state(resource)
    for request in spec.commands:
        state = add_command(state, request.to_command)
    if resource.deleting and state.active and status.state is not None:
        state = add_command(state, Command(id=f"deleted-{resource.uid[:8]}", verb="rollback", actor=DELETED_ACTOR))
    return Rollout(state=state, policy=policy, version=max(1, resource.version + resource.deleting))


def _pending_state(resource: RolloutResource) -> RolloutState:
    made_at = datetime.fromisoformat(resource.created_at).timestamp()
    refused = resource.status.phase == REFUSED
    return RolloutState(
        id=resource.rollout_id,
        salt=resource.rollout_id,  # no viewer is assigned with it; admission draws the salt of the rollout
        stable_release=resource.spec.stable_release or LIVE,
        canary_release=resource.spec.release,
        phase=Phase.ROLLED_BACK if refused else Phase.PENDING,
        started_at=made_at,
        changed_at=made_at,
        tick_at=made_at,
        forced=resource.spec.force,
        reason=resource.status.reason or NOT_OBSERVED_REASON,
    )


def _order(resource: RolloutResource) -> tuple[float, str, str]:
    state = resource.status.state
    begun_at = state.started_at if state else float("inf")
    return (begun_at, resource.created_at, resource.name)


def _commands_seen(resource: RolloutResource) -> Sequence[str]:
    return resource.status.state.commands_seen if resource.status.state else ()


def _unseen_commands(resource: RolloutResource) -> list[CommandRequest]:
    """Returns the commands of the spec; the oldest ones that were processed make room for new ones."""
    processed, commands = set(_commands_seen(resource)), list(resource.spec.commands)
    while len(commands) >= MAX_COMMANDS and commands[0].id in processed:
        commands.pop(0)
    return commands
