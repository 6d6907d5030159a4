"""Keeps ``serveConfigV2`` of the installation's RayService up to date with its serving options.

The Helm chart renders the options into a ConfigMap, and the RayService without ``serveConfigV2``. Only this module
writes the first configuration (all viewers on ``initial.release``) and changed options. It keeps the releases and the
routing of a configuration that exists, so that neither an upgrade of the chart nor a rendering moves a viewer. A
service that had traffic and lost its configuration never gets ``initial.release``: it waits until Serve states its
traffic.

The RayService carries the digest of the options that belong to its pod template. Options with another digest wait,
because Helm writes the ConfigMap a moment before the RayService: pods of the old image must not receive the arguments
of the new one.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from pydantic import ValidationError

from reelway.platform.cluster.kube_api import ConflictError, KubeApi
from reelway.platform.cluster.ray_service import DeclaredConfig, RayServiceBackend
from reelway.platform.errors import RolloutError
from reelway.platform.rollout.traffic.routing import Routing
from reelway.platform.rollout.traffic.serve_config import (
    ServeConfig,
    compose_serve_config,
    find_routing,
    release_names,
)
from reelway.platform.rollout.traffic.serving_options import ServingOptions
from reelway.platform.rollout.traffic.target import TrafficTarget

log = logging.getLogger(__name__)

OPTIONS_SUFFIX: Final = "-serving"
"""Appended to the RayService's name: the ConfigMap with its options."""
OPTIONS_KEY: Final = "options.yaml"
DIGEST_TIMEOUT_S: Final = 60.0
"""How long the options may differ from the RayService's digest before that is an error."""


class ServeConfigReconciler:
    """Writes ``serveConfigV2`` of one RayService when its options require another one.

    Args:
        prepare_rankers: called with the releases that need a remote ranker, on every pass; must not wait for them.
        recorded_target: returns the traffic that the newest rollout has recorded; None without a rollout.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        backend: RayServiceBackend,
        prepare_rankers: Callable[[Iterable[str]], None] = lambda _: None,
        recorded_target: Callable[[], TrafficTarget | None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._backend, self._prepare_rankers = api, backend, prepare_rankers
        self._recorded_target = recorded_target
        self._clock = clock
        self._digest_differs_since: float | None = None

    def reconcile(self) -> bool:
        """Reads the options and the RayService, and writes what differs. Returns whether it wrote.

        While a rollout has recorded traffic that ``serveConfigV2`` does not declare yet, its controller writes first.

        Raises:
            ConfigError: if the options cannot be read; nothing was written.
            RolloutError: if the options do not exist or stay different from the RayService's digest, if
                ``serveConfigV2`` has no valid routing, or if none exists and either the options name no release or the
                service had traffic that Serve does not state.
            KubernetesError: if the API server cannot be reached or rejects the write.
        """
        name = f"{self._backend.name}{OPTIONS_SUFFIX}"
        if not self._backend.exists():
            return False
        found = self._api.get(f"v1/configmaps/{name}")
        if found is None:
            raise RolloutError(f"ConfigMap {name}: it does not exist; install the chart again")
        text = str(found.get("data", {}).get(OPTIONS_KEY, ""))
        declared = self._backend.fetch()
        if not self._has_digest_of(declared, text, name):
            return False
        options = ServingOptions.parse(text, source=f"ConfigMap {name}, {OPTIONS_KEY}")
        if self._in_transition(declared):
            return False
        releases, routing = self._traffic(declared, options)
        self._prepare_rankers(releases)
        config = compose_serve_config(options, releases, routing)
        if config == declared.config:
            return False
        try:
            with self._backend.declaring:
                self._backend.patch(declared, config)
        except ConflictError:
            return False  # KubeRay or a rollout wrote meanwhile; the next reconcile reads it
        log.info("RayService %s: serveConfigV2 written, releases=%s", self._backend.name, [r[:12] for r in releases])
        return True

    def _has_digest_of(self, declared: DeclaredConfig, text: str, name: str) -> bool:
        """Returns whether the RayService was rendered with these options. Helm writes it moments after the ConfigMap.

        Raises:
            RolloutError: if the digests have differed for longer than ``DIGEST_TIMEOUT_S``.
        """
        if declared.options_digest == digest_of(text):
            self._digest_differs_since = None
            return True
        now = self._clock()
        if self._digest_differs_since is None:
            self._digest_differs_since = now
        if now - self._digest_differs_since > DIGEST_TIMEOUT_S:
            raise RolloutError(
                f"ConfigMap {name}: these are not the options that RayService {self._backend.name} was rendered with; "
                "apply the chart again"
            )
        return False

    def _traffic(self, declared: DeclaredConfig, options: ServingOptions) -> tuple[tuple[str, ...], Routing]:
        """Returns the releases and the routing to keep.

        These are the declared ones, else those of the newest rollout, else those of Serve. `kubectl replace` drops
        ``serveConfigV2`` of a RayService whose service still runs. The initial ones are only for a service that never
        had traffic; KubeRay creates the address of Serve after the first configuration runs, so its Serve is silent.
        """
        if declared.config:
            return release_names(declared.config), self._checked_routing(declared.config)
        if (target := self._recorded_target()) is not None:
            return target.releases, target.routing
        observation = self._backend.serve.observe()
        running = self._backend.serve.config
        if running and find_routing(running) is not None:
            return release_names(running), self._checked_routing(running)
        if declared.had_traffic:
            raise RolloutError(
                f"RayService {self._backend.name}: serveConfigV2 is lost and Serve does not state the traffic: "
                f"{observation.detail or 'it runs no router'}; restore spec.serveConfigV2, or delete the RayService "
                "and apply the chart again to start on releases.initial"
            )
        if options.initial is None:
            raise RolloutError(
                f"RayService {self._backend.name}: no traffic yet and no initial release; set releases.initial"
            )
        return (options.initial.release,), options.initial.routing

    def _checked_routing(self, config: ServeConfig) -> Routing:
        try:
            return Routing.model_validate(find_routing(config))
        except ValidationError as error:
            raise RolloutError(
                f"RayService {self._backend.name}: serveConfigV2 has no valid routing: {error.errors()[0]['msg']}; "
                "remove the field to keep the traffic that Serve runs"
            ) from error

    def _in_transition(self, declared: DeclaredConfig) -> bool:
        """Returns whether a rollout has recorded or written another routing than the one declared.

        A rollback that is not recorded yet is in Serve alone, so that Serve is asked if its configuration is unknown.
        """
        target = self._recorded_target()
        if self._backend.serve.config is None:
            self._backend.serve.observe()
        routing = find_routing(self._backend.serve.config or {}) or {}
        if target and routing.get("rollback") and routing.get("rollout") == target.routing.rollout:
            return True
        if declared.config and target and target.routing != self._checked_routing(declared.config):
            return True
        running = self._backend.serve.config
        return bool(declared.config and running and find_routing(running) != find_routing(declared.config))


def digest_of(text: str) -> str:
    """Returns the SHA-256 of the options as the chart computes it, without surrounding white space."""
    return hashlib.sha256(text.strip().encode()).hexdigest()
