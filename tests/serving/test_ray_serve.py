"""`reelway serve` with its own Ray and real HTTP: slates, failures, metrics of all processes, and shutdown.

All tests of the module share one service and its state; the last test stops it.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest
from tests.support.release_files import NOW_S
from tests.support.serving.hostile_serving_requests import check_error
from tests.support.serving.served_run import KNOWN_VIEWER, READY_S, Running, make_run

from reelway.platform.cli.processes import reelway_command, terminate_process_group
from reelway.platform.contracts.api import RecommendRequest, RecommendResponse
from reelway.platform.contracts.events import Arm
from reelway.platform.features.feast_store import open_feature_store
from reelway.platform.features.vector_reader import VectorReader
from reelway.platform.features.viewer_memory import MEMORY_FILE
from reelway.platform.features.viewer_memory_local import LocalViewerMemory
from reelway.platform.features.viewer_memory_sqlite import SqliteViewerMemory
from reelway.platform.features.viewer_rows import ViewerRowReader
from reelway.platform.features.watched_filter import FILTER_BYTES, generation_at
from reelway.platform.rollout import metric_names
from reelway.platform.rollout.traffic.bucketing import bucket_of
from reelway.platform.rollout.traffic.routing import ArmRoute, Routing, ShadowRoute
from reelway.platform.rollout.traffic.serve_rest import ServeRestBackend
from reelway.platform.rollout.traffic.target import TrafficTarget
from reelway.platform.run_directory import RunDirectory
from reelway.platform.viewer_pseudonyms import use_secret_of_run, viewer_pseudonym
from reelway.serving.serve_settings import SERVE_SETTINGS, SLOW_REQUEST_S

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

DOWN_S = 60.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    run = tmp_path_factory.mktemp("run")
    release, other, watched = make_run(run)
    command = reelway_command("serve", "--run", str(run), "--port", "0", "--parity-sample-ratio", "1")
    log, record = run / "serve.log", run / "serving.json"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        # The record is written before the background processes start, the address is printed afterwards.
        while not (record.exists() and json.loads(record.read_text())["url"] in log.read_text()):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        written = json.loads(record.read_text())
        assert written["pid"] == process.pid
        assert written["release"] == release
        with httpx.Client(base_url=written["url"], timeout=30) as client:
            yield Running(run, process, written["url"], written["internal_url"], release, other, watched, client)
    finally:
        terminate_process_group(process)


@pytest.fixture
def backend(service: Running) -> Iterator[ServeRestBackend]:
    with closing(ServeRestBackend(RunDirectory(service.run))) as serve_backend:
        yield serve_backend


def test_known_viewer_gets_a_full_slate_with_valid_tokens(service: Running) -> None:
    answer = service.ask(count=20)
    assert RecommendResponse.model_validate(answer).degraded == []
    assert len(answer["videos"]) == 20
    assert not {video["video_id"] for video in answer["videos"]} & set(service.watched)
    token = service.signer.read(answer["videos"][3]["token"])
    assert (token.position, token.video_id, token.release) == (3, answer["videos"][3]["video_id"], service.release)
    assert any(video["reason"].startswith("because you watched Video") for video in answer["videos"])


def test_service_slate_equals_the_in_process_slate(service: Running) -> None:
    row = ViewerRowReader(open_feature_store(service.run / "features")).read(KNOWN_VIEWER)
    stored = SqliteViewerMemory(service.run / "features" / MEMORY_FILE)
    shown = stored.read(KNOWN_VIEWER)
    stored.close()
    memory = LocalViewerMemory(time.time)
    memory.restore_shown(KNOWN_VIEWER, shown.shown_ids, shown.shown_at_s)
    graph = service.loader.in_process_recommender(service.signer, memory=memory)
    local = graph.recommend(RecommendRequest(viewer_id=KNOWN_VIEWER, count=20), row, NOW_S)
    served = service.ask(count=20, time="2024-06-10T06:13:20Z")
    assert [v["video_id"] for v in served["videos"]] == [v.video_id for v in local.videos]
    assert [v["reason"] for v in served["videos"]] == [v.reason for v in local.videos]
    assert [v["score"] for v in served["videos"]] == pytest.approx([v.score for v in local.videos], abs=1e-5)


def test_unknown_viewer_gets_a_full_slate(service: Running) -> None:
    answer = service.ask(viewer=9_999_999)
    assert answer["degraded"] == []
    assert len(answer["videos"]) == 10


@pytest.mark.parametrize(
    ("body", "field"), [({"viewer_id": -1}, "viewer_id"), ({"viewer_id": 1, "count": 0}, "count"), ({}, "viewer_id")]
)
def test_invalid_request_gets_422_with_the_field(service: Running, body: dict[str, Any], field: str) -> None:
    before = service.metric("reelway_ingress_refused_total")
    answer = service.client.post("/v1/recommend", json=body)
    assert answer.status_code == 422
    assert [one["field"] for one in answer.json()["fields"]] == [field]
    assert service.metric("reelway_ingress_refused_total") == before + 1


@pytest.mark.skipif(SERVE_SETTINGS["RAY_SERVE_ENABLE_HA_PROXY"] == "0", reason="HAProxy is not installed")
@pytest.mark.parametrize("rest", ["", "Content-Length: 1000\r\n\r\n"], ids=["headers", "body"])
def test_proxy_ends_a_request_that_arrives_slowly(service: Running, rest: str) -> None:
    """One byte every 0.2 s never counts as silence; only the limit for the whole request ends it."""
    address = httpx.URL(service.url)
    with socket.create_connection((address.host, address.port or 80), timeout=0.2) as connection:
        connection.sendall(f"POST /v1/recommend HTTP/1.1\r\nHost: a\r\n{rest}".encode())
        began_s = time.monotonic()
        response = b""
        while not response:
            assert time.monotonic() - began_s < 2 * SLOW_REQUEST_S
            connection.sendall(b"x")
            with suppress(TimeoutError):
                response = connection.recv(4096)
        with suppress(OSError):
            response += connection.recv(4096)
    assert response.startswith(b"HTTP/1.1 408 ")
    if rest:  # the parser's own page cannot be changed
        check_error(response.partition(b"\r\n\r\n")[2])


def test_service_port_has_no_internal_path(service: Running) -> None:
    """Through Ray Serve's proxy: also what the proxy could answer itself, and the application with the sums."""
    internal = ["/metrics", "/docs", "/openapi.json", "/v1/releases/current", "/v1/outcomes/metrics"]
    for path in internal:
        assert service.client.get(f"{service.internal_url}{path}").status_code == 200, path
        for shown in (path, f"/{path}", f"{path}/", f"/./{path}"):
            answer = service.client.get(service.url + shown)
            assert answer.status_code == 404, shown
            assert answer.json()["error"] == "Not Found", shown
    assert service.client.get("/healthz").json() == {"status": "ok", "authentication": "off"}


def test_openapi_schema_is_published(service: Running) -> None:
    parts = service.client.get(f"{service.internal_url}/openapi.json").json()["components"]["schemas"]
    jsonschema.validate(service.ask(), parts["RecommendResponse"] | {"components": {"schemas": parts}})


def test_concurrent_requests_get_full_slates(service: Running) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda viewer: service.ask(viewer=viewer), range(80)))
    assert [answer["viewer_id"] for answer in answers] == list(range(80))
    assert sum(len(answer["videos"]) == 10 for answer in answers) == 80
    assert len({answer["request_id"] for answer in answers}) == 80


def test_metrics_cover_every_process(service: Running) -> None:
    service.ask()
    label = service.release[:12]
    for stage in ("ingress", "retrieval", "ranking", "reranking"):
        assert service.metric(f"reelway_{stage}_latency_seconds_count", release=label) > 0
    assert service.metric("reelway_retrieval_candidates_total", release=label, source="ann") > 0
    assert service.metric("reelway_retrieval_filtered_total", release=label, kind="seen") > 0
    assert service.metric("reelway_ingress_requests_total", arm="stable", outcome="ok") > 0
    text = service.client.get(f"{service.internal_url}/metrics").text
    assert str(KNOWN_VIEWER) not in re.findall(r'="([^"]*)"', text)


def test_served_features_are_logged_for_the_parity_replay(service: Running) -> None:
    answer = service.ask(count=5, device="tv")
    deadline = time.monotonic() + 10
    while True:
        logged = {
            vector.request_id: vector
            for vector in VectorReader(service.run / "serving" / "vectors.jsonl", {}).vectors()
        }
        if answer["request_id"] in logged or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    vector = logged[answer["request_id"]]
    assert list(vector.viewer["history_videos"]) == service.watched
    assert [video["video_id"] for video in vector.videos] == [video["video_id"] for video in answer["videos"]]
    assert (vector.device, vector.release) == ("tv", service.release)


def test_recommend_command_prints_a_slate(service: Running) -> None:
    command = reelway_command("recommend", "--run", str(service.run), "--viewer", str(KNOWN_VIEWER), "--count")
    readable = subprocess.run([*command, "50"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"viewer {KNOWN_VIEWER}" in readable
    assert "because you watched" in " ".join(readable.split())
    raw = subprocess.run([*command, "3", "--json"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert len(RecommendResponse.model_validate_json(raw).videos) == 3


def test_killed_replicas_fail_no_request(service: Running) -> None:
    service.wait_until_whole()
    degradations = {"Ranking": "no_ranker", "Retrieval": "no_retrieval", "Reranking": "no_reranker"}
    before = {
        degradation: service.metric("reelway_ingress_degraded_total", rung=degradation)
        for degradation in degradations.values()
    }
    stop = threading.Event()
    answers: list[dict[str, Any]] = []

    def send_requests() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as client:
            while not stop.is_set():
                reply = client.post("/v1/recommend", json={"viewer_id": KNOWN_VIEWER, "count": 10})
                answers.append(reply.json() | {"status": reply.status_code})

    def wait_for(degradation: str) -> None:
        deadline = time.monotonic() + 30
        while not any(degradation in answer.get("degraded", ()) for answer in list(answers)):
            assert time.monotonic() < deadline, f"no response has the degradation {degradation}"
            time.sleep(0.02)

    with ThreadPoolExecutor(2) as threads:
        clients = [threads.submit(send_requests) for _ in range(2)]
        try:
            for deployment, degradation in degradations.items():
                service.replica_of(deployment).kill()
                wait_for(degradation)
            service.wait_until_whole()
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert Counter(answer["status"] for answer in answers) == {200: len(answers)}
    assert {len(answer["videos"]) for answer in answers} == {10}
    fallbacks = Counter(step for answer in answers for step in answer["degraded"])
    for degradation in degradations.values():
        assert (
            service.metric("reelway_ingress_degraded_total", rung=degradation)
            >= before[degradation] + fallbacks[degradation]
        )


def test_router_logs_a_failed_stage_to_its_file(service: Running) -> None:
    """The file is the error stream of the replica's process, named in the runbook."""
    log = Path(f"/proc/{service.replica_of('Router').pid}/fd/2").resolve()
    assert (log.parent.name, log.name.split("-")[0], log.suffix) == ("logs", "worker", ".err")
    failed = [line for line in log.read_text().splitlines() if "stage failed, fallback used: stage=ranking" in line]
    assert failed
    assert all(re.match(r"\S+ \S+ WARNING reelway\.serving\.stage_runner: stage failed", line) for line in failed)


def test_logs_of_all_processes_show_no_viewer_id(service: Running) -> None:
    """The viewer's memory is damaged, so that every router writes about the viewer."""
    viewer = 7_777_777_777_777_777
    memory = SqliteViewerMemory(service.run / "features" / MEMORY_FILE)
    with memory._written.writing() as db:
        damaged = [viewer, generation_at(time.time()), bytes(FILTER_BYTES + 1)]
        db.execute("INSERT INTO watched VALUES (?, ?, ?)", damaged)
    memory.close()
    assert service.ask(viewer=viewer)["videos"]
    router = Path(f"/proc/{service.replica_of('Router').pid}/fd/2").resolve()
    use_secret_of_run(service.run / "keys")
    deadline = time.monotonic() + 10
    while viewer_pseudonym(viewer) not in router.read_text():
        assert time.monotonic() < deadline, router.read_text()[-2_000:]
        time.sleep(0.1)
    logs = [path for path in router.parent.rglob("*") if path.is_file()]
    logs += [path for path in service.run.rglob("*.log") if path.is_file()]
    assert len(logs) > 5
    assert [path for path in logs if str(viewer).encode() in path.read_bytes()] == []


def test_release_change_under_load_fails_no_request(
    service: Running, backend: ServeRestBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    service.wait_until_whole()
    stable, other = service.release, service.other
    pids = {name: service.replica_of(name).pid for name in ("Router", "Outcomes", "Retrieval", "Ranking", "Reranking")}
    faults = _faults(service)

    def routing(canary_bp: int, *, warm: bool = True) -> Routing:
        arms = [ArmRoute(arm=Arm.CANARY, release=other, weight_bp=canary_bp)] if canary_bp else []
        arms.append(ArmRoute(arm=Arm.STABLE, release=stable, weight_bp=10_000 - canary_bp))
        return Routing(salt="under load", rollout="r1", arms=tuple(arms), warm=(stable, other) if warm else ())

    def ready() -> bool:
        return {stable, other} <= backend.observe().ready

    with request_load(service.url) as answers:
        backend.observe()
        backend.apply(TrafficTarget(routing(0), (stable, other)))
        wait_for(ready, "the release did not become ready", READY_S)
        moves: dict[str, tuple[int, float]] = {}
        for name, weight in (("weight given", 5000), ("weight taken", 0)):
            moves[name] = (weight, time.time())
            backend.apply(TrafficTarget(routing(weight), (stable, other)))
            wait_for_requests(answers, 40)
        backend.apply(TrafficTarget(routing(0, warm=False), (stable,)))
        wait_for(lambda: backend.observe().releases == (stable,), "the release was not removed", 60)
        wait_for(
            lambda: not service.processes("ray::ServeReplica", other[:12]),
            "the replicas of the release were not removed",
            60,
        )
        wait_for_requests(answers, 20)

    assert Counter(answer.status for answer in answers) == {200: len(answers)}
    assert _faults(service) == faults
    assert {name: service.replica_of(name).pid for name in pids} == pids
    for name, (weight, moved_s) in moves.items():
        end = min((one_at for _, one_at in moves.values() if one_at > moved_s), default=answers[-1].sent)
        expected = routing(weight)
        after = [one for one in answers if moved_s < one.sent < end and one.moves]
        right = [one for one in after if one.release == expected.route_of(one.viewer).release]
        wrong = [one for one in after if one.release != expected.route_of(one.viewer).release]
        first_s = right[0].done - moved_s
        last_s = max((one.sent - moved_s for one in wrong), default=0.0)
        with capsys.disabled():
            print(f"\n{name}: first request on the new routing after {first_s:.3f} s, last on the old {last_s:.3f} s")
        assert last_s < 1.0


def test_rollout_counts_exposures_outcomes_and_mirroring(
    service: Running,
    backend: ServeRestBackend,
) -> None:
    stable, other = service.release, service.other
    arms = (
        ArmRoute(arm=Arm.CANARY, release=other, weight_bp=4000),
        ArmRoute(arm=Arm.STABLE, release=stable, weight_bp=5000),
        ArmRoute(arm=Arm.HOLDOUT, release=stable, weight_bp=1000),
    )
    routing = Routing(
        salt="counted", rollout="r2", arms=arms, shadow=ShadowRoute(release=other, weight_bp=10_000), warm=(other,)
    )
    backend.observe()
    backend.apply(TrafficTarget(routing, (stable, other)))
    wait_for(lambda: backend.observe().ready >= {stable, other}, "the release did not become ready", READY_S)
    wait_for(lambda: backend.observe().routing == routing, "the routing did not take effect", READY_S)
    answers = [service.ask(viewer=viewer, count=3) for viewer in range(30)]
    for answer in answers:
        route = routing.route_of(answer["viewer_id"])
        assert (answer["release"], answer["arm"], answer["degraded"]) == (route.release, route.arm, [])
    token = service.signer.read(answers[0]["videos"][0]["token"])
    assert token.rollout == "r2"
    assert token.weight == pytest.approx({Arm.CANARY: 5 / 9, Arm.STABLE: 4 / 9, Arm.HOLDOUT: 1.0}[token.arm])
    assert token.duration_ms > 0
    assert token.creator_id == answers[0]["videos"][0]["creator_id"]
    outcomes = [
        {"token": video["token"], "type": "watch", "value": 5000} for answer in answers for video in answer["videos"]
    ]
    report = service.client.post("/v1/outcomes", json={"outcomes": outcomes})
    assert report.status_code == 200, report.text
    assert report.json() == {"accepted": 90, "refused": []}

    def total(name: str, **labels: str) -> float:
        return service.metric(name, path="/v1/outcomes/metrics", rollout="r2", slice="overall", **labels)

    shown = Counter(answer["arm"] for answer in answers)
    for arm in ("canary", "stable", "holdout"):
        expected = 3 * shown[arm]
        wait_for(
            lambda arm=arm, expected=expected: (
                total(metric_names.EXPOSURE, statistic="impressions", arm=arm) == expected
            ),  # type: ignore[misc]
            f"the impressions of {arm} are not counted",
            20,
        )
        assert total(metric_names.EXPOSURE, statistic="viewers", arm=arm) == shown[arm]
    watched = {"metric": "watch_s_per_impression", "statistic": "sum_y", "arm": "canary"}
    wait_for(lambda: total(metric_names.STATISTIC, **watched) > 0, "the outcomes are not counted", 20)
    assert total(metric_names.STATISTIC, **watched) == pytest.approx(5 * 3 * shown["canary"] * 5 / 9, rel=1e-5)
    label = other[:12]
    wait_for(
        lambda: service.metric(metric_names.SHADOW_REQUESTS, release=label, outcome="compared") > 0,
        "no mirrored request was compared",
        20,
    )
    assert service.metric(metric_names.SHADOW_OVERLAP + "_count", release=label) > 0
    assert service.metric(metric_names.LATENCY + "_count", release=label, arm="shadow") > 0
    assert service.metric(metric_names.SHADOW_REQUESTS, release=label, outcome="failed") == 0
    backend.apply(TrafficTarget(Routing.single_release(stable), (stable,)))


def test_unavailable_release_affects_no_other_release(service: Running, backend: ServeRestBackend) -> None:
    stable, nowhere = service.release, "0" * 64
    arms = (
        ArmRoute(arm=Arm.CANARY, release=nowhere, weight_bp=9000),
        ArmRoute(arm=Arm.STABLE, release=stable, weight_bp=1000),
    )
    backend.observe()
    backend.apply(TrafficTarget(Routing(salt="nowhere", rollout="r3", arms=arms), (stable, nowhere)))
    wait_for(lambda: nowhere in backend.observe().failed, "the release was not reported as failed", 60)
    assert "is not in" in backend.observe().failed[nowhere]
    assert {service.ask(viewer=viewer)["release"] for viewer in range(10)} == {stable}
    backend.apply(TrafficTarget(Routing.single_release(stable), (stable,)))
    wait_for(lambda: backend.observe().releases == (stable,), "the release was not removed", 60)
    service.wait_until_whole()


@dataclass(frozen=True, slots=True)
class SentRequest:
    """One request of the load. ``moves``: whether the viewer belongs to a canary of half of the viewers."""

    viewer: int
    sent: float
    done: float
    status: int
    release: str
    degraded: bool

    @property
    def moves(self) -> bool:
        return bucket_of(self.viewer, "under load") < 5000


@contextmanager
def request_load(url: str) -> Iterator[list[SentRequest]]:
    """Runs three clients that send requests without a pause, viewer after viewer."""
    stop, answers, viewers = threading.Event(), list[SentRequest](), itertools.count()

    def send_requests() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not stop.is_set():
                viewer, sent = next(viewers), time.time()
                reply = client.post("/v1/recommend", json={"viewer_id": viewer, "count": 5})
                body = reply.json()
                degraded = bool(body.get("degraded"))
                answers.append(
                    SentRequest(viewer, sent, time.time(), reply.status_code, body.get("release", ""), degraded)
                )

    with ThreadPoolExecutor(3) as threads:
        clients = [threads.submit(send_requests) for _ in range(3)]
        try:
            yield answers
        finally:
            stop.set()
        for client in clients:
            client.result()


def wait_for_requests(answers: list[SentRequest], requests: int) -> None:
    """Waits until ``requests`` further requests were sent, counted from half a second from now."""
    since = time.time() + 0.5
    wait_for(
        lambda: sum(request.sent > since for request in list(answers)) > requests, "the clients send no requests", 60
    )


def wait_for(condition: Callable[[], bool], otherwise: str, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def test_z_interrupt_stops_the_service_and_its_processes(service: Running) -> None:
    started = psutil.Process(service.process.pid).children(recursive=True)
    assert len(started) > 5
    assert service.processes("rollout", "controller")
    service.process.send_signal(signal.SIGINT)
    service.process.wait(DOWN_S)
    _, alive = psutil.wait_procs(started, timeout=15)
    assert [process.cmdline() for process in alive] == []
    assert not (service.run / "serving.json").exists()


def _faults(service: Running) -> float:
    """Failed stage calls without timeouts, which may be due to a busy machine."""
    return sum(service.metric("reelway_ingress_faults_total", kind=kind) for kind in ("error", "unexpected"))
