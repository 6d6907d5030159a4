"""The life cycle of ``reelway rank-server``: start, readiness, draining, exit."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from tests.support.process_life import SIGNALS, marked_command, printed
from tests.support.serving.open_inference_requests import HEADER, INFER, binary_request, messages, post, rpc
from tests.support.serving.rank_server import (
    ReleaseFixture,
    make_release,
    rank_server_command,
    running_rank_server,
    wait_until_listening,
)

from reelway.platform.cli.processes import child_process


@pytest.fixture(scope="module")
def release_fixture(tmp_path_factory: pytest.TempPathFactory) -> ReleaseFixture:
    return make_release(tmp_path_factory.mktemp("release"))


@pytest.mark.slow
def test_server_of_a_changed_release_exits_with_6(release_fixture: ReleaseFixture, tmp_path: Path) -> None:
    for file in release_fixture.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with (tmp_path / "ranker.onnx").open("ab") as handle:
        handle.write(b"\0")
    ended = subprocess.run(rank_server_command(tmp_path), capture_output=True, text=True, timeout=150, check=False)
    assert ended.returncode == 6, ended.stderr
    assert "ranker.onnx has SHA-256" in ended.stderr
    assert "ranking with release" not in ended.stdout


@pytest.mark.slow
def test_server_exits_with_8_if_its_port_is_in_use(release_fixture: ReleaseFixture, tmp_path: Path) -> None:
    with running_rank_server(release_fixture, tmp_path / "server.log") as server:
        for option, port in (("--http-port", server.http_port), ("--grpc-port", server.grpc_port)):
            command = rank_server_command(release_fixture.folder, option, str(port))
            ended = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
            assert ended.returncode == 8, ended.stderr
            assert f"cannot listen at 127.0.0.1:{port}" in ended.stderr


@pytest.mark.slow
def test_draining_server_answers_but_is_not_ready(release_fixture: ReleaseFixture, tmp_path: Path) -> None:
    with running_rank_server(release_fixture, tmp_path / "server.log", "--drain-seconds", "4") as server:
        request = binary_request(release_fixture.inputs(500))
        assert server.client.get("/v2/health/ready").status_code == 200
        assert messages.ServerReadyResponse.FromString(rpc(server, b"", "ServerReady")).ready is True
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while server.client.get("/v2/health/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/v2/models/ranker/ready").status_code == 503
        assert messages.ServerReadyResponse.FromString(rpc(server, b"", "ServerReady")).ready is False
        assert server.metric("reelway_ranking_server_ready_ratio") == 0
        answer = post(server, *request)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        assert server.process.wait(timeout=60) == 0


@pytest.mark.slow
def test_sigterm_ends_the_process_with_every_request_answered(release_fixture: ReleaseFixture, tmp_path: Path) -> None:
    """Four clients send requests until the port is closed. No request may fail on the way."""
    log = tmp_path / "server.log"
    text, binary = binary_request(release_fixture.inputs(200))
    statuses: list[int] = []
    failures: list[Exception] = []

    def send_until_closed(http_port: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{http_port}", timeout=30) as client:
            while True:
                try:
                    answer = client.post(INFER, content=text + binary, headers={HEADER: str(len(text))})
                except httpx.ConnectError:
                    return
                except Exception as error:
                    failures.append(error)
                    return
                statuses.append(answer.status_code)

    with child_process(rank_server_command(release_fixture.folder, "--drain-seconds", "1"), log=log) as process:
        http_port, _ = wait_until_listening(log, process)
        clients = [threading.Thread(target=send_until_closed, args=(http_port,)) for _ in range(4)]
        for client in clients:
            client.start()
        deadline = time.monotonic() + 60
        while len(statuses) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(60)
        assert process.wait(timeout=60) == 0
    assert failures == []
    assert len(statuses) > 20
    assert set(statuses) == {200}


@pytest.mark.slow
def test_overloaded_server_rejects_requests_with_429(release_fixture: ReleaseFixture, tmp_path: Path) -> None:
    """Requests beyond the queue are rejected at once, and the rejected clients get no 5xx."""
    options = ("--max-queued-requests", "0", "--threads", "1")
    with running_rank_server(release_fixture, tmp_path / "server.log", *options) as server:
        text, binary = binary_request(release_fixture.inputs(4000))
        statuses: list[int] = []

        def send() -> None:
            with httpx.Client(base_url=str(server.client.base_url), timeout=60) as client:
                for _ in range(10):
                    answer = client.post(INFER, content=text + binary, headers={HEADER: str(len(text))})
                    statuses.append(answer.status_code)

        clients = [threading.Thread(target=send) for _ in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(120)
        assert set(statuses) == {200, 429}
        assert server.metric("reelway_ranking_server_requests_total", outcome="busy") == statuses.count(429)
        assert server.metric("reelway_ranking_server_under_way_requests") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group"), SIGNALS)
def test_rank_server_ends_in_time_without_leftovers(
    release_fixture: ReleaseFixture, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    command = rank_server_command(release_fixture.folder)
    with marked_command(command, tmp_path / "log", printed("ranking with release")) as server:
        assert len(server.ports()) == 2
        ending = server.stop(number, group=group)
        assert ending.clean, (ending, server.log.read_text())
        assert ending.code == 0
