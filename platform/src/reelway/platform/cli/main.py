"""The ``reelway`` command: collects the commands of all installed members and maps errors to exit codes.

Members register commands by entry points. A member that is not installed adds no commands; a member that is installed
but cannot be imported raises its import error.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version

import typer
from rich.markup import escape

from reelway.platform.cli.supervisor import enable_supervision
from reelway.platform.cli.terminal import stderr_console
from reelway.platform.errors import ReelwayError
from reelway.platform.stop_signals import exit_on_stop_signals

ENTRY_POINT_GROUP = "reelway.commands"


def build_app() -> typer.Typer:
    """Returns the application with the commands of all installed members."""
    app = typer.Typer(
        name="reelway",
        help="Train, release, serve and roll out a short-video recommender.",
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

    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        entry.load()(app)
    return app


def main() -> None:
    """Runs the command line.

    Exit codes: 0 success, 1 unexpected error (a bug), 2 usage, 3 and above see ``reelway.platform.errors``, 130 Ctrl-C,
    129 SIGHUP, 143 SIGTERM.
    """
    exit_on_stop_signals()
    enable_supervision()
    try:
        build_app()()
    except ReelwayError as error:
        stderr_console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
