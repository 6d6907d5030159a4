"""``reelway stream``: features from the event log, as outcomes come in. It only wires ``features.stream``."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add ``reelway stream``."""
    app.command()(stream)


def stream(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory whose features are kept fresh."),
    events: str = typer.Option("", help="Event log: a path or kafka://host:port/topic; RUN/events/log.db when absent."),
    overlay: str = typer.Option("", help="Changelog of video features: a path or fsspec URL; RUN/overlay when absent."),
    lateness_s: float = typer.Option(
        1.0, "--lateness", min=0.0, help="Seconds that an outcome may take from being heard to being in the log."
    ),
    metrics_port: int | None = typer.Option(None, min=1, max=65535, help="Port for Prometheus; none when absent."),
) -> None:
    """Keep viewers' and videos' features fresh from the event log, until Ctrl-C or SIGTERM.

    The same values as `reelway features` would compute at each moment: viewers' rows go to the online store, videos'
    to the overlay that `reelway serve` reads. Its state is RUN/stream/state.db; killed anywhere it goes on from there.
    Without that file it begins from the data set's last moment.

    \b
    Examples:
      reelway stream --run runs/demo
      reelway stream --run runs/production --events kafka://kafka:9092/outcomes --overlay s3://features/overlay
    """
    import signal
    import threading

    from reelway.pipelines.features.stream.processor import Round, StreamSettings
    from reelway.pipelines.features.stream.service import StreamOptions
    from reelway.pipelines.features.stream.service import stream as run_stream
    from reelway.platform.cli.terminal import say
    from reelway.platform.runs import RunDirectory

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    totals = {"outcomes": 0, "rows": 0}

    def said(done: Round) -> None:
        totals["outcomes"] += done.outcomes
        totals["rows"] += sum(done.rows.values())
        if done.outcomes or any(done.rows.values()):
            say(f"stream: {done.outcomes} outcomes read, {sum(done.rows.values())} rows written")

    options = StreamOptions(events, overlay, metrics_port, StreamSettings(lateness_s=lateness_s))
    say(f"stream: keeping {run} fresh; Ctrl-C ends it")
    run_stream(RunDirectory(run), options, stop, said)
    say(f"stream: ended after {totals['outcomes']} outcomes and {totals['rows']} rows; nothing is left undone")
