"""An in-process HTTP server that behaves like the API server for ReleaseRollouts: list, watch, patch, status, delete.
Other objects can be read, created, replaced and patched.

Tests script its faults: a watch that ends, a connection that is cut, and a resource version that has expired. It does
not validate schemas; the tests marked ``cluster`` use a real API server for that.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

ROLLOUTS = "/apis/reelway.dev/v1alpha1/namespaces/test/releaserollouts"


class FakeApiServer:
    """Rollouts and the events about them. ``log`` contains the method and path of each request."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.objects: dict[str, dict[str, Any]] = {}
        self.other: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.version = 100
        self.oldest_version = 0
        self.cut_watches = 0
        """Incremented to cut the connection of every open watch."""
        self.unavailable = False
        self.log: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        with self.changed:
            self.cut_watches += 1
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def write_kubeconfig(self, path: Path) -> Path:
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake", "namespace": "test"}}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "fake", "contexts": [context],
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}], "users": [{"name": "fake", "user": {}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(config))
        return path

    def requests(self, method: str, *, watch: bool = False) -> int:
        return sum(
            1 for known, path in self.log if known == method and ROLLOUTS in path and ("watch=1" in path) == watch
        )

    def apply(self, document: dict[str, Any], event: str = "") -> dict[str, Any]:
        """Creates or replaces a rollout as a user would."""
        with self.changed:
            name = document["metadata"]["name"]
            known = self.objects.get(name)
            stored = copy.deepcopy(document)
            defaults: dict[str, Any] = {"namespace": "test", "uid": f"{name}-0000-{self.version}", "generation": 1}
            previous = known["metadata"] if known else defaults
            stored["metadata"] = {
                "creationTimestamp": "2026-01-01T00:00:00Z", **previous, **stored["metadata"],
            }  # fmt: skip
            if known and known["spec"] != stored["spec"]:
                stored["metadata"]["generation"] = previous["generation"] + 1
            return self._store(stored, event or ("MODIFIED" if known else "ADDED"))

    def delete(self, name: str) -> None:
        """Deletes a rollout as a user would: an object with finalizers only gets a deletion timestamp."""
        with self.changed:
            stored = copy.deepcopy(self.objects[name])
            if stored["metadata"].get("finalizers"):
                stored["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z"
                stored["metadata"]["generation"] += 1
                self._store(stored, "MODIFIED")
            else:
                self._store(stored, "DELETED")

    def forget_changes(self) -> None:
        """Compacts the history: watches from any earlier version are answered with 410."""
        with self.changed:
            self.version += 1
            self.oldest_version = self.version
            self.events.clear()

    def bookmark(self) -> int:
        """Sends a bookmark with a new version to every open watch."""
        with self.changed:
            self.version += 1
            metadata = {"resourceVersion": str(self.version)}
            self.events.append({"type": "BOOKMARK", "object": {"kind": "ReleaseRollout", "metadata": metadata}})
            self.changed.notify_all()
            return self.version

    def _store(self, stored: dict[str, Any], event: str) -> dict[str, Any]:
        self.version += 1
        stored["metadata"]["resourceVersion"] = str(self.version)
        name = stored["metadata"]["name"]
        if event == "DELETED":
            self.objects.pop(name, None)
        else:
            self.objects[name] = stored
        self.events.append({"type": event, "object": copy.deepcopy(stored)})
        self.changed.notify_all()
        return copy.deepcopy(stored)

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.changed:
            if not path.startswith(ROLLOUTS):
                return self._answer_other(method, path, body)
            name = path.removeprefix(ROLLOUTS).strip("/").removesuffix("/status")
            if method == "GET" and not name:
                items = [copy.deepcopy(one) for one in self.objects.values()]
                return 200, {"items": items, "metadata": {"resourceVersion": str(self.version)}}
            known = self.objects.get(name)
            if known is None:
                return 404, {"message": f"releaserollouts {name!r} not found"}
            if method == "GET":
                return 200, copy.deepcopy(known)
            wanted = body["metadata"].get("resourceVersion")
            if wanted not in (None, known["metadata"]["resourceVersion"]):
                return 409, {"message": "the object has been modified"}
            stored = copy.deepcopy(known)
            if method == "PUT":
                stored["status"] = body["status"]
            else:
                stored["metadata"] |= body["metadata"]
                if "spec" in body:
                    stored["spec"] |= body["spec"]
                    stored["metadata"]["generation"] += 1
            deleted = "deletionTimestamp" in stored["metadata"] and not stored["metadata"].get("finalizers")
            return 200, self._store(stored, "DELETED" if deleted else "MODIFIED")

    def _answer_other(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
        known = self.other.get(path)
        if method != "POST" and known is None:
            return 404, {"message": f"{path} not found"}
        if method == "GET" and known:
            return 200, known
        if known and body["metadata"].get("resourceVersion") not in (None, known["metadata"]["resourceVersion"]):
            return 409, {"message": "the object has been modified"}
        if method == "PATCH" and known:
            body = merged(known, body)
        return 200, self.put(path, body)

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Stores an object that is not a rollout under its URL path."""
        self.version += 1
        self.other[path] = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        return self.other[path]


def merged(document: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Applies a JSON merge patch without deletions."""
    nested = {key: merged(document[key], value) for key, value in change.items()
              if isinstance(value, dict) and isinstance(document.get(key), dict)}  # fmt: skip
    return {**document, **change, **nested}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FakeApiServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        state = self.server_state
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        state.log.append((self.command, self.path))
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if state.unavailable:
            self._send(503, {"message": "the server is shutting down"})
        elif "watch" in query:
            self._watch(int(query["resourceVersion"][0]), float(query["timeoutSeconds"][0]))
        else:
            self._send(*state.answer(self.command, url.path, body))

    do_GET = do_PUT = do_PATCH = do_POST = do_DELETE = _handle  # noqa: N815

    def _send(self, status: int, document: dict[str, Any]) -> None:
        text = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _watch(self, version: int, timeout_s: float) -> None:
        state = self.server_state
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        deadline = time.monotonic() + timeout_s
        with state.changed:
            cut = state.cut_watches
            if version < state.oldest_version:
                error = {"kind": "Status", "code": 410, "message": f"too old resource version: {version}"}
                self._chunk({"type": "ERROR", "object": error})
                self._end()
                return
        while time.monotonic() < deadline:
            with state.changed:
                news = [one for one in state.events if int(one["object"]["metadata"]["resourceVersion"]) > version]
                if not news and state.cut_watches == cut:
                    state.changed.wait(max(0.0, deadline - time.monotonic()))
                if state.cut_watches != cut:
                    self.close_connection = True
                    self.connection.close()
                    return
            for event in news:
                self._chunk(event)
                version = int(event["object"]["metadata"]["resourceVersion"])
        self._end()

    def _chunk(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
