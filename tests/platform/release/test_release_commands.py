"""The commands ``reelway release keys|list|show|verify``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.release_files import make_release_folder
from typer.testing import CliRunner, Result

from reelway.platform.cli.main import build_app
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.errors import DigestMismatchError, FeatureError, ReleaseNotFoundError, SignatureError
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.runs import RunDirectory

APP = build_app()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a key pair and two releases in its store."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "run")
    key = load_private_key(create_keys(run.keys).private)
    store = ReleaseStore(str(run.release_store))
    for seed, name in enumerate(("older", "newer")):
        folder = run.path / name
        manifest = make_release_folder(
            folder, videos=40, embedding=8, seed=seed, key=key, name=name, now_s=1.7e9 + seed
        )
        store.write(folder, manifest)
    return run.path


@pytest.fixture
def run(original: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(original, tmp_path / "run")))


def reelway(*arguments: object) -> Result:
    return CliRunner().invoke(APP, ["release", *(str(one) for one in arguments)])


def test_list_is_sorted_by_newest_first(run: RunDirectory) -> None:
    listed = reelway("list", "--run", run.path)
    assert listed.exit_code == 0
    assert listed.stdout.index("newer") < listed.stdout.index("older")
    releases = json.loads(reelway("list", "--run", run.path, "-o", "json").stdout)
    assert [release["name"] for release in releases] == ["newer", "older"]
    assert set(releases[0]) >= {"release_id", "created_at", "parent", "signed", "gates_passed", "size_bytes", "metrics"}


def test_show_accepts_the_beginning_of_an_id(run: RunDirectory) -> None:
    release_id = json.loads(reelway("list", "--run", run.path, "-o", "json").stdout)[1]["release_id"]
    shown = reelway("show", release_id[:10], "--run", run.path)
    assert shown.exit_code == 0
    for word in (release_id, "older", "recall_at_50", "videos.arrow", "holds"):
        assert word in shown.stdout
    manifest = json.loads(reelway("show", release_id[:10], "--run", run.path, "-o", "json").stdout)
    assert manifest["release_id"] == release_id
    assert manifest["dimensions"]["videos"] == 40


def test_unknown_release_error_lists_existing_releases(run: RunDirectory) -> None:
    ended = reelway("show", "zzz", "--run", run.path)
    assert isinstance(ended.exception, ReleaseNotFoundError)
    assert "(releases: " in str(ended.exception)


def test_verify_prints_a_table_of_checks(run: RunDirectory) -> None:
    verified = reelway("verify", "--run", run.path)
    assert verified.exit_code == 0, verified.exception
    assert "may take traffic" in verified.stdout
    for check in ("manifest", "signature", "gates", "files", "tables", "dimensions"):
        assert re.search(rf"│ {check} ", verified.stdout)
    assert "not checked: no feature store was given" in verified.stdout


def test_verify_accepts_a_folder_outside_a_store(run: RunDirectory, tmp_path: Path) -> None:
    shutil.move(run.keys / "release.public.pem", tmp_path / "trusted.pem")
    verified = reelway("verify", run.path / "older", "--run", run.path, "--public-keys", tmp_path / "trusted.pem")
    assert verified.exit_code == 0, verified.exception


def test_executable_rejects_a_damaged_release_with_exit_code_6(run: RunDirectory) -> None:
    release_id = ReleaseStore(str(run.release_store)).resolve("latest")
    with (run.release_store / release_id / VIDEOS_FILE).open("r+b") as handle:
        handle.truncate(1000)
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("reelway")), "release", "verify", "--run", str(run.path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 6
    assert re.search(r"error: .*videos\.arrow has 1000 bytes, the manifest says \d+", ended.stderr)
    assert "may take traffic" not in ended.stdout


def test_verify_rejects_a_release_by_an_untrusted_key(run: RunDirectory, tmp_path: Path) -> None:
    stranger = create_keys(tmp_path / "stranger").public
    ended = reelway("verify", "--run", run.path, "--public-keys", stranger)
    assert isinstance(ended.exception, SignatureError)


def test_verify_rejects_another_release_under_the_requested_id(run: RunDirectory) -> None:
    first, second = (summary.release_id for summary in ReleaseStore(str(run.release_store)).list())
    shutil.rmtree(run.release_store / first)
    shutil.copytree(run.release_store / second, run.release_store / first)
    ended = reelway("verify", first, "--run", run.path)
    assert isinstance(ended.exception, DigestMismatchError)


def test_verify_fails_on_a_missing_feature_store(run: RunDirectory, tmp_path: Path) -> None:
    ended = reelway("verify", "--run", run.path, "--features", tmp_path)
    assert isinstance(ended.exception, FeatureError)


def test_keys_command_does_not_overwrite_keys(tmp_path: Path) -> None:
    assert reelway("keys", "--folder", tmp_path / "keys").exit_code == 0
    assert (tmp_path / "keys" / "release.private.pem").exists()
    assert "never overwritten" in str(reelway("keys", "--folder", tmp_path / "keys").exception)
