"""Writes that are whole or absent, whatever ends them: an exception, a full disk, a kill."""

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

from reelway.platform.durable import whole_file, whole_folder, write_json
from reelway.platform.errors import StorageError


class _StopError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with whole_file(tmp_path / "sub" / "file") as aside:
        aside.write_text("new")
        assert not (tmp_path / "sub" / "file").exists()
    assert (tmp_path / "sub" / "file").read_text() == "new"
    assert names(tmp_path / "sub") == ["file"]
    assert stat.S_IMODE((tmp_path / "sub" / "file").stat().st_mode) == 0o644


def test_a_failure_in_the_middle_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(_StopError), whole_file(tmp_path / "file") as aside:  # noqa: PT012
        aside.write_text("half")
        raise _StopError
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder") as aside:
        (aside / "one").write_text("1")
        (aside / "deep").mkdir()
        (aside / "deep" / "two").write_text("2")
        assert not (tmp_path / "folder").exists()
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "deep" / "two").read_text() == "2"


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with whole_folder(tmp_path / "folder") as aside:
        (aside / "new").write_text("new")
        assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]


def test_a_failure_in_the_middle_keeps_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    with pytest.raises(_StopError), whole_folder(tmp_path / "folder") as aside:  # noqa: PT012
        (aside / "new").write_text("half")
        raise _StopError
    assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path) == ["folder"]


def test_json_is_written_with_sorted_keys_and_a_value_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": Path("x")})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": "x",\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {(1, 2): "a tuple is no key"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "x", "b": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for open_ in (whole_file, whole_folder):
        with pytest.raises(StorageError, match="cannot write"), open_(tmp_path / "file" / "below"):
            pass


LIMITED = """
import sys
from pathlib import Path
from reelway.platform.durable import whole_file, whole_folder
from reelway.platform.errors import StorageError

for act in (
    lambda: whole_file(Path(sys.argv[1]) / "file"),
    lambda: whole_folder(Path(sys.argv[1]) / "folder"),
):
    try:
        with act() as aside:
            place = aside if aside.is_file() else aside / "big"
            place.write_bytes(bytes(1 << 20))
    except StorageError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_a_storage_error_and_the_old_content_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    said = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        preexec_fn=limit, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert said.count("File too large; it is unchanged") == 2
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path / "folder") == ["old"]


KILLED = """
import sys, time
from pathlib import Path
from reelway.platform.durable import whole_folder

with whole_folder(Path(sys.argv[1]) / "folder") as aside:
    (aside / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "litter"), [(signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_a_process_stopped_in_the_middle_leaves_nothing_visible(tmp_path: Path, sent: int, litter: int) -> None:
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
    assert len(hidden) == litter  # nothing can clean up after SIGKILL, but what it left is hidden
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["folder"]
