"""Why: every word with the API server goes through here, so that its client's exceptions and habits end here.

Objects go in and out as plain documents. Every request has a time limit. Refuses to retry: who asks knows what a late
answer is worth. What the server says of an object that it refuses is repeated word for word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from kubernetes import client
from kubernetes import config as kubernetes_config
from kubernetes.client.exceptions import ApiException
from kubernetes.config.config_exception import ConfigException
from urllib3.exceptions import HTTPError

from reelway.platform.errors import ConfigError, KubernetesError

Document = dict[str, Any]
TIMEOUT_S: Final = 5.0
_SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_JSON: Final = "application/json"
_MERGE: Final = "application/merge-patch+json"
_SHOWN: Final = 1000


class AbsentError(KubernetesError):
    """There is no such object, or no such kind."""


class ConflictError(KubernetesError):
    """The object is not the one that was read any more, or is there already."""


class KubeApi:
    """A namespace of a cluster. Safe between threads.

    A path follows the namespace: ``apps/v1/deployments/name``, ``v1/configmaps``.

    Args:
        namespace: None takes the pod's or the context's.
        context: of the kubeconfig; None takes a pod's service account where there is one, else the current context.

    Raises:
        ConfigError: there is neither a service account nor a kubeconfig with that context.
        KubernetesError: of every method: the server could not be reached, or refused.
    """

    def __init__(
        self, namespace: str | None = None, *, context: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        configuration = client.Configuration()
        own = _load(configuration, context)
        configuration.retries = 0
        self.namespace = namespace or own
        self.server = str(configuration.host)
        self._timeout_s = timeout_s
        self._configuration = configuration
        self._client = client.ApiClient(configuration)

    def get(self, path: str) -> Document | None:
        """An object; None when there is none."""
        try:
            return self._ask("GET", path)
        except AbsentError:
            return None

    def list(self, path: str) -> list[Document]:
        """The namespace's objects of a kind. Raises AbsentError: the kind is not known to the cluster."""
        return list(self._ask("GET", path).get("items") or ())

    def list_versions(self, path: str) -> dict[str, str]:
        """Uid -> resource version of every object, without their contents."""
        accept = f"{_JSON};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        items = self._ask("GET", path, accept=accept).get("items") or ()
        return {item["metadata"]["uid"]: item["metadata"]["resourceVersion"] for item in items}

    def create(self, path: str, document: Mapping[str, Any]) -> Document:
        """Raises ConflictError: there is one of that name."""
        return self._ask("POST", path, document)

    def replace(self, path: str, document: Mapping[str, Any]) -> Document:
        """Write the whole object. Raises ConflictError: its ``resourceVersion`` is not the newest."""
        return self._ask("PUT", path, document)

    def patch(self, path: str, change: Mapping[str, Any]) -> Document:
        """A JSON merge patch; a ``metadata.resourceVersion`` in it must be the newest, else ConflictError."""
        return self._ask("PATCH", path, change, content=_MERGE)

    def delete(self, path: str) -> None:
        """Ask for its removal; nothing when there is none."""
        try:
            self._ask("DELETE", path)
        except AbsentError:
            return

    def read_text(self, path: str) -> str:
        """What is no document: a log. Raises AbsentError: there is none."""
        return self._answer("GET", path, accept="*/*")

    def connection(self) -> Mapping[str, Any]:
        """How to reach the server, for a client of another kind: host, ca, certificate, key, token."""
        settings = self._configuration
        token = self._headers("", "").get("authorization", "")
        return {
            "server": self.server, "ca_path": settings.ssl_ca_cert, "insecure": not settings.verify_ssl,
            "certificate_path": settings.cert_file, "private_key_path": settings.key_file,
            "scheme": token.partition(" ")[0] or None, "token": token.partition(" ")[2] or None,
        }  # fmt: skip

    def _ask(
        self,
        method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"],
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: str = _JSON,
        content: str = _JSON,
    ) -> Document:
        loaded: Document = json.loads(self._answer(method, path, body, accept=accept, content=content))
        return loaded

    def _answer(
        self,
        method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"],
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        accept: str = _JSON,
        content: str = _JSON,
    ) -> str:
        what = f"{method} {path} in namespace {self.namespace}"
        try:
            answer = self._client.call_api(
                method, self.server + _url(path, self.namespace), header_params=self._headers(accept, content),
                body=body, _request_timeout=self._timeout_s,
            )  # fmt: skip
            text = answer.read()
        except (HTTPError, OSError, ApiException) as error:
            raise KubernetesError(
                f"{what}: cannot ask {self.server}: {_short(str(error))}; is it reachable?"
            ) from error
        if not 200 <= answer.status < 300:
            raise _refusal(what, answer.status, text)
        return text.decode(errors="replace") if isinstance(text, bytes) else str(text)

    def _headers(self, accept: str, content: str) -> dict[str, str]:
        headers = {"Accept": accept, "Content-Type": content, "User-Agent": "reelway"}
        for auth in self._configuration.auth_settings().values():  # asks for a new token when the old one is old
            headers[auth["key"]] = auth["value"]
        return headers


def _load(configuration: Any, context: str | None) -> str:
    """Fill the client's configuration; the namespace that it comes with."""
    try:
        if context is None and (_SERVICE_ACCOUNT / "token").exists():
            kubernetes_config.load_incluster_config(client_configuration=configuration)
            return (_SERVICE_ACCOUNT / "namespace").read_text().strip()
        where = os.environ.get("KUBECONFIG") or None  # the client looks at it once, when it is imported
        kubernetes_config.load_kube_config(where, context=context, client_configuration=configuration)
        contexts, active = kubernetes_config.list_kube_config_contexts(where)
        chosen = next((c for c in contexts if c["name"] == context), active)
        return str(chosen["context"].get("namespace", "default"))
    except (ConfigException, OSError) as error:
        wanted = f"context {context!r}" if context else "a cluster"
        raise ConfigError(f"no way to {wanted}: {error}; set KUBECONFIG, or name a context with --context") from error


def _url(path: str, namespace: str) -> str:
    first, _, rest = path.partition("/")
    if first == "v1":
        return f"/api/v1/namespaces/{namespace}/{rest}"
    version, _, rest = rest.partition("/")
    return f"/apis/{first}/{version}/namespaces/{namespace}/{rest}"


def _refusal(what: str, status: int, text: bytes | str) -> KubernetesError:
    try:
        said = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        said = str(text)
    kind = {404: AbsentError, 409: ConflictError}.get(status, KubernetesError)
    hint = {401: "; log in again", 403: "; ask for that right"}.get(status, "")
    return kind(f"{what} answered {status}: {_short(said)}{hint}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
