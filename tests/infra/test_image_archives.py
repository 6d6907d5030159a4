"""An archive is written again only if its image changed, because writing a large one takes minutes."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.infra.scripts import load_script

IMAGE = "reelway.local/serving:1"
BUILDAH = """#!/bin/sh
case "$1" in
inspect) cat "$PLACE/id" ;;
push) test ! -e "$PLACE/broken" || exit 1
    for last; do :; done
    archive=${last#oci-archive:}
    cp "$PLACE/id" "${archive%:reelway.local/*}" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake buildah that reads the image's identity from a file."""
    program = tmp_path / "bin" / "buildah"
    program.parent.mkdir()
    program.write_text(BUILDAH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "id").write_text("first")
    return tmp_path


@pytest.fixture(scope="module")
def builders() -> ModuleType:
    return load_script("images/builders.py")


def test_archive_of_an_unchanged_image_is_kept(builders: ModuleType, folder: Path) -> None:
    archive = folder / "serving.tar"
    builders.Builder("buildah").save(IMAGE, archive)
    archive.write_text("what was packed")
    builders.Builder("buildah").save(IMAGE, archive)
    assert archive.read_text() == "what was packed"


def test_archive_of_a_changed_image_is_written_again(builders: ModuleType, folder: Path) -> None:
    archive = folder / "serving.tar"
    builders.Builder("buildah").save(IMAGE, archive)
    (folder / "id").write_text("second")
    builders.Builder("buildah").save(IMAGE, archive)
    assert archive.read_text() == "second"


def test_unfinished_archive_is_written_again(builders: ModuleType, folder: Path) -> None:
    archive = folder / "serving.tar"
    builders.Builder("buildah").save(IMAGE, archive)
    (folder / "id").write_text("second")
    (folder / "broken").touch()
    with pytest.raises(builders.BuilderError, match="buildah push"):
        builders.Builder("buildah").save(IMAGE, archive)
    (folder / "broken").unlink()
    (folder / "id").write_text("first")
    builders.Builder("buildah").save(IMAGE, archive)
    assert archive.read_text() == "first"
