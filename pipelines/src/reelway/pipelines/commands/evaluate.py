"""Placeholder until the command is written."""

import typer


def register(app: typer.Typer) -> None:
    """Add nothing yet."""
