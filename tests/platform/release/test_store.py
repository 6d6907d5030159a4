"""The release store: complete or absent releases, and equal content after a fetch."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import MANIFEST_FILE, RELEASE_FILES, VIDEOS_FILE, Manifest
from reelway.platform.errors import ConfigError, DigestMismatchError, ReleaseNotFoundError, StorageError
from reelway.platform.release.signing import sign
from reelway.platform.release.store import ReleaseStore

KEY = Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "release"
    make_release_folder(path, videos=40, embedding=8, key=KEY)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST_FILE).read_text())


@pytest.fixture(params=["file", "path", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    match request.param:
        case "file":
            yield f"file://{tmp_path}/store"
        case "path":
            yield f"{tmp_path}/store"
        case _:
            MemoryFileSystem.store.clear()
            MemoryFileSystem.pseudo_dirs[:] = [""]
            yield "memory://releases"


def later(manifest: Manifest, day: int, **changes: Any) -> Manifest:
    return sign(manifest.model_copy(update={"created_at": datetime(2026, 1, day, tzinfo=UTC)} | changes), KEY)


def test_fetched_release_equals_the_written_one(url: str, folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    release_id = ReleaseStore(url).write(folder, manifest)
    assert release_id == manifest.release_id
    fetched = ReleaseStore(url).fetch(release_id, tmp_path / "cache")
    assert {path.name for path in fetched.iterdir()} == {*RELEASE_FILES, MANIFEST_FILE}
    for name in RELEASE_FILES:
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    assert Manifest.model_validate_json((fetched / MANIFEST_FILE).read_text()) == manifest
    assert pa.ipc.open_file(pa.memory_map(str(fetched / VIDEOS_FILE))).get_batch(0).num_rows == 40


def test_second_write_of_a_release_changes_nothing(tmp_path: Path, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(f"file://{tmp_path}/store")
    place = tmp_path / "store" / store.write(folder, manifest)
    before = place.stat().st_ino
    assert store.write(folder, manifest) == manifest.release_id
    assert place.stat().st_ino == before
    assert [path.name for path in (tmp_path / "store").iterdir()] == [manifest.release_id]


def test_second_write_restores_a_lost_file(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    release_id = store.write(folder, manifest)
    fs, root = fsspec.url_to_fs(url)
    fs.rm_file(f"{root}/{release_id}/{VIDEOS_FILE}")
    store.write(folder, manifest)
    assert fs.exists(f"{root}/{release_id}/{VIDEOS_FILE}")


def test_folder_that_differs_from_its_manifest_is_not_written(
    url: str, folder: Path, manifest: Manifest, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / VIDEOS_FILE).write_bytes(b"other videos")
    with pytest.raises(DigestMismatchError, match=r"videos\.arrow"):
        ReleaseStore(url).write(damaged, manifest)
    assert ReleaseStore(url).list() == []


def test_list_returns_summaries_newest_first(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    assert store.list() == []
    for day in (2, 3, 1):
        store.write(folder, later(manifest, day, name=f"day-{day}"))
    listed = store.list()
    assert [summary.name for summary in listed] == ["day-3", "day-2", "day-1"]
    assert listed[0].signed
    assert listed[0].gates_passed
    assert listed[0].size_bytes == sum(entry.size_bytes for entry in manifest.files.values())


def test_resolve_accepts_latest_or_a_unique_prefix(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    ids = [store.write(folder, later(manifest, day)) for day in (5, 7, 6)]
    assert store.resolve("latest") == ids[1]
    for release_id in ids:
        assert store.resolve(release_id[:12]) == release_id
        assert store.resolve(release_id) == release_id


def test_resolve_rejects_an_unknown_or_ambiguous_prefix(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    with pytest.raises(ReleaseNotFoundError, match="has no release; build one"):
        store.resolve("latest")
    ids = [store.write(folder, later(manifest, day)) for day in range(1, 18)]  # 17 ids, 16 first digits
    with pytest.raises(ReleaseNotFoundError, match="no release begins with 'zz'") as error:
        store.resolve("zz")
    assert any(release_id[:12] in str(error.value) for release_id in ids)
    shared = next(d for d in "0123456789abcdef" if sum(release_id.startswith(d) for release_id in ids) > 1)
    with pytest.raises(ReleaseNotFoundError, match=f"releases begin with '{shared}'"):
        store.resolve(shared)
    with pytest.raises(ReleaseNotFoundError):
        store.resolve("")


def test_removed_release_is_not_found(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    release_id = store.write(folder, manifest)
    store.remove(release_id)
    assert store.list() == []
    for act in (store.manifest, store.remove):
        with pytest.raises(ReleaseNotFoundError, match="is not in"):
            act(release_id)


def test_fetch_rejects_a_damaged_file(url: str, folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = ReleaseStore(url)
    release_id = store.write(folder, manifest)
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/{release_id}/{VIDEOS_FILE}", b"other videos")
    with pytest.raises(DigestMismatchError, match=r"videos\.arrow"):
        store.fetch(release_id, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{release_id}.lock"]


def test_changed_manifest_makes_latest_unknown(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    store.write(folder, later(manifest, 1))
    release_id = store.write(folder, later(manifest, 2))
    fs, root = fsspec.url_to_fs(url)
    fs.pipe_file(f"{root}/{release_id}/{MANIFEST_FILE}", later(manifest, 3).model_dump_json().encode())
    with pytest.raises(DigestMismatchError, match="it was changed"):
        store.manifest(release_id)
    assert len(store.list()) == 1
    with pytest.raises(DigestMismatchError, match="cannot determine the latest release"):
        store.resolve("latest")


def test_damaged_copy_in_the_cache_is_fetched_again(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = ReleaseStore(f"file://{tmp_path}/store")
    release_id = store.write(folder, manifest)
    fetched = store.fetch(release_id, tmp_path / "cache")
    kept = fetched.stat().st_ino
    assert store.fetch(release_id, tmp_path / "cache").stat().st_ino == kept
    (fetched / VIDEOS_FILE).write_bytes(b"rot")
    again = store.fetch(release_id, tmp_path / "cache")
    assert (again / VIDEOS_FILE).read_bytes() == (folder / VIDEOS_FILE).read_bytes()


def test_concurrent_fetches_all_return_the_complete_folder(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    store = ReleaseStore(f"file://{tmp_path}/store")
    release_id = store.write(folder, manifest)
    seen: list[int] = []

    def fetch() -> None:
        place = ReleaseStore(f"file://{tmp_path}/store").fetch(release_id, tmp_path / "cache")
        seen.append(len(list(place.iterdir())))

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [len(RELEASE_FILES) + 1] * 8


def test_invalid_url_raises_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        ReleaseStore("nosuch://releases")


class _SmallBucket(MemoryFileSystem):
    """An object store that accepts ``room`` files and then fails like a full disk."""

    protocol = "smallbucket"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012 - MemoryFileSystem keeps its content on the class
    pseudo_dirs = [""]  # noqa: RUF012
    room = 3

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if type(self).room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        type(self).room -= 1
        super().put_file(lpath, rpath, **options)


def test_failed_upload_is_deleted(folder: Path, manifest: Manifest) -> None:
    fsspec.register_implementation("smallbucket", _SmallBucket, clobber=True)
    store = ReleaseStore("smallbucket://releases")
    with pytest.raises(StorageError, match="No space left on device"):
        store.write(folder, manifest)
    assert store.list() == []
    assert not [path for path in _SmallBucket.store if manifest.release_id in path]


class _Interrupted(MemoryFileSystem):
    """An object store whose client is interrupted before it writes the manifest."""

    protocol = "interrupted"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    stopped = True

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if type(self).stopped:
            raise SystemExit(137)
        super().pipe_file(path, value, mode=mode, **options)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        if type(self).stopped:
            raise OSError("killed processes clean up nothing")
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


def test_write_completes_files_without_a_manifest(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    fsspec.register_implementation("interrupted", _Interrupted, clobber=True)
    store = ReleaseStore("interrupted://releases")
    with pytest.raises(SystemExit):
        store.write(folder, manifest)
    assert [path for path in _Interrupted.store if path.endswith(VIDEOS_FILE)], "the files themselves were uploaded"
    assert store.list() == []
    with pytest.raises(ReleaseNotFoundError):
        store.fetch(ReleaseId(manifest.release_id), tmp_path / "cache")
    _Interrupted.stopped = False
    assert store.write(folder, manifest) == manifest.release_id
    assert store.fetch(ReleaseId(manifest.release_id), tmp_path / "cache").is_dir()


def test_write_replaces_the_signature_of_another_key(url: str, folder: Path, manifest: Manifest) -> None:
    store = ReleaseStore(url)
    release_id = store.write(folder, manifest)
    resigned = sign(manifest, Ed25519PrivateKey.generate())
    assert store.write(folder, resigned) == release_id
    assert store.manifest(release_id).signature == resigned.signature
