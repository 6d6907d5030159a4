"""The traffic of a KubeRay RayService: ``spec.serveConfigV2`` and the Serve that runs it.

The operator is the only writer of ``serveConfigV2``. A change of the traffic is written to Serve's REST API first: the
routers act on it within fractions of a second. Then the same configuration is patched into the RayService, so that
KubeRay submits it again to a new head. A rollback therefore does not wait for the API server.

KubeRay submits a configuration when ``serveConfigV2`` changed or when KubeRay was restarted. If it submits an older one
between the two writes, or if the second write fails, the RayService and Serve disagree. ``observe`` then returns no
routing and states the reason, and the next reconcile writes both again. A rollout ends only when both agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml

from reelway.platform.cluster.kube_api import ConflictError, KubeApi, KubeObject, NotFoundError
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.traffic.serve_config import ServeConfig, find_routing, release_names, with_target
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget

_PATH: Final = "ray.io/v1/rayservices"
_ATTEMPTS: Final = 5
OPTIONS_DIGEST: Final = "reelway.dev/serving-options-digest"
"""Annotation of a RayService: SHA-256 of the serving options that belong to its pod template."""


@dataclass(frozen=True, slots=True)
class DeclaredConfig:
    """``serveConfigV2`` of a RayService as last read or written. ``config`` is empty before the first write."""

    resource_version: str
    config: ServeConfig
    options_digest: str = ""
    had_traffic: bool = False
    """Whether KubeRay has ever given the RayService's Services a cluster, so that viewers may be on a release."""


class RayServiceBackend:
    """``traffic.TrafficBackend`` over a RayService and the Serve of its head. Thread-safe.

    Args:
        before_write: called right before each write of ``serveConfigV2``; a RolloutError prevents the write.
    """

    def __init__(
        self, api: KubeApi, name: str, serve: ServeRestBackend, *, before_write: Callable[[], None] = lambda: None
    ) -> None:
        self._api, self.name, self.serve = api, name, serve
        self._before_write = before_write
        self._lock = threading.Lock()
        self._declared: DeclaredConfig | None = None
        self._newest_version = 0
        self.declaring = threading.Lock()
        """Held while ``serveConfigV2`` is read and written. Writes to Serve do not take it."""

    def close(self) -> None:
        """Closes the HTTP connections."""
        self.serve.close()

    def exists(self) -> bool:
        """Returns whether the RayService exists.

        Raises:
            KubernetesError: if the API server cannot be reached.
        """
        try:
            return self._api.get(f"{_PATH}/{self.name}") is not None
        except NotFoundError:
            return False

    def observe(self) -> TrafficObservation:
        """Reads Serve, its routers and the RayService; see ``TrafficBackend.observe``."""
        observation = self.serve.observe()
        running = self.serve.config
        try:
            snapshot = self.fetch()
        except (KubernetesError, RolloutError) as error:
            return replace(observation, routing=None, detail=f"{observation.detail}; {error}".removeprefix("; "))
        if running is not None and not _same_traffic(snapshot.config, running):
            detail = f"RayService {self.name} declares another routing than Serve runs; it is written again"
            return replace(observation, routing=None, detail=f"{observation.detail}; {detail}".removeprefix("; "))
        return observation

    def apply(self, target: TrafficTarget) -> None:
        """Writes the target to Serve, then to the RayService.

        Raises:
            RolloutError: if Serve rejected the target and nothing was changed, or if only the RayService rejected it.
        """
        with self._lock:
            snapshot = self._declared
        try:
            snapshot = snapshot or self.fetch()
        except KubernetesError as error:
            self.serve.apply(target)
            raise self._not_declared(str(error)) from error
        if not snapshot.config and self.serve.config is None:
            self.serve.observe()
        config = with_target(snapshot.config or self.serve.config or {}, target)
        running = self.serve.config
        if running is None or not _same_traffic(config, running):
            self.serve.write(config)
        if config != snapshot.config:
            with self.declaring:
                self._patch_serve_config(snapshot, config, target)

    def _patch_serve_config(self, snapshot: DeclaredConfig, config: ServeConfig, target: TrafficTarget) -> None:
        """Patches ``serveConfigV2``. If it was changed meanwhile, the target is applied to the changed configuration.

        KubeRay writes its status into the same object all the time. A conflict alone therefore means nothing; the
        declared configuration is compared.
        """
        newest = snapshot
        for _ in range(_ATTEMPTS):
            try:
                self.patch(newest, config)
                return
            except ConflictError:
                newest = self._snapshot()
            except KubernetesError as error:
                raise self._not_declared(str(error)) from error
            if newest.config != snapshot.config:  # new options were written: the traffic goes on top of them
                snapshot, config = newest, with_target(newest.config, target)
                self.serve.write(config)
        raise self._not_declared(f"it changed {_ATTEMPTS} times meanwhile")

    def patch(self, snapshot: DeclaredConfig, new_config: Mapping[str, Any]) -> None:
        """Writes ``serveConfigV2`` over this version of the object and over no other.

        Raises:
            ConflictError: if the object was changed since it was read.
            RolloutError: if ``before_write`` prevents it.
            KubernetesError: if the API server rejects the patch or cannot be reached.
        """
        self._before_write()
        with self._lock:
            self._declared = None  # unknown until the API server has answered
        text = yaml.safe_dump(dict(new_config), sort_keys=False)
        change = {"metadata": {"resourceVersion": snapshot.resource_version}, "spec": {"serveConfigV2": text}}
        self._parse_snapshot(self._api.patch(f"{_PATH}/{self.name}", change))

    def _not_declared(self, reason: str) -> RolloutError:
        return RolloutError(
            f"RayService {self.name}: Serve accepted the traffic, the declaration failed: {reason}; it is written "
            "again at the next reconcile"
        )

    def _snapshot(self) -> DeclaredConfig:
        try:
            return self.fetch()
        except KubernetesError as error:
            raise self._not_declared(str(error)) from error

    def fetch(self) -> DeclaredConfig:
        """Reads the RayService. Returns what is known already if a concurrent write or read was answered with more.

        Raises:
            RolloutError: if it does not exist or ``serveConfigV2`` is not a YAML mapping.
            KubernetesError: if the API server cannot be reached.
        """
        document = self._api.get(f"{_PATH}/{self.name}")
        if document is None:
            raise RolloutError(
                f"RayService {self.name}: it does not exist in namespace {self._api.namespace}; install the chart"
            )
        return self._parse_snapshot(document)

    def _parse_snapshot(self, document: KubeObject) -> DeclaredConfig:
        text = str(document["spec"].get("serveConfigV2") or "{}")
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RolloutError(f"RayService {self.name}: serveConfigV2 is not YAML: {error}; remove it") from error
        if not isinstance(config, dict):
            raise RolloutError(
                f"RayService {self.name}: serveConfigV2 is {type(config).__name__}, expected a mapping; remove it"
            )
        metadata = document["metadata"]
        digest = metadata.get("annotations", {}).get(OPTIONS_DIGEST, "")
        active = (document.get("status") or {}).get("activeServiceStatus") or {}
        snapshot = DeclaredConfig(
            str(metadata["resourceVersion"]), config, digest, had_traffic=bool(active.get("rayClusterName"))
        )
        return self._newest_of(snapshot)

    def _newest_of(self, snapshot: DeclaredConfig) -> DeclaredConfig:
        """Returns the newest snapshot. Another thread may have read or written a newer one since this was read."""
        version = int(snapshot.resource_version)
        with self._lock:
            if version < self._newest_version:
                return self._declared or snapshot
            self._newest_version, self._declared = version, snapshot
        return snapshot


def _same_traffic(first: ServeConfig, second: ServeConfig) -> bool:
    """Returns whether two configurations route the same traffic. KubeRay applies every other difference."""
    return release_names(first) == release_names(second) and find_routing(first) == find_routing(second)
