"""``reelway stream``: updates features continuously from the event log."""

from __future__ import annotations

from pathlib import Path

import typer

from reelway.pipelines.commands.stream_overlay import overlay


def register(app: typer.Typer) -> None:
    """Adds ``reelway stream`` and ``reelway stream overlay``."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(stream)
    group.command("overlay")(overlay)
    app.add_typer(group, name="stream")


def stream(
    context: typer.Context,
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory whose features are updated."),
    events: str = typer.Option(
        "",
        "--event-log",
        help="Event log: a folder, kafka://host:port or kafka://host:port/prefix. Defaults to RUN/events.",
    ),
    overlay: str = typer.Option(
        "", "--changelog", help="Changelog for video features to write: a path or fsspec URL. Defaults to RUN/overlay."
    ),
    lateness_s: float = typer.Option(
        1.0, "--allowed-lateness", min=0.0,
        help="Longest time, in seconds, from the receipt of an outcome until it is in the event log.",
    ),
    metrics_port: int | None = typer.Option(
        None, min=1, max=65535, help="Port of the Prometheus metrics. By default no metrics are served."
    ),
) -> None:  # fmt: skip
    """Update viewers' and videos' features from the event log until Ctrl-C or SIGTERM.

    The values equal those that `reelway features` computes at the same time. Viewers' rows are written to the online
    store, videos' rows to the changelog that `reelway serve` reads. The state is stored in RUN/stream/state.db; after a
    crash the command resumes from it. Without a stored state it starts at the end of the data set.

    \b
    Examples:
      reelway stream --run runs/demo
      reelway stream --run runs/production --event-log kafka://kafka:9092 --changelog s3://features/overlay
    """
    if context.invoked_subcommand:
        return
    import signal
    import threading

    from reelway.pipelines.features.stream.processor import MicroBatchResult, StreamSettings
    from reelway.pipelines.features.stream.service import StreamOptions
    from reelway.pipelines.features.stream.service import run_stream as run_stream
    from reelway.platform.cli.terminal import print_status
    from reelway.platform.run_directory import RunDirectory

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    totals = {"outcomes": 0, "rows": 0}

    def print_result(done: MicroBatchResult) -> None:
        totals["outcomes"] += done.outcomes
        totals["rows"] += sum(done.rows.values())
        if done.outcomes or any(done.rows.values()):
            print_status(f"stream: {done.outcomes} outcomes read, {sum(done.rows.values())} rows written")

    options = StreamOptions(events, overlay, metrics_port, StreamSettings(lateness_s=lateness_s))
    print_status(f"stream: updating the features of {run}; stop with Ctrl-C")
    run_stream(RunDirectory(run), options, stop, print_result)
    print_status(
        f"stream: stopped after {totals['outcomes']} outcomes and {totals['rows']} rows; all rows are delivered"
    )
