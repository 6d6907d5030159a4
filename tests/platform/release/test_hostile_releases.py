"""Manifests and files that an attacker writes into the release store are rejected without harm."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fsspec.implementations.memory import MemoryFileSystem
from tests.support.release_files import make_release_folder

from reelway.platform.contracts.ids import ReleaseId
from reelway.platform.contracts.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    RANKER_FILE,
    RELEASE_FILES,
    VIDEOS_FILE,
    Manifest,
)
from reelway.platform.errors import DigestMismatchError, ReleaseError, SignatureError
from reelway.platform.release.folder import manifest_bytes, parse_manifest, read_manifest
from reelway.platform.release.store import ReleaseStore
from reelway.platform.release.verify import verify

KEY = Ed25519PrivateKey.generate()
OTHER_ID = ReleaseId("e" * 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("made") / "release"
    return folder, make_release_folder(folder, videos=64, key=KEY)


@pytest.fixture
def stored(made: tuple[Path, Manifest], tmp_path: Path) -> tuple[ReleaseStore, ReleaseId, Path]:
    """A store with a release, its id, and its folder."""
    store = ReleaseStore(str(tmp_path / "store"))
    release = store.write(*made)
    return store, release, tmp_path / "store" / release


def changed(made: tuple[Path, Manifest], change: Callable[[dict[str, Any]], object]) -> bytes:
    body = json.loads(manifest_bytes(made[1]))
    change(body)
    return json.dumps(body).encode()


def replaced(made: tuple[Path, Manifest], before: str, after: str) -> bytes:
    text = manifest_bytes(made[1]).decode()
    assert before in text
    return text.replace(before, after, 1).encode()


HOSTILE: dict[str, Callable[[tuple[Path, Manifest]], bytes]] = {
    "nested 5,000 deep": lambda _: b"[" * 5_000 + b"]" * 5_000,
    "config nested 5,000 deep": lambda made: replaced(
        made, '"config": {}', '"config": {"a": ' + "[" * 5_000 + "]" * 5_000 + "}"
    ),
    "an integer of 5,000 digits": lambda made: replaced(made, '"seed": 0', '"seed": ' + "9" * 5_000),
    "an integer of 4,000 digits as a size": lambda made: replaced(
        made, '"size_bytes": ', '"size_bytes": ' + "9" * 4_000
    ),
    "an infinite metric": lambda made: replaced(made, "0.4", "1e999"),
    "NaN": lambda made: replaced(made, "0.4", "NaN"),
    "an infinite number in the config": lambda made: replaced(made, '"config": {}', '"config": {"a": 1e999}'),
    "a lone surrogate": lambda made: replaced(made, '"name": "test"', '"name": "\\ud800"'),
    "invalid UTF-8": lambda made: manifest_bytes(made[1]).replace(b'"test"', b'"\xff\xfe"'),
    "a key twice": lambda made: replaced(made, '"seed": 0', '"seed": 0, "seed": 1'),
    "a nested key twice": lambda made: replaced(made, '"passed": true', '"passed": false, "passed": true'),
    "a time without a zone": lambda made: changed(made, lambda body: body.update(created_at="2024-06-10T06:13:20")),
    "a list": lambda _: b"[]",
    "a string": lambda _: b'"manifest"',
    "nothing": lambda _: b"",
    "files as a list": lambda made: changed(made, lambda body: body.update(files=list(body["files"]))),
    "a file outside the folder": lambda made: changed(
        made, lambda body: body["files"].update({"../../etc/passwd": body["files"]["videos.arrow"]})
    ),
    "a negative size": lambda made: changed(made, lambda body: body["files"]["videos.arrow"].update(size_bytes=-1)),
    "a schema version of a megabyte": lambda made: changed(
        made, lambda body: body.update(schema_version="9" * 900_000)
    ),
    "a name that is a number": lambda made: changed(made, lambda body: body.update(name=7)),
    "an unknown field": lambda made: changed(made, lambda body: body.update(hook="rm -rf /")),
    "many keys with one twice": lambda _: (
        "{" + ",".join(f'"{number}":0' for number in range(90_000)) + ',"89999":0}'
    ).encode(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifest_is_rejected_in_a_short_message(made: tuple[Path, Manifest], kind: str) -> None:
    began = time.process_time()
    with pytest.raises(ReleaseError) as error:
        parse_manifest(HOSTILE[kind](made), "where")
    assert len(str(error.value)) < 1_000
    assert time.process_time() - began < 2


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifest_hides_no_other_release(
    made: tuple[Path, Manifest], stored: tuple[ReleaseStore, ReleaseId, Path], kind: str
) -> None:
    store, release, folder = stored
    (folder.parent / OTHER_ID).mkdir()
    (folder.parent / OTHER_ID / MANIFEST_FILE).write_bytes(HOSTILE[kind](made))
    assert [one.release_id for one in store.list()] == [release]
    with pytest.raises(ReleaseError):
        store.manifest(OTHER_ID)


def test_deep_config_within_the_limit_keeps_its_id(made: tuple[Path, Manifest]) -> None:
    config: dict[str, Any] = {}
    for _ in range(195):
        config = {"a": config}
    manifest = made[1].model_copy(update={"config": config})
    assert parse_manifest(manifest_bytes(manifest), "where").release_id == manifest.release_id


def test_manifest_of_100_mb_is_read_to_its_limit_only(stored: tuple[ReleaseStore, ReleaseId, Path]) -> None:
    store, release, folder = stored
    (folder / MANIFEST_FILE).write_bytes(b" " * 100_000_000)
    began = time.process_time()
    with pytest.raises(DigestMismatchError, match=f"more than {MAX_MANIFEST_BYTES} bytes"):
        store.manifest(release)
    with pytest.raises(DigestMismatchError, match=f"more than {MAX_MANIFEST_BYTES} bytes"):
        read_manifest(folder)
    assert time.process_time() - began < 0.5


def test_manifest_that_could_not_be_read_is_not_written(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    long = made[1].model_copy(update={"config": {"a": "x" * MAX_MANIFEST_BYTES}})
    for url in (str(tmp_path / "store"), "memory://too-long"):
        with pytest.raises(ReleaseError, match="shorten its config"):
            ReleaseStore(url).write(made[0], long)
        assert ReleaseStore(url).list() == []


class _CountingFiles(MemoryFileSystem):
    """An object store that notes which files are read."""

    protocol = "counting"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012 - MemoryFileSystem keeps its content on the class
    pseudo_dirs = [""]  # noqa: RUF012
    opened: list[str] = []  # noqa: RUF012

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.opened.append(path.rsplit("/", 1)[-1])
        return super()._open(path, mode, **options)


@pytest.mark.parametrize("signed", [True, False])
def test_no_file_is_read_before_the_signature_is_checked(
    made: tuple[Path, Manifest], tmp_path: Path, signed: bool
) -> None:
    fsspec.register_implementation("counting", _CountingFiles, clobber=True)
    store = ReleaseStore("counting://releases")
    manifest = made[1] if signed else made[1].model_copy(update={"signature": None})
    release = store.write(made[0], manifest)
    _CountingFiles.opened.clear()
    stranger = Ed25519PrivateKey.generate().public_key()
    with pytest.raises(SignatureError):
        store.fetch(release, tmp_path / "cache", public_keys=[stranger])
    assert _CountingFiles.opened == [MANIFEST_FILE]
    assert not (tmp_path / "cache" / release).exists()
    if signed:
        folder = store.fetch(release, tmp_path / "cache", public_keys=[KEY.public_key()])
        assert {path.name for path in folder.iterdir()} == {MANIFEST_FILE, *RELEASE_FILES}


def test_cached_release_needs_a_trusted_signature_too(
    stored: tuple[ReleaseStore, ReleaseId, Path], tmp_path: Path
) -> None:
    store, release, _ = stored
    store.fetch(release, tmp_path / "cache")
    with pytest.raises(SignatureError):
        store.fetch(release, tmp_path / "cache", public_keys=[Ed25519PrivateKey.generate().public_key()])


def test_endless_file_is_copied_to_its_size_only(stored: tuple[ReleaseStore, ReleaseId, Path], tmp_path: Path) -> None:
    store, release, folder = stored
    size = (folder / VIDEOS_FILE).stat().st_size
    os.truncate(folder / VIDEOS_FILE, 1 << 40)  # a sparse file of a terabyte
    with pytest.raises(DigestMismatchError, match=f"{VIDEOS_FILE} has more than {size} bytes"):
        store.fetch(release, tmp_path / "cache")
    with pytest.raises(DigestMismatchError, match=f"{VIDEOS_FILE} has more than {size} bytes"):
        verify(folder, public_keys=[KEY.public_key()], feature_services=None)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".{release}.lock"]


def _link(path: Path) -> None:
    target = path.parent.parent.parent / f"elsewhere-{path.name}"
    path.rename(target)
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.open(path.parent, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{directory}/{path.name}")  # the path itself is longer than a socket's may be
        os.close(directory)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", [RANKER_FILE, MANIFEST_FILE])
@pytest.mark.parametrize("replace", [_link, _pipe, _zeros, _socket, _folder])
def test_only_regular_files_are_opened(
    stored: tuple[ReleaseStore, ReleaseId, Path], tmp_path: Path, replace: Callable[[Path], None], name: str
) -> None:
    store, release, folder = stored
    replace(folder / name)
    outcomes: list[Exception] = []

    def fetch() -> None:
        for call in (
            lambda: store.fetch(release, tmp_path / "cache"),
            lambda: verify(folder, public_keys=[KEY.public_key()], feature_services=None),
        ):
            try:
                call()
            except ReleaseError as error:
                outcomes.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(30)
    assert [type(outcome) for outcome in outcomes] == [DigestMismatchError, DigestMismatchError]
    assert all("expected a regular file" in str(outcome) for outcome in outcomes)


def test_release_folder_that_is_a_link_is_rejected(
    stored: tuple[ReleaseStore, ReleaseId, Path], tmp_path: Path
) -> None:
    store, release, folder = stored
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DigestMismatchError, match="is a link"):
        store.fetch(release, tmp_path / "cache")
    assert store.list() == []
