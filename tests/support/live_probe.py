"""Asks a running service what the live scene of the end-to-end tests has to know. Runs in a pod of the cluster.

``python live_probe.py VERB JSON`` calls a function of this module with keyword arguments and prints its result as JSON.
All times are from the pod's clock. Only the standard library and httpx are used. The pod plays the application's
gateway: it signs the header with each viewer's id.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

TIMEOUT_S = 10.0
GATEWAY_KEY = Path("/files/gateway.key")
"""The secret that the gateway and the service share."""
UPLOAD_COUNT = 50
"""Videos of each slate in which an uploaded video is looked for."""
FOLLOW_COUNT, FOLLOW_INTERVAL_S = 5, 0.25
"""Videos and interval of the slates of a viewer who waits. A video is shown once, and the catalogue is small."""
Slate = dict[str, Any]


def slates(url: str, viewers: Sequence[int], count: int) -> list[Slate]:
    """Returns a slate for each of these viewers, one after another. A viewer may occur several times."""
    with _client(url) as client:
        return [_slate(client, viewer, count) for viewer in viewers]


def report(url: str, outcomes: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Reports outcomes by viewer, one request per viewer. Returns the answers as one."""
    with _client(url) as client:
        answers = [_report(client, int(viewer), of_viewer) for viewer, of_viewer in outcomes.items()]
    return {
        "accepted": sum(answer["accepted"] for answer in answers),
        "refused": [refusal for answer in answers for refusal in answer["refused"]],
    }


def identities(url: str, viewer: int, token: str) -> dict[str, int]:
    """Returns the status of requests about a viewer: without a proof, with that of another viewer, and with the own.

    ``token``: of a slate of that viewer. ``accepted_of_another``: outcomes accepted of it from the other viewer.
    """
    request = {"viewer_id": viewer, "count": 1}
    outcome = {"outcomes": [{"token": token, "type": "like"}]}
    other = _proof(viewer + 1)
    with _client(url) as client:
        return {
            "slate_without": client.post("/v1/recommend", json=request).status_code,
            "slate_of_another": client.post("/v1/recommend", json=request, headers=other).status_code,
            "outcome_without": client.post("/v1/outcomes", json=outcome).status_code,
            "accepted_of_another": client.post("/v1/outcomes", json=outcome, headers=other).json()["accepted"],
            "slate": client.post("/v1/recommend", json=request, headers=_proof(viewer)).status_code,
        }


def follow(url: str, viewer: int, durations_ms: Mapping[str, int], within_s: float) -> dict[str, Any]:
    """Watches and likes the first three videos of a slate to the end, then asks for slates until one follows that.

    Returns:
        ``after_s``: seconds from the report to that slate, None if there was none; ``degraded``: stages without an
        answer, of the first slate and the last.
    """
    with _client(url) as client:
        first = _slate(client, viewer, 10)
        watched = first["videos"][:3]
        outcomes: list[dict[str, Any]] = []
        for video in watched:
            length_ms = durations_ms[str(video["video_id"])]
            outcomes += [
                {"token": video["token"], "type": "watch", "value": length_ms},
                {"token": video["token"], "type": "like"},
            ]
        began = time.monotonic()
        _report(client, viewer, outcomes)
        while True:
            page = _slate(client, viewer, FOLLOW_COUNT)
            after_s = time.monotonic() - began
            follows = any(video["reason"].startswith("because") for video in page["videos"])
            if follows or after_s > within_s:
                return {"after_s": after_s if follows else None, "degraded": [first["degraded"], page["degraded"]]}
            time.sleep(FOLLOW_INTERVAL_S)


def upload(
    url: str, catalogue: str, token: str, video: Mapping[str, Any], viewer: int, within_s: float
) -> dict[str, Any]:
    """Uploads a video and asks for slates of new viewers, from ``viewer`` on, until one contains it.

    Returns:
        ``answer`` of the catalogue; ``after_s``: seconds from the upload to that slate, None if there was none.
    """
    with _client(url) as client:
        began = time.monotonic()
        answer = _change(catalogue, token, [{"op": "upsert", **video}])
        while True:
            shown = _ids(_slate(client, viewer, UPLOAD_COUNT))
            viewer, after_s = viewer + 1, time.monotonic() - began
            if video["video_id"] in shown or after_s > within_s:
                return {"answer": answer, "after_s": after_s if video["video_id"] in shown else None}


def take_down(
    url: str, catalogue: str, token: str, video_ids: Sequence[int], viewer: int, read_s: float
) -> dict[str, Any]:
    """Takes videos down and reads slates of new viewers, from ``viewer`` on, for ``read_s`` seconds.

    Returns:
        ``answer`` of the catalogue; ``slates``: their number; ``last_s``: seconds from the answer to the last slate
        that was requested and contained one of the videos, 0 if there was none.
    """
    with _client(url) as client:
        changes = [{"op": "takedown", "video_id": video, "reason": "end-to-end test"} for video in video_ids]
        answer = _change(catalogue, token, changes)
        accepted, count, last_s = time.monotonic(), 0, 0.0
        while (asked_s := time.monotonic() - accepted) < read_s:
            if set(video_ids) & set(_ids(_slate(client, viewer, UPLOAD_COUNT))):
                last_s = asked_s
            viewer, count = viewer + 1, count + 1
        return {"answer": answer, "slates": count, "last_s": last_s}


def metrics(urls: Iterable[str]) -> list[str]:
    """Returns the text of metrics pages."""
    pages = [httpx.get(url, timeout=TIMEOUT_S, follow_redirects=True) for url in urls]
    return [page.raise_for_status().text for page in pages]


def _client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT_S)


def _proof(viewer: int) -> dict[str, str]:
    """The header by which the gateway proves who the viewer is."""
    signed = f"{viewer}.{int(time.time())}"
    signature = hmac.new(GATEWAY_KEY.read_bytes().strip(), signed.encode(), hashlib.sha256).hexdigest()
    return {"Reelway-Viewer": f"{signed}.{signature}"}


def _slate(client: httpx.Client, viewer: int, count: int) -> Slate:
    request = {"viewer_id": viewer, "count": count}
    slate: Slate = client.post("/v1/recommend", json=request, headers=_proof(viewer)).raise_for_status().json()
    return slate


def _report(client: httpx.Client, viewer: int, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    answer = client.post("/v1/outcomes", json={"outcomes": list(outcomes)}, headers=_proof(viewer))
    content: dict[str, Any] = answer.raise_for_status().json()
    return content


def _change(catalogue: str, token: str, changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"}
    body = {"changes": list(changes)}
    answer = httpx.post(f"{catalogue}/v1/catalogue", json=body, headers=headers, timeout=TIMEOUT_S).raise_for_status()
    content: dict[str, Any] = answer.json()
    return content


def _ids(slate: Slate) -> list[int]:
    return [video["video_id"] for video in slate["videos"]]


VERBS: dict[str, Callable[..., Any]] = {
    verb.__name__: verb for verb in (slates, report, identities, follow, upload, take_down, metrics)
}

if __name__ == "__main__":
    print(json.dumps(VERBS[sys.argv[1]](**json.loads(sys.argv[2]))))
