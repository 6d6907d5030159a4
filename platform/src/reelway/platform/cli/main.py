"""The ``reelway`` command: finds every member's commands, turns Reelway's errors into messages and exit codes.

A member that is not installed simply has no commands here; one that is installed and broken fails loudly.
"""

from __future__ import annotations

import signal
import sys
from importlib.metadata import entry_points, version
from types import FrameType
from typing import NoReturn

import typer
from rich.markup import escape

from reelway.platform.cli.terminal import console
from reelway.platform.errors import ReelwayError

GROUP = "reelway.commands"


def build_app() -> typer.Typer:
    """The application with all installed members' commands."""
    app = typer.Typer(
        name="reelway",
        help="Short-video recommendations: from events to a signed release to live slates.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        show_version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
    ) -> None:
        if show_version:
            typer.echo(version("reelway-platform"))
            raise typer.Exit

    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        entry.load()(app)
    return app


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """A request to end unwinds the stack like Ctrl-C does, so that every child and file is cleaned up."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command line. Exit codes: 0 well, 1 a bug, 2 usage, 3.. see ``reelway.platform.errors``, 130 Ctrl-C."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        build_app()()
    except ReelwayError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
