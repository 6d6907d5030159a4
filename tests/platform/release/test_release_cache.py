"""The node's cache: releases in use stay, all others and partial downloads are removed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.errors import StorageError
from reelway.platform.release.cache import UNUSED_RETENTION_S, ReleaseCache
from reelway.platform.release.store import ReleaseStore

HOLDER = """
import sys, time
from pathlib import Path
from reelway.platform.release.cache import ReleaseCache
use = ReleaseCache(Path(sys.argv[1])).hold(sys.argv[2])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(str(tmp_path / "store"))


@pytest.fixture
def releases(store: ReleaseStore, tmp_path: Path) -> list[ReleaseId]:
    ids = []
    for seed in range(3):
        folder = tmp_path / f"made-{seed}"
        ids.append(store.write(folder, make_release_folder(folder, videos=20, seed=seed)))
    return ids


def later(cache: Path, seconds: float = UNUSED_RETENTION_S + 1) -> ReleaseCache:
    now = time.time() + seconds
    return ReleaseCache(cache, lambda: now)


def test_prune_keeps_what_a_process_of_the_node_uses(
    store: ReleaseStore, releases: list[ReleaseId], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for release in releases:
        store.fetch(release, cache)
    routed, warm, old = releases
    here = ReleaseCache(cache).hold(routed)
    with subprocess.Popen([sys.executable, "-c", HOLDER, cache, warm], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            assert later(cache).prune() == [old]
            assert {path.name for path in cache.iterdir() if path.is_dir()} == {routed, warm}
        finally:
            other.kill()
    assert later(cache).prune() == [warm]  # a killed process uses nothing
    here.close()
    assert later(cache).prune() == [routed]
    assert store.fetch(old, cache).is_dir()


def test_prune_keeps_a_release_for_an_hour_after_its_use(
    store: ReleaseStore, releases: list[ReleaseId], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    folder = store.fetch(releases[0], cache)
    os.utime(folder, (1.0, 1.0))  # fetched long ago, and used until now
    ReleaseCache(cache).hold(releases[0]).close()
    assert ReleaseCache(cache).prune() == []
    assert later(cache).prune() == [releases[0]]


def test_partial_download_is_removed_unless_in_progress(
    store: ReleaseStore, releases: list[ReleaseId], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    killed = "import os; os.kill(os.getpid(), 9)"
    script = (
        "import sys, pathlib, reelway.platform.release.store as s\n"
        f"def check_file_entries(*_): {killed}\n"
        "s.check_file_entries = check_file_entries\n"
        "s.ReleaseStore(sys.argv[1]).fetch(sys.argv[2], pathlib.Path(sys.argv[3]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, store.url, releases[0], cache], check=False)
    assert done.returncode == -9
    (left,) = [path for path in cache.iterdir() if path.is_dir()]
    assert left.name.startswith(f".{releases[0]}.")
    assert ReleaseCache(cache).prune() == [left.name]
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(StorageError, match="cannot write to the release cache"):
        ReleaseCache(tmp_path / "cache").hold(ReleaseId("a" * 64))
    assert ReleaseCache(tmp_path / "cache").prune() == []
