"""Placeholder until the commands are written."""

import typer


def register_serve(app: typer.Typer) -> None:
    """Add nothing yet."""


def register_recommend(app: typer.Typer) -> None:
    """Add nothing yet."""
