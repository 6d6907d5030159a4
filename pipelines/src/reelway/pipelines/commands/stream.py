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
        "--events",
        help="Event log: a folder, kafka://host:port or kafka://host:port/prefix. Defaults to RUN/events.",
    ),
    overlay: str = typer.Option(
        "", "--overlay", help="Overlay with the changelog to write: a path or fsspec URL. Defaults to RUN/overlay."
    ),
    metrics_port: int | None = typer.Option(
        None, min=1, max=65535, help="Port of the Prometheus metrics. By default no metrics are served."
    ),
    state: Path | None = typer.Option(
        None, "--state", help="Folder of the state and of records that cannot be read. Defaults to RUN/stream."
    ),
) -> None:  # fmt: skip
    """Update viewers' and videos' features from the event log until Ctrl-C or SIGTERM.

    The values equal those that `reelway features` computes at the same time. Viewers' rows are written to the online
    store, videos' rows to the changelog that `reelway serve` reads. After a crash the command resumes from its stored
    state. Without a stored state it starts at the end of the data set.

    If the event log is on Kafka, several processes share the work; each needs a state folder of its own. A process
    restores a missing state from Kafka.

    \b
    Examples:
      reelway stream --run runs/demo
      reelway stream --run runs/production --events kafka://kafka:9092 --overlay s3://features/overlay
    """
    if context.invoked_subcommand:
        return
    import threading

    from reelway.pipelines.features.stream.local_stream import MicroBatchResult
    from reelway.pipelines.features.stream.service import StreamOptions
    from reelway.pipelines.features.stream.service import run_stream as run_stream
    from reelway.platform.cli.terminal import print_status
    from reelway.platform.eventlog.addresses import KAFKA
    from reelway.platform.run_directory import RunDirectory
    from reelway.platform.stop_signals import stopped_by_signals
    from reelway.platform.viewer_pseudonyms import use_secret_of_run

    use_secret_of_run(RunDirectory(run).keys)
    stop = threading.Event()
    totals = {"events": 0, "rows": 0}

    def print_result(done: MicroBatchResult) -> None:
        events, rows = done.events.total(), sum(done.rows.values())
        totals["events"] += events
        totals["rows"] += rows
        if events or rows:
            print_status(f"stream: {events} events read, {rows} rows written")

    options = StreamOptions(events, overlay, metrics_port, state)
    if events.startswith(KAFKA):
        from reelway.pipelines.features.stream.quix_service import run_member

        print_status(f"stream: updating the features of {run} as a member of a group; stop with Ctrl-C")
        with stopped_by_signals(stop.set):
            run_member(RunDirectory(run), options, stop)
        print_status("stream: stopped; all rows are in the log")
        return
    print_status(f"stream: updating the features of {run}; stop with Ctrl-C")
    with stopped_by_signals(stop.set):
        run_stream(RunDirectory(run), options, stop, print_result)
    print_status(f"stream: stopped after {totals['events']} events and {totals['rows']} rows; all rows are delivered")
