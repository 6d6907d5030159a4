"""A small client of the Kubernetes API for one namespace.

Objects are plain dictionaries, and every error is a ``KubernetesError``: exceptions of the ``kubernetes`` package never
leave this module. Every request has a timeout. Nothing is retried, because only the caller can decide whether a late
answer is still useful. An error repeats the server's message verbatim.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlencode

from kubernetes import client
from kubernetes import config as kubernetes_config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from kubernetes.watch.watch import iter_resp_lines
from urllib3.exceptions import HTTPError

from reelway.platform.errors import ConfigError, KubernetesError

KubeObject = dict[str, Any]
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
TIMEOUT_S: Final = 5.0
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_JSON: Final = "application/json"
_MERGE_PATCH: Final = "application/merge-patch+json"
_MAX_ERROR_CHARACTERS: Final = 1000


class NotFoundError(KubernetesError):
    """The object or its kind does not exist."""


class ConflictError(KubernetesError):
    """The object changed since it was read, or an object of that name exists."""


class ExpiredError(KubernetesError):
    """The server no longer has the changes since the given resource version (410); list the objects again."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change of a watched object."""

    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK; a bookmark carries a resource version and no object."""
    document: KubeObject

    @property
    def resource_version(self) -> str:
        return str(self.document["metadata"]["resourceVersion"])


class KubeApi:
    """The objects of one namespace. Thread-safe.

    A path consists of group, version, kind and name: ``apps/v1/deployments/name``, ``v1/configmaps``.

    Args:
        namespace: None selects the namespace of the pod or of the kubeconfig context.
        context: kubeconfig context. None selects the pod's service account, or the current context outside a pod.
        timeout_s: timeout of one request in seconds.

    Raises:
        ConfigError: if there is no service account and the kubeconfig has no such context.
        KubernetesError: from every method, if the server cannot be reached or rejects the request.
    """

    def __init__(
        self, namespace: str | None = None, *, context: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        configuration = client.Configuration()
        default_namespace = _load_configuration(configuration, context)
        configuration.retries = 0
        self.namespace = namespace or default_namespace
        self.server = str(configuration.host)
        self._timeout_s = timeout_s
        self._configuration = configuration
        self._client = client.ApiClient(configuration)

    def get(self, path: str, *, timeout_s: float | None = None) -> KubeObject | None:
        """Returns an object, or None if it does not exist. ``timeout_s`` replaces the client's timeout if set."""
        try:
            return self._request("GET", path, timeout_s=timeout_s)
        except NotFoundError:
            return None

    def list(self, path: str) -> list[KubeObject]:
        """Returns all objects of a kind. Raises NotFoundError if the kind does not exist."""
        return list(self.list_at(path)[0])

    def list_at(self, path: str) -> tuple[Sequence[KubeObject], str]:
        """Returns all objects of a kind and the resource version of the list, from which ``watch`` continues."""
        answer = self._request("GET", path)
        return list(answer.get("items") or ()), str(answer["metadata"]["resourceVersion"])

    def watch(self, path: str, resource_version: str, *, timeout_s: float) -> Iterator[WatchEvent]:
        """Yields the changes after ``resource_version`` until the server ends the request.

        Args:
            timeout_s: how long the server keeps the request open. A connection that is silent for ``TIMEOUT_S`` longer
                counts as lost.

        Raises:
            ExpiredError: if the server no longer has all changes since ``resource_version``.
            KubernetesError: if the connection is lost. Events that were yielded before are valid.
        """
        query = {"watch": "1", "allowWatchBookmarks": "true", "resourceVersion": resource_version}
        target = f"{path}?{urlencode({**query, 'timeoutSeconds': max(1, round(timeout_s))})}"
        request = f"watch of {path} in namespace {self.namespace}"
        answer = self._open("GET", target, request, timeout_s=(self._timeout_s, timeout_s + self._timeout_s))
        try:
            for line in iter_resp_lines(answer.response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _error_from_response(
                        request, int(event["object"].get("code", 500)), json.dumps(event["object"])
                    )
                yield WatchEvent(event["type"], event["object"])
        except (HTTPError, OSError, ValueError) as error:
            raise KubernetesError(f"{request}: connection to {self.server} lost: {_short(str(error))}") from error
        finally:
            answer.response.close()

    def list_versions(self, path: str) -> dict[str, str]:
        """Returns UID -> resource version of every object of a kind, without fetching the objects."""
        accept = f"{_JSON};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        items = self._request("GET", path, accept=accept).get("items") or ()
        return {item["metadata"]["uid"]: item["metadata"]["resourceVersion"] for item in items}

    def create(self, path: str, document: Mapping[str, Any], *, timeout_s: float | None = None) -> KubeObject:
        """Creates an object. Raises ConflictError if an object of that name exists."""
        return self._request("POST", path, document, timeout_s=timeout_s)

    def replace(self, path: str, document: Mapping[str, Any], *, timeout_s: float | None = None) -> KubeObject:
        """Replaces an object. Raises ConflictError if its ``resourceVersion`` is not the latest."""
        return self._request("PUT", path, document, timeout_s=timeout_s)

    def patch(self, path: str, change: Mapping[str, Any]) -> KubeObject:
        """Applies a JSON merge patch.

        Raises:
            ConflictError: if the patch has a ``metadata.resourceVersion`` that is not the latest.
        """
        return self._request("PATCH", path, change, content=_MERGE_PATCH)

    def delete(self, path: str) -> None:
        """Requests the deletion of an object; does nothing if it does not exist."""
        try:
            self._request("DELETE", path)
        except NotFoundError:
            return

    def read_text(self, path: str) -> str:
        """Returns a plain-text resource such as a pod's log. Raises NotFoundError if it does not exist."""
        return self._send("GET", path, accept="*/*")

    def _request(
        self,
        method: Method,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: str = _JSON,
        content: str = _JSON,
        timeout_s: float | None = None,
    ) -> KubeObject:
        text = self._send(method, path, body, accept=accept, content=content, timeout_s=timeout_s)
        try:
            loaded: KubeObject = json.loads(text)
        except ValueError as error:
            raise KubernetesError(f"{method} {path}: the answer is not JSON: {error}") from error
        return loaded

    def _send(
        self,
        method: Method,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: str = _JSON,
        content: str = _JSON,
        timeout_s: float | None = None,
    ) -> str:
        request = f"{method} {path} in namespace {self.namespace}"
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        answer = self._open(method, path, request, body, accept=accept, content=content, timeout_s=timeout_s)
        try:
            return _text(answer.read())
        except (HTTPError, OSError) as error:
            raise self._unreachable(request, error) from error

    def _open(
        self,
        method: Method,
        path: str,
        request: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: str = _JSON,
        content: str = _JSON,
        timeout_s: float | tuple[float, float],
    ) -> Any:
        """Sends a request and returns the response with its body unread."""
        try:
            answer = self._client.call_api(
                method, self.server + _url(path, self.namespace), header_params=self._headers(accept, content),
                body=body, _request_timeout=timeout_s,
            )  # fmt: skip
            if not 200 <= answer.status < 300:
                raise _error_from_response(request, answer.status, _text(answer.read()))
        except (HTTPError, OSError, ApiException) as error:
            raise self._unreachable(request, error) from error
        return answer

    def _unreachable(self, request: str, error: Exception) -> KubernetesError:
        return KubernetesError(
            f"{request}: cannot reach {self.server}: {_short(str(error))}; check that the API server is running"
        )

    def _headers(self, accept: str, content: str) -> dict[str, str]:
        headers = {"Accept": accept, "Content-Type": content, "User-Agent": "reelway"}
        for auth in self._configuration.auth_settings().values():  # reloads an expired token
            headers[auth["key"]] = auth["value"]
        return headers


def _load_configuration(configuration: Any, context: str | None) -> str:
    """Fills the client's configuration in and returns the namespace of the pod or context."""
    try:
        if context is None and (_SERVICE_ACCOUNT / "token").exists():
            kubernetes_config.load_incluster_config(client_configuration=configuration)
            return (_SERVICE_ACCOUNT / "namespace").read_text().strip()
        kubeconfig = os.environ.get("KUBECONFIG") or None  # the client reads KUBECONFIG only at import
        kubernetes_config.load_kube_config(kubeconfig, context=context, client_configuration=configuration)
        contexts, active = kubernetes_config.list_kube_config_contexts(kubeconfig)
        chosen = next((c for c in contexts if c["name"] == context), active)
        return str(chosen["context"].get("namespace", "default"))
    except (ConfigException, OSError) as error:
        target = f"context {context!r}" if context else "a cluster"
        raise ConfigError(f"cannot connect to {target}: {error}; set KUBECONFIG or pass --context") from error


def _url(path: str, namespace: str) -> str:
    first, _, rest = path.partition("/")
    if first == "v1":
        return f"/api/v1/namespaces/{namespace}/{rest}"
    version, _, rest = rest.partition("/")
    return f"/apis/{first}/{version}/namespaces/{namespace}/{rest}"


def _error_from_response(request: str, status: int, text: str) -> KubernetesError:
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text
    kind = {404: NotFoundError, 409: ConflictError, 410: ExpiredError}.get(status, KubernetesError)
    hint = {401: "; log in again", 403: "; request this right from the cluster's administrator"}.get(status, "")
    return kind(f"{request} answered {status}: {_short(message)}{hint}")


def _text(body: bytes | str) -> str:
    return body.decode(errors="replace") if isinstance(body, bytes) else str(body)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_ERROR_CHARACTERS else text[:_MAX_ERROR_CHARACTERS] + "..."
