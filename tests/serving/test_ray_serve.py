"""`reelway serve` as a user has it: its own Ray, real HTTP, faults, the metrics of all processes, and a clean end.

One service for the whole module, so the tests share its state; the last one ends it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
from tests.release_files import NOW_S, make_release_folder
from tests.serving.viewer_store import make_viewer_store

from reelway.platform.cli.processes import end_group, reelway_command
from reelway.platform.contracts.api import RecommendRequest, RecommendResponse
from reelway.platform.contracts.blend import Blend, RetrievalBlend
from reelway.platform.contracts.features import TRAINING_SERVICE, VIEWER_SERVICE
from reelway.platform.features.store import ViewerRows, feature_service_digest, open_feature_store
from reelway.platform.features.vector_log import read_vectors
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.tokens import TokenSigner
from reelway.serving.release_loader import ReleaseLoader

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

KNOWN_VIEWER = 42
READY_S = 120.0
DOWN_S = 60.0


@dataclass
class Running:
    """The service under test."""

    run: Path
    process: subprocess.Popen[bytes]
    url: str
    release: str
    watched: list[int]
    client: httpx.Client

    @property
    def loader(self) -> ReleaseLoader:
        return ReleaseLoader(self.run / "serving" / "releases" / self.release)

    @property
    def signer(self) -> TokenSigner:
        return TokenSigner((self.run / "keys" / "token.secret").read_bytes())

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

    def replica_of(self, deployment: str) -> psutil.Process:
        """The process of a deployment's only replica, among the service's own."""
        (replica,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if (title := " ".join(child.cmdline())).startswith("ray::ServeReplica") and f":{deployment}" in title
        ]
        return replica


def make_run(run: Path) -> tuple[str, list[int]]:
    """A run directory with a signed release and a feature store that knows one viewer and what they watched."""
    made = run / "made"
    make_release_folder(made, videos=300)
    watched = ReleaseLoader(made).table().video_id[5:15].tolist()
    row = {
        "region": "eu",
        "created_at_s": NOW_S - 1e6,
        "history_videos": watched,
        "history_weights": [1.0] * 10,
        "history_times_s": [NOW_S - 3600.0 * i for i in range(10, 0, -1)],
    }
    make_viewer_store(run / "features", {KNOWN_VIEWER: row}, NOW_S)
    features = open_feature_store(run / "features")
    services = [
        {"name": name, "digest": feature_service_digest(features, name)} for name in (TRAINING_SERVICE, VIEWER_SERVICE)
    ]
    key = load_private_key(create_keys(run / "keys").private)
    blend = Blend(retrieval=RetrievalBlend(candidates=100))
    manifest = make_release_folder(made, videos=300, key=key, blend=blend, feature_services=services)
    return ReleaseStore(str(run / "releases")).write(made, manifest), watched


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run = tmp_path_factory.mktemp("run")
    release, watched = make_run(run)
    command = reelway_command("serve", "--run", str(run), "--port", "0", "--parity-ratio", "1")
    log, record = run / "serve.log", run / "serving.json"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        while not record.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        written = json.loads(record.read_text())
        assert written["pid"] == process.pid
        assert written["release"] == release
        assert written["url"] in log.read_text()
        with httpx.Client(base_url=written["url"], timeout=30) as client:
            yield Running(run, process, written["url"], release, watched, client)
    finally:
        end_group(process)


def test_a_known_viewer_gets_a_whole_slate_of_unseen_videos_with_readable_tokens(service: Running) -> None:
    answer = service.ask(count=20)
    assert RecommendResponse.model_validate(answer).degraded == []
    assert len(answer["videos"]) == 20
    assert not {video["video_id"] for video in answer["videos"]} & set(service.watched)
    token = service.signer.read(answer["videos"][3]["token"])
    assert (token.position, token.video_id, token.release) == (3, answer["videos"][3]["video_id"], service.release)
    assert any(video["reason"].startswith("because you watched Video") for video in answer["videos"])


def test_the_service_answers_what_the_graph_in_one_process_answers(service: Running) -> None:
    row = ViewerRows(open_feature_store(service.run / "features")).read(KNOWN_VIEWER)
    graph = service.loader.graph(service.signer)
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
        logged = {vector.request_id: vector for vector in read_vectors(service.run / "serving" / "vectors.jsonl")}
        if answer["request_id"] in logged or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    vector = logged[answer["request_id"]]
    assert list(vector.viewer["history_videos"]) == service.watched
    assert [video["video_id"] for video in vector.videos] == [video["video_id"] for video in answer["videos"]]
    assert (vector.device, vector.release) == ("tv", service.release)


def test_the_commands_own_client_prints_a_slate(service: Running) -> None:
    command = reelway_command("recommend", "--run", str(service.run), "--viewer", str(KNOWN_VIEWER), "--count", "3")
    readable = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"viewer {KNOWN_VIEWER}" in readable
    assert "because you watched" in " ".join(readable.split())
    raw = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert len(RecommendResponse.model_validate_json(raw).videos) == 3


def test_killed_replicas_cost_no_request(service: Running) -> None:
    service.wait_until_whole()
    rungs = {"Ranking": "no_ranker", "Retrieval": "no_retrieval", "Reranking": "no_reranker"}
    before = {rung: service.metric("reelway_ingress_degraded_total", rung=rung) for rung in rungs.values()}
    stop = threading.Event()
    answers: list[dict[str, Any]] = []

    def keep_asking() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            while not stop.is_set():
                reply = client.post("/v1/recommend", json={"viewer_id": KNOWN_VIEWER, "count": 10})
                answers.append(reply.json() | {"status": reply.status_code})

    def wait_for(rung: str) -> None:
        deadline = time.monotonic() + 30
        while not any(rung in answer.get("degraded", ()) for answer in list(answers)):
            assert time.monotonic() < deadline, f"no answer stepped down to {rung}"
            time.sleep(0.02)

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(keep_asking) for _ in range(2)]
        try:
            for deployment, rung in rungs.items():
                service.replica_of(deployment).kill()
                wait_for(rung)
            service.wait_until_whole()
        finally:
            stop.set()
        for one in asking:
            one.result()
    assert Counter(answer["status"] for answer in answers) == {200: len(answers)}
    assert {len(answer["videos"]) for answer in answers} == {10}
    stepped_down = Counter(step for answer in answers for step in answer["degraded"])
    for rung in rungs.values():
        assert service.metric("reelway_ingress_degraded_total", rung=rung) >= before[rung] + stepped_down[rung]


def test_z_an_interrupt_ends_the_service_with_all_its_processes(service: Running) -> None:
    started = psutil.Process(service.process.pid).children(recursive=True)
    assert len(started) > 5
    service.process.send_signal(signal.SIGINT)
    service.process.wait(DOWN_S)
    _, alive = psutil.wait_procs(started, timeout=15)
    assert [one.cmdline() for one in alive] == []
    assert not (service.run / "serving.json").exists()
