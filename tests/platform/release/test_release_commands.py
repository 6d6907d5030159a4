"""``reelway release keys|list|show|verify|fetch`` on a run directory with two releases."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.release_files import make_release_folder
from typer.testing import CliRunner, Result

from reelway.platform.cli.main import build_app
from reelway.platform.contracts.manifest import VIDEOS_FILE
from reelway.platform.errors import ConfigError, DigestMismatchError, FeatureError, ReleaseNotFoundError, SignatureError
from reelway.platform.release.signing import create_keys, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.run_directory import RunDirectory

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


def test_list_shows_the_newest_release_first_in_both_formats(run: RunDirectory) -> None:
    listed = reelway("list", "--run", run.path)
    assert listed.exit_code == 0
    assert listed.stdout.index("newer") < listed.stdout.index("older")
    releases = json.loads(reelway("list", "--run", run.path, "-o", "json").stdout)
    assert [release["name"] for release in releases] == ["newer", "older"]
    assert set(releases[0]) >= {"release_id", "created_at", "parent", "signed", "gates_passed", "size_bytes", "metrics"}


def test_show_accepts_a_unique_prefix_of_an_id(run: RunDirectory) -> None:
    release_id = json.loads(reelway("list", "--run", run.path, "-o", "json").stdout)[1]["release_id"]
    shown = reelway("show", release_id[:10], "--run", run.path)
    assert shown.exit_code == 0
    for word in (release_id, "older", "recall_at_50", "videos.arrow", "holds"):
        assert word in shown.stdout
    manifest = json.loads(reelway("show", release_id[:10], "--run", run.path, "-o", "json").stdout)
    assert manifest["release_id"] == release_id
    assert manifest["dimensions"]["videos"] == 40


def test_show_names_the_existing_releases_if_none_matches(run: RunDirectory) -> None:
    ended = reelway("show", "zzz", "--run", run.path)
    assert isinstance(ended.exception, ReleaseNotFoundError)
    assert "(releases: " in str(ended.exception)


def test_verify_prints_a_table_of_passed_checks(run: RunDirectory) -> None:
    verified = reelway("verify", "--run", run.path)
    assert verified.exit_code == 0, verified.exception
    assert "may take traffic" in verified.stdout
    for check in ("manifest", "signature", "gates", "files", "tables", "dimensions"):
        assert re.search(rf"│ {check} ", verified.stdout)
    assert "not checked: no feature store was given" in verified.stdout


def test_verify_accepts_a_release_folder_outside_any_store(run: RunDirectory, tmp_path: Path) -> None:
    shutil.move(run.keys / "release.public.pem", tmp_path / "trusted.pem")
    verified = reelway("verify", run.path / "older", "--run", run.path, "--public-keys", tmp_path / "trusted.pem")
    assert verified.exit_code == 0, verified.exception


def test_verify_exits_with_6_for_a_damaged_release(run: RunDirectory) -> None:
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


def test_verify_rejects_a_signature_by_an_untrusted_key(run: RunDirectory, tmp_path: Path) -> None:
    stranger = create_keys(tmp_path / "stranger").public
    ended = reelway("verify", "--run", run.path, "--public-keys", stranger)
    assert isinstance(ended.exception, SignatureError)


def test_verify_rejects_a_release_stored_under_another_id(run: RunDirectory) -> None:
    first, second = (summary.release_id for summary in ReleaseStore(str(run.release_store)).list())
    shutil.rmtree(run.release_store / first)
    shutil.copytree(run.release_store / second, run.release_store / first)
    ended = reelway("verify", first, "--run", run.path)
    assert isinstance(ended.exception, DigestMismatchError)


def test_verify_fails_if_the_given_feature_store_does_not_exist(run: RunDirectory, tmp_path: Path) -> None:
    ended = reelway("verify", "--run", run.path, "--features", tmp_path)
    assert isinstance(ended.exception, FeatureError)


def fetch(run: RunDirectory, to: Path, release: str = "latest", *options: object) -> Result:
    return reelway("fetch", release, "--release-store", run.release_store, "--to", to, *options)


def test_fetch_prints_the_folder_of_a_verified_release(run: RunDirectory, tmp_path: Path) -> None:
    release_id = ReleaseStore(str(run.release_store)).resolve("latest")
    fetched = fetch(run, tmp_path / "to", release_id[:12], "--verify", "--public-keys", run.keys)
    assert fetched.exit_code == 0, fetched.exception
    assert fetched.stdout == f"{tmp_path / 'to' / release_id}\n"
    assert "verified: " in fetched.stderr
    for stored in (run.release_store / release_id).iterdir():
        assert (tmp_path / "to" / release_id / stored.name).read_bytes() == stored.read_bytes()


def test_fetch_rejects_a_signature_by_an_untrusted_key(run: RunDirectory, tmp_path: Path) -> None:
    stranger = create_keys(tmp_path / "stranger").public
    ended = fetch(run, tmp_path / "to", "latest", "--verify", "--public-keys", stranger)
    assert isinstance(ended.exception, SignatureError)
    assert ended.stdout == ""


def test_fetch_exits_with_6_for_a_changed_file(run: RunDirectory, tmp_path: Path) -> None:
    release_id = ReleaseStore(str(run.release_store)).resolve("latest")
    with (run.release_store / release_id / VIDEOS_FILE).open("r+b") as handle:
        handle.truncate(1000)
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("reelway")), "release", "fetch", release_id,
         "--release-store", str(run.release_store), "--to", str(tmp_path), "--verify", "--public-keys", str(run.keys)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 6
    assert re.search(r"error: .*videos\.arrow has 1000 bytes, the manifest says \d+", ended.stderr)
    assert ended.stdout == ""
    assert not (tmp_path / release_id).exists()


@pytest.mark.parametrize("options", [("--verify",), ("--public-keys", "keys")])
def test_fetch_takes_verify_only_together_with_public_keys(
    run: RunDirectory, tmp_path: Path, options: tuple[str, ...]
) -> None:
    ended = fetch(run, tmp_path / "to", "latest", *options)
    assert isinstance(ended.exception, ConfigError)
    assert not (tmp_path / "to").exists()


def test_keys_never_overwrites_a_private_key(tmp_path: Path) -> None:
    assert reelway("keys", "--folder", tmp_path / "keys").exit_code == 0
    assert (tmp_path / "keys" / "release.private.pem").exists()
    assert "never overwritten" in str(reelway("keys", "--folder", tmp_path / "keys").exception)
