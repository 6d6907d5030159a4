"""`reelway serve` and `reelway recommend`: rejected arguments and error messages."""

from __future__ import annotations

import fcntl
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.support.release_files import NOW_S, make_release_folder

from reelway.platform.cli.processes import reelway_command
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore
from reelway.platform.rollout.policy import default_policy
from reelway.platform.rollout.state import Phase, RolloutState


def make_run(path: Path, key: Ed25519PrivateKey | None = None) -> str:
    """Creates a run directory with one release in its store, signed by the run's key or by another key."""
    pair = create_keys(path / "keys")
    manifest = make_release_folder(path / "made", key=key or load_private_key(pair.private))
    return ReleaseStore(str(path / "releases")).write(path / "made", manifest)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    make_run(path)
    return path


def reelway(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command and joins its error output into one line."""
    done = subprocess.run(reelway_command(*arguments), capture_output=True, text=True, timeout=90, check=False)
    done.stderr = " ".join(done.stderr.split())
    return done


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_port_in_use_is_rejected_with_a_fix(run: Path, taken_port: int) -> None:
    done = reelway("serve", "--run", str(run), "--port", str(taken_port))
    assert done.returncode == 2
    assert f"port {taken_port}" in done.stderr
    assert "--port 0" in done.stderr


def test_run_being_served_is_rejected(run: Path) -> None:
    (run / "serving").mkdir(exist_ok=True)
    with (run / "serving" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = reelway("serve", "--run", str(run), "--port", "0")
    assert done.returncode == 2
    assert "served already" in done.stderr


def test_sustained_limit_above_the_burst_limit_is_rejected(run: Path) -> None:
    done = reelway(
        "serve", "--run", str(run), "--port", "0", "--max-ongoing-requests", "8", "--max-ongoing-sustained", "9"
    )
    assert done.returncode == 2
    assert "--max-ongoing-sustained 9: larger than --max-ongoing-requests 8" in done.stderr


def test_folder_without_a_run_is_rejected(tmp_path: Path) -> None:
    done = reelway("serve", "--run", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "not a run directory" in done.stderr


def test_unknown_composition_is_rejected_with_the_choices(run: Path) -> None:
    done = reelway("serve", "--run", str(run), "--composition", "both")
    assert done.returncode == 2
    assert all(text in done.stderr for text in ("'both' is not one of", "'staged'", "'fused'"))


def test_release_signed_by_an_unknown_key_is_not_served(tmp_path: Path) -> None:
    make_run(tmp_path, key=Ed25519PrivateKey.generate())
    done = reelway("serve", "--run", str(tmp_path), "--port", "0")
    assert done.returncode == 6
    assert "key" in done.stderr


def test_recommend_without_a_service_names_the_command(run: Path) -> None:
    done = reelway("recommend", "--run", str(run), "--viewer", "1")
    assert done.returncode == 2
    assert "reelway serve" in done.stderr


def test_unreachable_service_is_an_error_without_traceback() -> None:
    done = reelway("recommend", "--url", "http://127.0.0.1:9", "--viewer", "1")
    assert done.returncode == 8
    assert "Traceback" not in done.stderr


def test_live_release_is_that_of_the_last_rollout(run: Path, tmp_path: Path) -> None:
    def served(*arguments: str) -> str:
        """Returns the messages up to the check of the port, which is in use."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            done = reelway("serve", "--run", str(run_folder), "--port", str(taken.getsockname()[1]), *arguments)
        assert done.returncode == 2, done.stderr
        return done.stderr

    run_folder = tmp_path / "run"
    shutil.copytree(run, run_folder)
    key = load_private_key(run_folder / "keys" / "release.private.pem")
    manifest = make_release_folder(tmp_path / "newer", seed=1, key=key, now_s=NOW_S + 60)
    newer = ReleaseStore(str(run_folder / "releases")).write(tmp_path / "newer", manifest)
    (older,) = {one.release_id for one in ReleaseStore(str(run_folder / "releases")).list()} - {newer}
    assert f"release {newer[:12]} verified" in served()
    state = RolloutState(
        id="r1", stable_release=older, canary_release=newer, started_at=NOW_S, changed_at=NOW_S, tick_at=NOW_S,
        phase=Phase.ROLLED_BACK,
    )  # fmt: skip
    (run_folder / "rollout").mkdir()
    SqliteRolloutStore(run_folder / "rollout" / "state.db").create(state, default_policy())
    assert f"release {older[:12]} verified" in served()
    assert f"release {newer[:12]} verified" in served("--release", "latest")
