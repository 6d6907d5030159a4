"""Why: on KubeRay the traffic is declared in a RayService, but a rollback must not wait for what reads the declaration.

The new document is written to Serve's REST API first: from then on the routers act on it, in fractions of a second.
Then the same document is patched into ``serveConfigV2``; KubeRay, whenever it looks, submits what is so already.

Between the two writes KubeRay has no reason to write: it submits a document when ``serveConfigV2`` changed, or when it
itself was restarted. In that case, or when the second write fails or meets somebody else's (``helm upgrade``), the
RayService and Serve disagree; then ``observe`` gives no routing, says so, and the next look writes both again. So a
rollout ends only when what runs and what is declared are the same, and traffic is on stable long before that.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml

from reelway.platform.cluster.kube_api import AbsentError, ConflictError, Document, KubeApi
from reelway.platform.errors import KubernetesError, RolloutError
from reelway.platform.rollout.traffic.serve_config import ServeConfig, releases_in, routing_in, with_target
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficObservation, TrafficTarget

_PATH: Final = "ray.io/v1/rayservices"
_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class _Declared:
    """A RayService as it was last seen or written."""

    resource_version: str
    config: ServeConfig


class RayServiceBackend:
    """``traffic.TrafficBackend`` over a RayService and the Serve that it runs. Safe between threads.

    Args:
        serve: the Serve of its head.
    """

    def __init__(self, api: KubeApi, name: str, serve: ServeRestBackend) -> None:
        self._api, self.name, self._serve = api, name, serve
        self._lock = threading.Lock()
        self._declared: _Declared | None = None

    def close(self) -> None:
        """Close the connections."""
        self._serve.close()

    def exists(self) -> bool:
        """Whether there is such a RayService. Raises KubernetesError: nobody could say."""
        try:
            return self._api.get(f"{_PATH}/{self.name}") is not None
        except AbsentError:
            return False

    def observe(self) -> TrafficObservation:
        """Look at Serve, its routers and the RayService; see ``TrafficBackend.observe``."""
        seen = self._serve.observe()
        running = self._serve.config
        try:
            declared = self._fetch()
        except (KubernetesError, RolloutError) as error:
            return replace(seen, routing=None, detail=f"{seen.detail}; {error}".removeprefix("; "))
        if running is not None and not _alike(declared.config, running):
            detail = f"RayService {self.name} declares another routing than Serve runs; it is written again"
            return replace(seen, routing=None, detail=f"{seen.detail}; {detail}".removeprefix("; "))
        return seen

    def apply(self, target: TrafficTarget) -> None:
        """Serve first, then the RayService; see the module's docstring.

        Raises:
            RolloutError: Serve did not take it, and nothing was changed; or it did and the RayService did not.
        """
        with self._lock:
            declared = self._declared
        try:
            declared = declared or self._fetch()
        except KubernetesError as error:
            raise RolloutError(str(error)) from error
        wanted = with_target(declared.config, target)
        running = self._serve.config
        if running is None or not _alike(wanted, running):
            self._serve.write(wanted)
        if wanted != declared.config:
            self._declare(declared, wanted)

    def _declare(self, declared: _Declared, wanted: Mapping[str, Any]) -> None:
        """Written over the declaration that it was made from, and over no other.

        KubeRay writes its status into the same object all the time, so a conflict alone says nothing: what counts is
        whether the declaration is still that one.
        """
        text = yaml.safe_dump(dict(wanted), sort_keys=False)
        with self._lock:
            self._declared = None  # until it is known to have been taken
        newest = declared
        for _ in range(_ATTEMPTS):
            change = {"metadata": {"resourceVersion": newest.resource_version}, "spec": {"serveConfigV2": text}}
            try:
                self._remember(self._api.patch(f"{_PATH}/{self.name}", change))
                return
            except ConflictError:
                newest = self._fetched()
            except KubernetesError as error:
                raise self._untold(str(error)) from error
            if newest.config != declared.config:
                raise self._untold("somebody else wrote another declaration meanwhile")
        raise self._untold(f"it changed {_ATTEMPTS} times meanwhile")

    def _untold(self, why: str) -> RolloutError:
        return RolloutError(
            f"Serve has taken it, RayService {self.name} has not: {why}; it is written again at the next look"
        )

    def _fetched(self) -> _Declared:
        try:
            return self._fetch()
        except KubernetesError as error:
            raise self._untold(str(error)) from error

    def _fetch(self) -> _Declared:
        document = self._api.get(f"{_PATH}/{self.name}")
        if document is None:
            raise RolloutError(f"there is no RayService {self.name} in namespace {self._api.namespace}")
        return self._remember(document)

    def _remember(self, document: Document) -> _Declared:
        text = str(document["spec"].get("serveConfigV2", ""))
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RolloutError(f"serveConfigV2 of RayService {self.name} is not YAML: {error}") from error
        if not isinstance(config, dict):
            raise RolloutError(
                f"serveConfigV2 of RayService {self.name} is {type(config).__name__}, expected a mapping"
            )
        declared = _Declared(str(document["metadata"]["resourceVersion"]), config)
        with self._lock:
            self._declared = declared
        return declared


def _alike(one: ServeConfig, other: ServeConfig) -> bool:
    """Whether two documents are the same traffic: releases and routing. All else is KubeRay's to bring about."""
    return releases_in(one) == releases_in(other) and routing_in(one) == routing_in(other)
