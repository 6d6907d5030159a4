"""Atomic files and folders: exceptions, full disks and killed processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reelway.platform.atomic_files import (
    atomic_directory,
    atomic_file,
    create_private_file,
    ensure_private_token,
    write_json,
)
from reelway.platform.errors import StorageError


class _StopError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "sub" / "file") as aside:
        aside.write_text("new")
        assert not (tmp_path / "sub" / "file").exists()
    assert (tmp_path / "sub" / "file").read_text() == "new"
    assert names(tmp_path / "sub") == ["file"]
    assert stat.S_IMODE((tmp_path / "sub" / "file").stat().st_mode) == 0o644


def test_failure_keeps_the_previous_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(_StopError), atomic_file(tmp_path / "file") as aside:  # noqa: PT012
        aside.write_text("half")
        raise _StopError
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "folder") as aside:
        (aside / "one").write_text("1")
        (aside / "deep").mkdir()
        (aside / "deep" / "two").write_text("2")
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "deep" / "two").read_text() == "2"


def test_folder_replaces_the_previous_one_completely(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with atomic_directory(tmp_path / "folder") as aside:
        (aside / "new").write_text("new")
        assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_failure_keeps_the_previous_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(_StopError), atomic_directory(tmp_path / "folder") as aside:  # noqa: PT012
        (aside / "new").write_text("half")
        raise _StopError
    assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path) == ["folder"]


def test_json_has_sorted_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": Path("x")})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": "x",\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {(1, 2): "a tuple is no key"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "x", "b": 1}
    assert names(tmp_path) == ["a.json"]


def test_private_file_is_never_replaced(tmp_path: Path) -> None:
    create_private_file(tmp_path / "sub" / "key", b"first")
    with pytest.raises(FileExistsError):
        create_private_file(tmp_path / "sub" / "key", b"second")
    assert (tmp_path / "sub" / "key").read_bytes() == b"first"
    assert stat.S_IMODE((tmp_path / "sub" / "key").stat().st_mode) == 0o600
    assert names(tmp_path / "sub") == ["key"]


def test_existing_token_is_kept(tmp_path: Path) -> None:
    ensure_private_token(tmp_path / "token")
    token = (tmp_path / "token").read_text()
    assert len(bytes.fromhex(token)) == 32
    ensure_private_token(tmp_path / "token")
    assert (tmp_path / "token").read_text() == token


def test_unsearchable_folder_of_a_token_raises_a_storage_error(tmp_path: Path) -> None:
    """A name that is too long fails like a folder without the right to search it, also for root."""
    with pytest.raises(StorageError, match="File name too long"):
        ensure_private_token(tmp_path / ("x" * 300))


def test_private_file_below_a_file_raises_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        create_private_file(tmp_path / "file" / "key", b"content")


def test_unwritable_path_raises_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for open_ in (atomic_file, atomic_directory):
        with pytest.raises(StorageError, match="cannot write"), open_(tmp_path / "file" / "below"):
            pass


LIMITED = """
import sys
from pathlib import Path
from reelway.platform.atomic_files import atomic_file, atomic_directory
from reelway.platform.errors import StorageError

for act in (
    lambda: atomic_file(Path(sys.argv[1]) / "file"),
    lambda: atomic_directory(Path(sys.argv[1]) / "folder"),
):
    try:
        with act() as aside:
            place = aside if aside.is_file() else aside / "big"
            place.write_bytes(bytes(1 << 20))
    except StorageError as error:
        print(error)
"""


def test_full_disk_keeps_the_previous_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    output = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        preexec_fn=limit, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert output.count("File too large; it is unchanged") == 2
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path / "folder") == ["old"]


KILLED = """
import sys, time
from pathlib import Path
from reelway.platform.atomic_files import atomic_directory

with atomic_directory(Path(sys.argv[1]) / "folder") as aside:
    (aside / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "litter"), [(signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_killed_process_leaves_only_hidden_files(tmp_path: Path, sent: int, litter: int) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        started = time.monotonic()
        os.kill(child.pid, sent)
        child.wait(timeout=30)
    assert time.monotonic() - started < 30
    assert names(tmp_path / "folder") == ["old"]
    hidden = [name for name in names(tmp_path) if name.startswith(".")]
    assert len(hidden) == litter  # nothing can clean up after SIGKILL, but the leftovers are hidden
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["folder"]


def test_folder_of_a_killed_writer_is_removed_by_a_later_one(tmp_path: Path) -> None:
    left, young, other = (tmp_path / name for name in (".folder.abandoned", ".folder.in-use", ".other.abandoned"))
    for path in (left, young, other):
        path.mkdir()
        (path / "half").write_text("half")
    for path in (left, other):
        os.utime(path, (1.0, 1.0))
    with atomic_directory(tmp_path / "folder"):
        pass
    assert names(tmp_path) == [".folder.in-use", ".other.abandoned", "folder"]
