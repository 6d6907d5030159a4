"""The whole service on a real Ray Serve: separate deployments, real HTTP, faults, weights, metrics of all processes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
from tests.release_files import NOW_S, make_release_folder
from tests.serving.viewer_store import make_viewer_store

from reelway.platform.contracts.api import RecommendResponse
from reelway.platform.contracts.blend import Blend, RetrievalBlend
from reelway.platform.features.vector_log import read_vectors
from reelway.platform.rollout.bucketing import arm_of
from reelway.platform.tokens import TokenSigner
from reelway.serving.release_loader import ReleaseLoader

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECRET = b"a secret of the tests, long enough"
KNOWN_VIEWER = 42
READY_S = 60.0


@dataclass
class Running:
    """The service under test."""

    url: str
    options: Any
    release: str
    other: str
    watched: list[int]
    client: httpx.Client

    def ask(self, viewer: int = KNOWN_VIEWER, count: int = 10, **context: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/recommend", json={"viewer_id": viewer, "count": count, "context": context})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def metric(self, name: str, **labels: str) -> float:
        """Sum over all series of this name that carry the labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def wait_until_whole(self) -> None:
        deadline = time.monotonic() + READY_S
        while self.ask()["degraded"]:
            assert time.monotonic() < deadline, "a stage did not come back"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from reelway.serving.commands import free_port
    from reelway.serving.deployments import ServiceOptions, running_service

    place = tmp_path_factory.mktemp("service")
    blend = Blend(retrieval=RetrievalBlend(candidates=100))
    ids = []
    for seed in range(2):
        made = place / "releases" / f"made-{seed}"
        manifest = make_release_folder(made, videos=300, seed=seed, blend=blend)
        made.rename(place / "releases" / manifest.release_id)
        ids.append(manifest.release_id)
    table = ReleaseLoader(place / "releases" / ids[0]).table()
    watched = table.video_id[5:15].tolist()
    row = {
        "region": "eu",
        "created_at_s": NOW_S - 1e6,
        "history_videos": watched,
        "history_weights": [1.0] * 10,
        "history_times_s": [NOW_S - 3600.0 * i for i in range(10, 0, -1)],
    }
    make_viewer_store(place / "features", {KNOWN_VIEWER: row}, NOW_S)
    options = ServiceOptions(
        releases_dir=place / "releases",
        metrics_dir=place / "metrics",
        token_secrets=(SECRET,),
        features_dir=place / "features",
        vector_log=place / "vectors.jsonl",
        parity_ratio=1.0,
        port=free_port("127.0.0.1"),
    )
    with (
        running_service({ids[0]: 10_000}, options) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        running = Running(url, options, ids[0], ids[1], watched, client)
        running.wait_until_whole()
        yield running


def test_a_known_viewer_gets_a_whole_slate_of_unseen_videos_with_readable_tokens(service: Running) -> None:
    answer = service.ask(count=20)
    assert RecommendResponse.model_validate(answer).degraded == []
    assert len(answer["videos"]) == 20
    assert not {video["video_id"] for video in answer["videos"]} & set(service.watched)
    token = TokenSigner(SECRET).read(answer["videos"][3]["token"])
    assert (token.position, token.video_id, token.release) == (3, answer["videos"][3]["video_id"], service.release)
    assert any(video["reason"].startswith("because you watched Video") for video in answer["videos"])


def test_the_service_answers_what_the_graph_in_one_process_answers(service: Running) -> None:
    from reelway.platform.contracts.api import RecommendRequest
    from reelway.platform.features.store import ViewerRows, open_feature_store

    features = service.options.features_dir
    row = ViewerRows(open_feature_store(features)).read(KNOWN_VIEWER)
    graph = ReleaseLoader(service.options.releases_dir / service.release).graph(TokenSigner(SECRET))
    here = graph.recommend(RecommendRequest(viewer_id=KNOWN_VIEWER, count=20), row, NOW_S)
    there = service.ask(count=20, time="2024-06-10T06:13:20Z")
    assert [v["video_id"] for v in there["videos"]] == [v.video_id for v in here.videos]
    assert [v["reason"] for v in there["videos"]] == [v.reason for v in here.videos]
    assert [v["score"] for v in there["videos"]] == pytest.approx([v.score for v in here.videos], abs=1e-5)


def test_an_unknown_viewer_gets_a_whole_slate(service: Running) -> None:
    answer = service.ask(viewer=9_999_999)
    assert answer["degraded"] == []
    assert len(answer["videos"]) == 10


@pytest.mark.parametrize(
    ("body", "field"), [({"viewer_id": -1}, "viewer_id"), ({"viewer_id": 1, "count": 0}, "count"), ({}, "viewer_id")]
)
def test_invalid_requests_are_refused_over_http_with_the_field(
    service: Running, body: dict[str, Any], field: str
) -> None:
    before = service.metric("reelway_ingress_refused_total")
    answer = service.client.post("/v1/recommend", json=body)
    assert answer.status_code == 422
    assert [one["field"] for one in answer.json()["fields"]] == [field]
    assert service.metric("reelway_ingress_refused_total") == before + 1


def test_the_schema_is_published(service: Running) -> None:
    parts = service.client.get("/openapi.json").json()["components"]["schemas"]
    jsonschema.validate(service.ask(), parts["RecommendResponse"] | {"components": {"schemas": parts}})


def test_concurrent_requests_are_all_answered_whole(service: Running) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda viewer: service.ask(viewer=viewer), range(80)))
    assert [answer["viewer_id"] for answer in answers] == list(range(80))
    assert sum(len(answer["videos"]) == 10 for answer in answers) == 80
    assert len({answer["request_id"] for answer in answers}) == 80


def test_one_scrape_shows_the_metrics_of_every_process(service: Running) -> None:
    service.ask()
    label = service.release[:12]
    for stage in ("ingress", "retrieval", "ranking", "reranking"):
        assert service.metric(f"reelway_{stage}_latency_seconds_count", release=label) > 0
    assert service.metric("reelway_retrieval_candidates_total", release=label, source="ann") > 0
    assert service.metric("reelway_retrieval_filtered_total", release=label, kind="seen") > 0
    assert service.metric("reelway_ingress_requests_total", arm="stable", outcome="ok") > 0
    text = service.client.get("/metrics").text
    assert str(KNOWN_VIEWER) not in re.findall(r'="([^"]*)"', text)


def test_what_was_served_is_logged_for_the_parity_replay(service: Running) -> None:
    answer = service.ask(count=5, device="tv")
    deadline = time.monotonic() + 10
    while True:
        logged = {vector.request_id: vector for vector in read_vectors(service.options.vector_log)}
        if answer["request_id"] in logged or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    vector = logged[answer["request_id"]]
    assert list(vector.viewer["history_videos"]) == service.watched
    assert [video["video_id"] for video in vector.videos] == [video["video_id"] for video in answer["videos"]]
    assert (vector.device, vector.release) == ("tv", service.release)


@pytest.mark.parametrize(
    ("deployment", "rung"), [("Ranking", "no_ranker"), ("Retrieval", "no_retrieval"), ("Reranking", "no_reranker")]
)
def test_a_killed_replica_costs_no_request(service: Running, deployment: str, rung: str) -> None:
    service.wait_until_whole()
    before = service.metric("reelway_ingress_degraded_total", rung=rung)
    killed = threading.Event()
    answers: list[dict[str, Any]] = []

    def keep_asking() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            seen_after = 0
            while seen_after < 15:
                reply = client.post("/v1/recommend", json={"viewer_id": KNOWN_VIEWER, "count": 10})
                assert reply.status_code == 200, reply.text
                answers.append(reply.json())
                seen_after += killed.is_set()

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(keep_asking) for _ in range(2)]
        time.sleep(0.2)
        os.kill(replica_pid(deployment), signal.SIGKILL)
        killed.set()
        for one in asking:
            one.result()
    assert all(len(answer["videos"]) == 10 for answer in answers)
    stepped_down = Counter(step for answer in answers for step in answer["degraded"])
    assert stepped_down[rung] >= 1
    assert service.metric("reelway_ingress_degraded_total", rung=rung) >= before + stepped_down[rung]
    service.wait_until_whole()


def replica_pid(deployment: str) -> int:
    """The process of a deployment's only replica, among this test's own descendants."""
    titles = {child.pid: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
    (pid,) = [
        pid for pid, title in titles.items() if title.startswith("ray::ServeReplica") and f":{deployment}" in title
    ]
    return pid


def test_a_change_of_weights_moves_viewers_without_losing_a_request(service: Running) -> None:
    from ray import serve

    from reelway.serving.deployments import release_application, set_weights

    serve.run(release_application(service.other, service.options), name=service.other, route_prefix=None)
    weights = {service.other: 3000, service.release: 7000}
    failures: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            while not stop.is_set():
                reply = client.post("/v1/recommend", json={"viewer_id": 1, "count": 1})
                if reply.status_code != 200:
                    failures.append(reply.text)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    set_weights(weights, service.options)
    deadline = time.monotonic() + 30
    while len(service.client.get("/v1/releases/current").json()["releases"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    asking.join()
    assert failures == []
    listed = service.client.get("/v1/releases/current").json()["releases"]
    assert [(one["release"], one["arm"], one["weight_basis_points"]) for one in listed] == [
        (service.other, "canary", 3000),
        (service.release, "stable", 7000),
    ]
    for viewer in range(40):
        answer = service.ask(viewer=viewer, count=1)
        expected = arm_of(viewer, service.options.salt, weights)
        assert answer["release"] == expected
        assert answer["arm"] == ("canary" if expected == service.other else "stable")
