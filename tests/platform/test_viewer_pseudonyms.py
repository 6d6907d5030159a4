"""Pseudonyms of viewers: stable under one secret, different under another, and none without a key."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from reelway.platform import viewer_pseudonyms
from reelway.platform.tokens import SECRET_VARIABLE
from reelway.platform.viewer_pseudonyms import use_secret, use_secret_of_run, viewer_pseudonym


@pytest.fixture(autouse=True)
def own_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer_pseudonyms, "_key_of_process", [])
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)


def test_pseudonym_depends_on_secret_and_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "a" * 16)
    first = viewer_pseudonym(4711)
    assert viewer_pseudonym(4711) == first
    assert viewer_pseudonym(4712) != first
    monkeypatch.setenv(SECRET_VARIABLE, "b" * 16)
    assert viewer_pseudonym(4711) != first


def test_processes_with_one_secret_print_one_pseudonym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router knows the secret itself, a command the run's file, a stream of a cluster the variable."""
    (tmp_path / "token.secret").write_text("first-secret-of-16,older-secret-of-16\n")
    use_secret(b"first-secret-of-16")
    of_router = viewer_pseudonym(4711)
    viewer_pseudonyms._key_of_process.clear()
    use_secret_of_run(tmp_path)
    assert viewer_pseudonym(4711) == of_router
    viewer_pseudonyms._key_of_process.clear()
    monkeypatch.setenv(SECRET_VARIABLE, "first-secret-of-16,older-secret-of-16")
    assert viewer_pseudonym(4711) == of_router


def test_processes_without_a_secret_have_keys_of_their_own() -> None:
    program = "from reelway.platform.viewer_pseudonyms import viewer_pseudonym as p; print(p(7), p(7))"
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    (one, same), (other, _) = (run.stdout.split() for run in runs)
    assert one == same != other
