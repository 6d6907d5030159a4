"""``reelway rollout ... --namespace NS``: rollouts of a cluster's namespace.

The commands need only the right to read and patch ReleaseRollouts. ``start`` creates a ReleaseRollout and waits for the
operator, which alone decides whether the rollout may start.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from reelway.platform.cli.rollout.location import CONTROLLER_TIMEOUT_S, ClusterNamespace, ControllerStatus, current_user
from reelway.platform.cli.rollout.wait import wait_until
from reelway.platform.errors import ConfigError, RolloutError
from reelway.platform.rollout.policy import RolloutPolicy
from reelway.platform.rollout.state import RolloutState
from reelway.platform.validation_errors import explain_problem

if TYPE_CHECKING:
    from reelway.platform.cluster.kube_api import KubeApi
    from reelway.platform.cluster.kube_rollout_store import KubeRolloutStore
    from reelway.platform.cluster.resources import Backend
    from reelway.platform.rollout.records import LastReconcile, Rollout

ADMISSION_TIMEOUT_S: Final = 10.0
"""A running operator admits or rejects a new rollout in well under a second."""


def cluster_store(namespace: ClusterNamespace, backend: Backend | None = None) -> KubeRolloutStore:
    """Opens the namespace's rollout store.

    Args:
        backend: traffic backend of the rollouts that this store creates.

    Raises:
        ConfigError: if the cluster is not reachable or the ``cluster`` extra is not installed.
    """
    from reelway.platform.cluster.kube_rollout_store import KubeRolloutStore
    from reelway.platform.cluster.rollout_cache import UncachedRollouts

    api = _api(namespace)
    return KubeRolloutStore(api, UncachedRollouts(api), create_backend=backend)


def start_on_cluster(
    namespace: ClusterNamespace,
    release: str,
    policy: RolloutPolicy,
    *,
    force: bool,
    note: str,
    ray_service: str | None,
    serve: tuple[str, str] | None,
) -> Rollout:
    """Creates a ReleaseRollout and waits for the operator's admission.

    Returns the rollout as started or waiting; unchanged if no operator responds within ``ADMISSION_TIMEOUT_S``.

    Args:
        release: full release id, or unique prefix of the id of a Release resource.
        serve: base URLs of the Ray dashboard and of the router, if KubeRay is not used.

    Raises:
        RolloutError: if the API server or the operator rejects the rollout.
        ConfigError: if there is no such release or the backend is ambiguous.
    """
    from reelway.platform.cli.rollout.start import new_rollout_id
    from reelway.platform.cluster.kube_rollout_store import LIVE, NOT_OBSERVED_REASON
    from reelway.platform.cluster.status import REFUSED

    api, now = _api(namespace), time.time()
    store = cluster_store(namespace, _backend(api, ray_service, serve))
    reason = f"requested by {current_user()}" + (f": {note}" if note else "")
    state = RolloutState(
        id=new_rollout_id(now), stable_release=LIVE, canary_release=_release(api, release), started_at=now,
        changed_at=now, tick_at=now, forced=force, reason=reason,
    )  # fmt: skip
    created = store.create(state, policy)
    observed = wait_until(
        store, created.state.id, lambda r: r.state.reason != NOT_OBSERVED_REASON, timeout_s=ADMISSION_TIMEOUT_S
    )
    if store.phase(created.state.id) == REFUSED:
        raise RolloutError(f"{created.state.id}: {observed.state.reason}")
    return observed


def operator_status(rollout: Rollout | None, last_reconcile: LastReconcile | None, now: float) -> ControllerStatus:
    """Returns whether an operator reconciles the rollout, derived from the rollout's status."""
    from reelway.platform.cluster.kube_rollout_store import NOT_OBSERVED_REASON

    if rollout is None:
        return ControllerStatus(running=True)
    state = rollout.state
    reconciled_at = last_reconcile.time if last_reconcile else None
    silent_s = max(0.0, now - (reconciled_at or state.started_at))
    waits = last_reconcile is None and state.reason != NOT_OBSERVED_REASON
    problem = ""
    if state.active and silent_s > CONTROLLER_TIMEOUT_S and not waits:
        problem = f"the operator has not reconciled for {silent_s:.0f} s"
    return ControllerStatus(
        running=not problem, last_reconcile_at=reconciled_at, seconds_since_reconcile=silent_s, problem=problem
    )


def _api(namespace: ClusterNamespace) -> KubeApi:
    try:
        from reelway.platform.cluster.kube_api import KubeApi
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; cluster commands require `pip install reelway-platform[cluster]`"
        ) from error
    return KubeApi(namespace.namespace, context=namespace.context)


def _backend(api: KubeApi, ray_service: str | None, serve: tuple[str, str] | None) -> Backend:
    """Returns the backend given by options, else that of the latest rollout, else the namespace's only RayService."""
    from reelway.platform.cluster.kube_api import NotFoundError
    from reelway.platform.cluster.resources import Backend
    from reelway.platform.cluster.rollout_cache import PATH, parse_rollout

    if ray_service or serve:
        api_url, url = serve or ("", "")
        named = {"rayService": {"name": ray_service}} if ray_service else {"serve": {"api": api_url, "url": url}}
        try:
            return Backend.model_validate(named)
        except ValidationError as error:
            raise ConfigError(explain_problem(Backend, error.errors()[0], "backend")) from error
    known = [parse_rollout(document) for document in api.list(PATH)]
    if known:
        return max(known, key=lambda one: one.created_at).spec.backend
    try:
        names = [str(one["metadata"]["name"]) for one in api.list("ray.io/v1/rayservices")]
    except NotFoundError:
        names = []
    if len(names) != 1:
        raise ConfigError(
            f"namespace {api.namespace}: found RayServices {names}, expected one; select one with --ray-service, or "
            "give a Ray Serve without KubeRay with --serve-api and --serve-url"
        )
    return Backend.model_validate({"rayService": {"name": names[0]}})


def _release(api: KubeApi, release: str) -> str:
    if len(release) == 64:
        return release
    from reelway.platform.cluster.resources import GROUP, RELEASES, VERSION

    known = sorted(str(one["spec"]["id"]) for one in api.list(f"{GROUP}/{VERSION}/{RELEASES}"))
    matches = [one for one in known if one.startswith(release)]
    if len(matches) != 1:
        examples = ", ".join(one[:12] for one in (matches or known)[:5]) or "none"
        raise ConfigError(
            f"release {release!r}: {len(matches)} Releases of namespace {api.namespace} match ({examples}), "
            "expected one; give the full id of 64 characters"
        )
    return matches[0]
