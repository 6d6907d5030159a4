"""``reelway stream overlay``: embeds uploads for every open release and writes the popular and trending lists."""

from __future__ import annotations

from pathlib import Path

import typer


def overlay(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory whose releases get uploads."),
    events: str = typer.Option(
        "",
        "--events",
        help="Event log: a folder, kafka://host:port or kafka://host:port/prefix. Defaults to RUN/events.",
    ),
    overlay: str = typer.Option(
        "", "--overlay", help="Overlay to write: a path or fsspec URL. Defaults to RUN/overlay."
    ),
    release_store: str = typer.Option(
        "", "--release-store", help="Path or URL of the release store. Defaults to RUN/releases."
    ),
    public_keys: Path | None = typer.Option(
        None, "--public-keys", help="Folder with *.public.pem, or one PEM file. Defaults to RUN/keys."
    ),
    metrics_port: int | None = typer.Option(
        None, min=1, max=65535, help="Port of the Prometheus metrics. By default no metrics are served."
    ),
) -> None:
    """Add uploads to every open release and write the live lists, until Ctrl-C or SIGTERM.

    Reads the catalogue of the event log, embeds each upload with the video tower of each release that is being served,
    and writes the rows to the overlay that `reelway serve` reads. Counts exposures and outcomes of the last 24 hours
    and writes the popular and trending lists there, too. After a crash the command resumes from its files. One process
    may write an overlay.

    \b
    Examples:
      reelway stream overlay --run runs/demo
      reelway stream overlay --events kafka://kafka:9092 --overlay s3://features/overlay --release-store s3://releases
    """
    import threading

    from reelway.pipelines.features.stream.overlay_writer import OverlayOptions, run_overlay_writer
    from reelway.platform.cli.terminal import print_status
    from reelway.platform.run_directory import RunDirectory
    from reelway.platform.stop_signals import stopped_by_signals

    directory = RunDirectory(run)
    stop = threading.Event()
    options = OverlayOptions(
        events=events or str(directory.path / "events"),
        overlay=overlay or str(directory.overlay),
        release_store=release_store or str(directory.release_store),
        release_cache=directory.path / "serving" / "releases",
        public_keys=public_keys or directory.keys,
        lists_state=directory.path / "stream" / "lists.npz",
        metrics_port=metrics_port,
    )
    print_status(f"overlay: adding uploads to {options.overlay}; stop with Ctrl-C")
    with stopped_by_signals(stop.set):
        run_overlay_writer(options, stop)
    print_status("overlay: stopped")
