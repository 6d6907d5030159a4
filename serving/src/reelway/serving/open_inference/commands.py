"""``reelway rank-server``: a release's ranker behind KServe, or behind anything that speaks its protocol."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path

import typer

from reelway.platform.cli.terminal import out, say


def register(app: typer.Typer) -> None:
    """Add ``reelway rank-server``."""
    app.command()(rank_server)


def rank_server(
    release: str = typer.Option(..., help="Whole id of the release."),
    release_store: str = typer.Option(..., help="Path or URL of the release store."),
    release_cache: Path = typer.Option(..., help="Folder for the fetched release."),
    public_keys: Path = typer.Option(..., help="Folder with *.public.pem, or one PEM file: who is trusted."),
    host: str = typer.Option("0.0.0.0", help="Address to listen at."),
    http_port: int = typer.Option(8080, min=0, max=65535, help="Of REST, health and /metrics; 0 chooses a free one."),
    grpc_port: int = typer.Option(8081, min=0, max=65535, help="Of gRPC; 0 chooses a free one."),
    threads: int = typer.Option(1, min=1, help="Requests worked out at the same time; a thread per CPU of the pod."),
    waiting: int = typer.Option(32, min=0, help="Requests that may wait for that; more are sent away (429)."),
    max_candidates: int = typer.Option(4096, min=1, help="Of one request."),
    drain_seconds: float = typer.Option(5.0, min=0, help="From SIGTERM, in which requests still come."),
    grace_seconds: float = typer.Option(20.0, min=0, help="After that, for requests under way."),
) -> None:
    """Serve a release's ranker by the Open Inference Protocol v2 (REST and gRPC, model `ranker`) until SIGTERM.

    It is live at once, and ready when the release is fetched, verified in full and one call went through. A release
    that is refused ends it with the reason and exit code 6.

    Example:

      reelway rank-server --release 3f9c... --release-store runs/demo/releases --release-cache /tmp/releases
      --public-keys runs/demo/keys --host 127.0.0.1
    """
    from reelway.platform.rollout.traffic.serving_options import ReleaseArgs
    from reelway.platform.telemetry import configure_logging
    from reelway.serving.open_inference.server import Listening, RankServerOptions, run_rank_server

    configure_logging()
    source = ReleaseArgs(
        release_store=release_store, release_cache=release_cache, public_keys=public_keys, release=release
    )
    options = RankServerOptions(
        source, host, http_port, grpc_port, threads=threads, waiting=waiting, candidates=max_candidates,
        drain_s=drain_seconds, grace_s=grace_seconds,
    )  # fmt: skip

    def listening(at: Listening) -> None:
        say(f"live: REST at http://{host}:{at.http_port}, gRPC at {host}:{at.grpc_port}")

    def ready() -> None:
        out.print(f"ranking by release {release[:12]}", highlight=False)

    async def until_told() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await run_rank_server(options, listening, ready, stop)

    for chatty in ("faiss", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    asyncio.run(until_told())
