"""Creates and removes the InferenceService of each release whose ranker is served by KServe.

The chart provides one template. The InferenceService of a release differs from it in its name and in the fields that
name the release. It is ready before the release has traffic and is removed after the release is retired
(``remote_rankers``). It is never patched: a release is served as it was prepared. All writes are idempotent, so a
restarted controller repeats them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import yaml

from reelway.platform.cluster.kube_api import ConflictError, KubeApi, KubeObject
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ConfigError, KubernetesError

PATH: Final = "serving.kserve.io/v1beta1/inferenceservices"
RELEASE_LABEL: Final = "reelway.dev/release"
"""Label with the first characters of the release id; the full id is too long for a label."""
OWNER_ANNOTATION: Final = "reelway.dev/owner"
"""Annotation of the template: name of the ConfigMap that owns all InferenceServices of the installation."""
_MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
_OPERATOR: Final = "reelway-operator"


@dataclass(frozen=True, slots=True)
class RankerState:
    """State of one release's ranker. ``failed``: KServe reports that the ranker cannot start without a change."""

    ready: bool
    detail: str = ""
    failed: bool = False


class RankerProvisioner(Protocol):
    """Manages the rankers of one installation."""

    def ensure(self, release: str) -> None:
        """Creates the ranker of a release unless it exists."""
        ...

    def states(self) -> Mapping[str, RankerState]:
        """Returns the state of all rankers by the first characters of the release id."""
        ...

    def remove(self, release: str) -> None:
        """Removes the ranker of a release if it exists."""
        ...


class InferenceServiceRankers:
    """Rankers as InferenceServices.

    Args:
        template: InferenceService in which ``{release}`` stands for the first characters of a release id and
            ``{release_id}`` for the full id. Its labels select the InferenceServices of this installation. Its
            annotation ``OWNER_ANNOTATION`` names the ConfigMap that owns them.

    Raises:
        KubernetesError: from every method, if the API server cannot be reached or rejects the request.
    """

    def __init__(self, api: KubeApi, template: KubeObject) -> None:
        self._api = api
        self._template = template
        labels = template["metadata"]["labels"]
        self._selector = {key: value for key, value in labels.items() if key != _MANAGED_BY_LABEL and "{" not in value}

    def ensure(self, release: str) -> None:
        """Creates the InferenceService. An existing one, such as the chart's, stays unchanged."""
        document = _render_template(self._template, release)
        metadata = document["metadata"]
        metadata["labels"][_MANAGED_BY_LABEL] = _OPERATOR
        if owner := metadata.get("annotations", {}).pop(OWNER_ANNOTATION, ""):
            metadata["ownerReferences"] = [self._owner_reference(owner)]
        try:
            self._api.create(PATH, document)
        except ConflictError:
            return

    def states(self) -> dict[str, RankerState]:
        return {
            found["metadata"]["labels"][RELEASE_LABEL]: ranker_state(found)
            for found in self._api.list(PATH)
            if self._selector.items() <= found["metadata"].get("labels", {}).items()
            and RELEASE_LABEL in found["metadata"]["labels"]
        }

    def _owner_reference(self, owner: str) -> KubeObject:
        found = self._api.get(f"v1/configmaps/{owner}")
        if found is None:
            raise KubernetesError(
                f"ConfigMap {owner}, the owner of all rankers, does not exist; check that the chart is installed"
            )
        return {"apiVersion": "v1", "kind": "ConfigMap", "name": owner, "uid": found["metadata"]["uid"]}

    def remove(self, release: str) -> None:
        name = _render_template(self._template, release)["metadata"]["name"]
        self._api.delete(f"{PATH}/{name}")


def read_template(path: Path) -> KubeObject:
    """Reads the chart's template.

    Raises:
        ConfigError: if it is not an InferenceService or does not name the release.
    """
    try:
        document = yaml.safe_load(path.read_text())
        metadata = document["metadata"]
        names_release = "{release}" in metadata["name"] and metadata["labels"][RELEASE_LABEL] == "{release}"
        if document["kind"] != "InferenceService" or not names_release:
            raise KeyError(f"kind InferenceService, a name with {{release}} and the label {RELEASE_LABEL}")
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a template of a ranker: expected {error}; see templates/ranker of the chart"
        ) from error
    checked: KubeObject = document
    return checked


def ranker_state(document: Mapping[str, Any]) -> RankerState:
    """Returns the state of an InferenceService. Until KServe observed its latest generation it is not ready."""
    metadata, status = document["metadata"], document.get("status") or {}
    if "deletionTimestamp" in metadata:
        return RankerState(False, "the InferenceService is being deleted")
    if status.get("observedGeneration", metadata.get("generation")) != metadata.get("generation"):
        return RankerState(False, "KServe has not observed it yet")
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    ready = conditions.get("Ready", {})
    if ready.get("status") == "True":
        return RankerState(True)
    model = status.get("modelStatus") or {}
    failure = model.get("lastFailureInfo") or {}
    messages = [one.get("message") or one.get("reason") or "" for one in conditions.values() if one["status"] != "True"]
    detail = failure.get("message") or "; ".join(dict.fromkeys(filter(None, messages))) or "KServe is preparing it"
    return RankerState(False, " ".join(detail.split())[:300], model.get("transitionStatus") in _PERMANENT_FAILURES)


_PERMANENT_FAILURES: Final = frozenset({"InvalidSpec", "BlockedByFailedLoad"})


def _render_template(template: Any, release: str) -> Any:
    if isinstance(template, dict):
        return {key: _render_template(value, release) for key, value in template.items()}
    if isinstance(template, list):
        return [_render_template(value, release) for value in template]
    if isinstance(template, str):
        return template.replace("{release_id}", release).replace("{release}", short_id(release))
    return template
