"""An archive is packed again when its image is another one, and not before: packing takes minutes of a large one."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
from tests.infra.scripts import load_script

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
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A buildah whose images are a file."""
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


def test_an_archive_of_the_same_image_is_kept(builders: ModuleType, place: Path) -> None:
    archive = place / "serving.tar"
    builders.Builder("buildah").save(IMAGE, archive)
    archive.write_text("what was packed")
    builders.Builder("buildah").save(IMAGE, archive)
    assert archive.read_text() == "what was packed"


def test_another_image_is_packed_again(builders: ModuleType, place: Path) -> None:
    archive = place / "serving.tar"
    builders.Builder("buildah").save(IMAGE, archive)
    (place / "id").write_text("second")
    builders.Builder("buildah").save(IMAGE, archive)
    assert archive.read_text() == "second"


def test_an_archive_that_was_not_finished_is_packed_again(builders: ModuleType, place: Path) -> None:
    archive = place / "serving.tar"
    builders.Builder("buildah").save(IMAGE, archive)
    (place / "id").write_text("second")
    (place / "broken").touch()
    with pytest.raises(builders.BuilderError, match="buildah push"):
        builders.Builder("buildah").save(IMAGE, archive)
    (place / "broken").unlink()
    (place / "id").write_text("first")
    builders.Builder("buildah").save(IMAGE, archive)
    assert archive.read_text() == "first"
