"""Why: a release whose ranker KServe runs needs an InferenceService before it has traffic, and none after it is gone.

The chart writes the InferenceService once, as a template; a release's own differs in its name and in what names the
release. Nothing of it is patched later: a release is served as it was prepared, from its first request to its last, and
traffic never moves here. Every write may be repeated, so that a controller that died may simply do it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

from reelway.platform.cluster.kube_api import ConflictError, Document, KubeApi
from reelway.platform.errors import ConfigError, KubernetesError, RolloutError
from reelway.platform.rollout.series import SHORT_RELEASE
from reelway.platform.rollout.traffic.target import TrafficBackend, TrafficObservation, TrafficTarget

PATH: Final = "serving.kserve.io/v1beta1/inferenceservices"
RELEASE_LABEL: Final = "reelway.dev/release"
"""The first characters of the id; a label may not hold the whole."""
OWNER: Final = "reelway.dev/owner"
"""Annotation of the template: the ConfigMap of the installation with which every InferenceService goes away."""
_WHO: Final = "app.kubernetes.io/managed-by"
_OPERATOR: Final = "reelway-operator"


@dataclass(frozen=True, slots=True)
class RankerState:
    """One release's ranker: ready, or why not. ``failed`` where KServe says that it cannot start as it is."""

    ready: bool
    detail: str = ""
    failed: bool = False


class Rankers(Protocol):
    """The rankers of one installation."""

    def prepare(self, release: str) -> None:
        """Have one made, unless there is one."""
        ...

    def states(self) -> Mapping[str, RankerState]:
        """Those that are there, by the first characters of their release's id."""
        ...

    def retire(self, release: str) -> None:
        """Have it removed; nothing where there is none."""
        ...


class InferenceServices:
    """Rankers as InferenceServices. Every method raises KubernetesError: nobody could say, or it was refused.

    Args:
        template: an InferenceService in which ``{release}`` stands for the first characters of a release's id, and
            ``{release_id}`` for the whole. Its labels say which InferenceServices are this installation's, its
            annotation ``OWNER`` with what they are collected when the installation is removed.
    """

    def __init__(self, api: KubeApi, template: Document) -> None:
        self._api = api
        self._template = template
        labels = template["metadata"]["labels"]
        self._own = {key: value for key, value in labels.items() if key != _WHO and "{" not in value}

    def prepare(self, release: str) -> None:
        """Create it; one that is there already, the chart's perhaps, stays as it is."""
        document = _named(self._template, release)
        metadata = document["metadata"]
        metadata["labels"][_WHO] = _OPERATOR
        if owner := metadata.get("annotations", {}).pop(OWNER, ""):
            metadata["ownerReferences"] = [self._reference(owner)]
        try:
            self._api.create(PATH, document)
        except ConflictError:
            return

    def states(self) -> dict[str, RankerState]:
        """As KServe last said."""
        return {
            found["metadata"]["labels"][RELEASE_LABEL]: state_of(found)
            for found in self._api.list(PATH)
            if self._own.items() <= found["metadata"].get("labels", {}).items()
            and RELEASE_LABEL in found["metadata"]["labels"]
        }

    def _reference(self, owner: str) -> Document:
        found = self._api.get(f"v1/configmaps/{owner}")
        if found is None:
            raise KubernetesError(
                f"ConfigMap {owner}, which rankers belong to, is gone: is the chart being uninstalled?"
            )
        return {"apiVersion": "v1", "kind": "ConfigMap", "name": owner, "uid": found["metadata"]["uid"]}

    def retire(self, release: str) -> None:
        """Delete it, whoever made it."""
        name = _named(self._template, release)["metadata"]["name"]
        self._api.delete(f"{PATH}/{name}")


class RankedApart:
    """A traffic backend whose releases need a ranker of their own besides.

    A release that has none is not among those that run, so it is prepared again at the next write, and it is ready only
    when its ranker is. Weights are the other backend's alone: a way back to stable asks nothing here first.
    """

    def __init__(self, backend: TrafficBackend, rankers: Rankers) -> None:
        self._backend = backend
        self._rankers = rankers

    def observe(self) -> TrafficObservation:
        """Look at both; see ``TrafficBackend.observe``."""
        seen = self._backend.observe()
        try:
            rankers = self._rankers.states()
        except KubernetesError as error:
            return replace(seen, ready=frozenset(), detail=_joined(seen.detail, f"rankers: {error}"))
        states = {release: rankers.get(_short(release)) for release in {*seen.releases, *seen.ready}}
        waiting = {release: state for release, state in states.items() if state is None or not state.ready}
        said = [f"ranker of {_short(release)}: {state.detail if state else 'there is none'}"
                for release, state in sorted(waiting.items())]  # fmt: skip
        failed = {
            release: f"its ranker: {state.detail}" for release, state in waiting.items() if state and state.failed
        }
        return replace(
            seen,
            releases=tuple(release for release in seen.releases if states[release] is not None),
            ready=seen.ready - waiting.keys(),
            failed={**failed, **seen.failed},
            detail=_joined(seen.detail, *said),
        )

    def apply(self, target: TrafficTarget) -> None:
        """Rankers that are wanted, then the traffic, then without the rankers that nobody asks any more.

        Where a ranker is refused the traffic is written all the same, so that a rollback never waits for KServe.

        Raises:
            RolloutError: the traffic was not accepted, or a ranker was not.
        """
        trouble = self._each(self._rankers.prepare, target.releases)
        self._backend.apply(target)
        try:
            gone = self._rankers.states().keys() - {_short(release) for release in target.releases}
        except KubernetesError as error:
            gone, trouble = set(), [*trouble, str(error)]
        trouble += self._each(self._rankers.retire, sorted(gone))
        if trouble:
            raise RolloutError(f"the traffic is written, the rankers are not: {'; '.join(trouble)}")

    @staticmethod
    def _each(call: Any, releases: Iterable[str]) -> list[str]:
        trouble = []
        for release in releases:
            try:
                call(release)
            except KubernetesError as error:
                trouble.append(str(error))
        return trouble


def read_template(path: Path) -> Document:
    """The chart's template. Raises ConfigError: it is no InferenceService, or a release could not be told by it."""
    try:
        document = yaml.safe_load(path.read_text())
        metadata = document["metadata"]
        told = "{release}" in metadata["name"] and metadata["labels"][RELEASE_LABEL] == "{release}"
        if document["kind"] != "InferenceService" or not told:
            raise KeyError(f"kind InferenceService, a name with {{release}} and the label {RELEASE_LABEL}")
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no template of a ranker: {error}; see templates/ranker of the chart") from error
    checked: Document = document
    return checked


def state_of(document: Mapping[str, Any]) -> RankerState:
    """What an InferenceService's status says; one that KServe has not looked at since its last change is not ready."""
    metadata, status = document["metadata"], document.get("status") or {}
    if "deletionTimestamp" in metadata:
        return RankerState(False, "it is being removed")
    if status.get("observedGeneration", metadata.get("generation")) != metadata.get("generation"):
        return RankerState(False, "KServe has not looked at it yet")
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    ready = conditions.get("Ready", {})
    if ready.get("status") == "True":
        return RankerState(True)
    model = status.get("modelStatus") or {}
    failure = model.get("lastFailureInfo") or {}
    said = [one.get("message") or one.get("reason") or "" for one in conditions.values() if one["status"] != "True"]
    detail = failure.get("message") or "; ".join(dict.fromkeys(filter(None, said))) or "KServe is preparing it"
    return RankerState(False, " ".join(detail.split())[:300], model.get("transitionStatus") in _STUCK)


_STUCK: Final = frozenset({"InvalidSpec", "BlockedByFailedLoad"})


def _named(template: Any, release: str) -> Any:
    if isinstance(template, dict):
        return {key: _named(value, release) for key, value in template.items()}
    if isinstance(template, list):
        return [_named(value, release) for value in template]
    if isinstance(template, str):
        return template.replace("{release_id}", release).replace("{release}", _short(release))
    return template


def _short(release: str) -> str:
    return release[:SHORT_RELEASE]


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
