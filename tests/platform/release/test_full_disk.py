"""A disk that is full while a release is written: a clear error, and no partial release."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.manifest import MANIFEST_FILE, Manifest
from reelway.platform.errors import StorageError
from reelway.platform.release.store import ReleaseStore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "release"
    make_release_folder(path, videos=40, embedding=16)  # its viewer tower has 2 MB
    return path


@pytest.fixture
def one_megabyte(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; the file-size limit below covers the same path")
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let a test mount a file system: {mounted.stderr.strip()}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def read_back(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST_FILE).read_text())


def test_full_disk_during_a_write_leaves_no_release_visible(one_megabyte: Path, folder: Path) -> None:
    store = ReleaseStore(f"file://{one_megabyte}/releases")
    with pytest.raises(StorageError, match="No space left on device; it is unchanged"):
        store.write(folder, read_back(folder))
    assert store.list() == []
    assert list((one_megabyte / "releases").iterdir()) == []


def test_full_disk_during_a_fetch_leaves_the_cache_empty(one_megabyte: Path, folder: Path, tmp_path: Path) -> None:
    store = ReleaseStore(f"file://{tmp_path}/store")
    release_id = store.write(folder, read_back(folder))
    with pytest.raises(StorageError, match="No space left on device"):
        store.fetch(release_id, one_megabyte / "cache")
    assert [path.name for path in (one_megabyte / "cache").iterdir()] == [f".{release_id}.lock"]


def test_disk_without_space_for_a_folder_raises_a_storage_error(one_megabyte: Path, folder: Path) -> None:
    (one_megabyte / "ballast").write_bytes(bytes(1 << 20))
    with pytest.raises(StorageError, match="No space left"):
        ReleaseStore(f"file://{one_megabyte}/releases").write(folder, read_back(folder))


WRITE_WITH_LIMIT = """
import sys
from pathlib import Path
from reelway.platform.errors import StorageError
from reelway.platform.release.folder import read_manifest
from reelway.platform.release.store import ReleaseStore

folder, store = Path(sys.argv[1]), ReleaseStore(sys.argv[2])
try:
    store.write(folder, read_manifest(folder))
except StorageError as error:
    sys.exit(str(error))
"""


def test_file_size_limit_raises_a_storage_error(tmp_path: Path, folder: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails with EFBIG, as other writes do
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    url = f"file://{tmp_path}/releases"
    ended = subprocess.run(
        [sys.executable, "-c", WRITE_WITH_LIMIT, str(folder), url],
        preexec_fn=limit, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "File too large; it is unchanged" in ended.stderr
    assert ReleaseStore(url).list() == []
    assert list((tmp_path / "releases").iterdir()) == []
