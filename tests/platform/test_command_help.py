"""The help of every command can be shown. Square brackets in a help text are markup, unless they are escaped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from reelway.platform.cli.main import build_app

APP = build_app()


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Yields the words of each command and group."""
    yield path
    for name, inner in sorted(getattr(command, "commands", {}).items()):  # a group has commands
        yield from commands(inner, *path, name)


@pytest.mark.parametrize("words", list(commands(typer.main.get_command(APP))), ids=" ".join)
def test_help_is_shown(words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(APP, [*words, "--help"])
    assert shown.exit_code == 0, shown.exception
    assert "Usage:" in shown.output


def test_all_commands_are_found() -> None:
    assert ("rollout", "start") in set(commands(typer.main.get_command(APP)))
