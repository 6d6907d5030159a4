"""The life of `reelway rank-server`: what it refuses to load, when it is ready, how it ends."""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import grpc
import httpx
import pytest
from reelway.serving.open_inference.json_tensors import HEADER
from tests.serving.open_inference_asking import INFER, binary_request, post, rpc, rpc_request
from tests.serving.rank_server import MadeRelease, RankServer, make_release, options_of, running_rank_server

from reelway.platform.cli.processes import child, reelway_command
from reelway.platform.errors import DigestMismatchError, ReleaseNotFoundError, SignatureError
from reelway.platform.release.signing import create_keys
from reelway.serving.open_inference import messages
from reelway.serving.open_inference.server import load_verified


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRelease:
    return make_release(tmp_path_factory.mktemp("release"))


def test_it_is_live_before_it_is_ready_and_says_why_it_gives_no_answer(tmp_path: Path, made: MadeRelease) -> None:
    mine, log = spoiled(made, tmp_path, "nothing"), tmp_path / "server.log"
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / f".{made.release}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process does that fetches the release
        with child(command_of(mine, "--drain-seconds", "0"), log=log) as process:
            http_url, address = addresses_in(log, process)
            with httpx.Client(base_url=http_url, timeout=30) as client:
                here = RankServer(mine, 0, int(address.rpartition(":")[2]), client, process.terminate)
                assert client.get("/v2/health/live").status_code == 200
                assert messages.ServerLiveResponse.FromString(rpc(here, b"", "ServerLive")).live is True
                assert messages.ServerReadyResponse.FromString(rpc(here, b"", "ServerReady")).ready is False
                text, binary = binary_request(made.inputs(3))
                for answer in (
                    client.get("/v2/health/ready"), client.get("/v2/models/ranker/ready"),
                    client.get("/v2/models/ranker"), post(here, text, binary),
                ):  # fmt: skip
                    assert answer.status_code == 503
                    assert "being loaded" in answer.json()["error"]
                with pytest.raises(grpc.RpcError, match="being loaded"):
                    rpc(here, rpc_request(made.inputs(3)))
                assert here.metric("reelway_ranking_server_ready_ratio") == 0
                fcntl.flock(held, fcntl.LOCK_UN)
                deadline = time.monotonic() + 60
                while client.get("/v2/health/ready").status_code != 200:
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.05)
                assert post(here, text, binary).status_code == 200


def addresses_in(log: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Where a server that was just started listens: REST's URL, gRPC's address."""
    deadline = time.monotonic() + 170
    while not (found := re.search(r"REST at (\S+), gRPC at (\S+)\n", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[1], found[2]


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [("signature", SignatureError), ("digest", DigestMismatchError), ("absent", ReleaseNotFoundError)],
)
def test_a_release_that_is_not_what_was_signed_is_never_loaded(
    tmp_path: Path, made: MadeRelease, spoil: str, refusal: type[Exception]
) -> None:
    with pytest.raises(refusal):
        load_verified(options_of(spoiled(made, tmp_path, spoil)))


def spoiled(made: MadeRelease, place: Path, spoil: str) -> MadeRelease:
    """The release somewhere else, not as it was signed."""
    shutil.copytree(made.place / "releases", place / "releases")
    shutil.copytree(made.place / "keys", place / "keys")
    stored = place / "releases" / made.release
    if spoil == "signature":
        shutil.rmtree(place / "keys")
        create_keys(place / "keys")
    elif spoil == "nothing":
        pass
    elif spoil == "digest":
        graph = stored / "ranker.onnx"
        graph.chmod(0o644)
        graph.write_bytes(graph.read_bytes() + b"\0")
    else:
        shutil.rmtree(stored)
    return MadeRelease(place, made.release)


def command_of(made: MadeRelease, *words: str) -> list[str]:
    return reelway_command(
        "rank-server", "--release", made.release, "--release-store", str(made.place / "releases"),
        "--release-cache", str(made.place / "cache"), "--public-keys", str(made.place / "keys"),
        "--host", "127.0.0.1", "--http-port", "0", "--grpc-port", "0", *words,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_ends_with_the_reason_where_the_release_is_refused(tmp_path: Path, made: MadeRelease) -> None:
    mine = spoiled(made, tmp_path, "signature")
    done = subprocess.run(command_of(mine), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 6, done.stderr
    assert "sign" in done.stderr
    assert "ranking by release" not in done.stdout


def test_stopping_ends_readiness_first_then_what_is_under_way(made: MadeRelease) -> None:
    with running_rank_server(made, drain_s=2.0) as server:
        request = binary_request(made.inputs(500))
        server.stop()
        deadline = time.monotonic() + 20
        while server.client.get("/v2/health/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.get("/v2/models/ranker/ready").status_code == 503
        assert post(server, *request).status_code == 200
        assert messages.ServerReadyResponse.FromString(rpc(server, b"", "ServerReady")).ready is False


@pytest.mark.slow
def test_sigterm_ends_the_process_well_with_every_request_answered(made: MadeRelease) -> None:
    log = made.place / "server.log"
    with child(command_of(made, "--drain-seconds", "1"), log=log) as process:
        deadline = time.monotonic() + 170
        while "ranking by release" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        assert found, log.read_text()
        text, binary = binary_request(made.inputs(200))
        statuses = []
        with httpx.Client(base_url=found[0], timeout=30) as client:
            while process.poll() is None:
                if len(statuses) == 5:
                    process.send_signal(signal.SIGTERM)
                try:
                    answer = client.post(INFER, content=text + binary, headers={HEADER: str(len(text))})
                except httpx.ConnectError:  # it listens no longer
                    break
                statuses.append(answer.status_code)
        assert answer.headers["connection"] == "close"
        assert process.wait(timeout=60) == 0
    assert len(statuses) > 5
    assert set(statuses) == {200}
