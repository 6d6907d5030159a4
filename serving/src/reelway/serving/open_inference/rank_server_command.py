"""``reelway rank-server``: a release's ranker behind KServe, or behind any client of its protocol."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from reelway.platform.cli.terminal import print_status, stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ConfigError
from reelway.platform.listen_address import EVERYWHERE, resolve_host, url_host

if TYPE_CHECKING:
    from reelway.serving.open_inference.server import BoundPorts


def register(app: typer.Typer) -> None:
    """Adds ``reelway rank-server``."""
    app.command()(rank_server)


def rank_server(
    release_dir: Path = typer.Option(..., help="Folder of the release, as `reelway release fetch --verify` prints it."),
    host: str = typer.Option(EVERYWHERE, help="IP address to listen on; * listens on all interfaces."),
    http_port: int = typer.Option(
        8080, min=0, max=65535, help="Port of the REST API, the health checks and /metrics; 0 selects a free port."
    ),
    grpc_port: int = typer.Option(8081, min=0, max=65535, help="Port of the gRPC API; 0 selects a free port."),
    threads: int = typer.Option(1, min=1, help="Number of requests that run at the same time; use one thread per CPU."),
    max_queued_requests: int = typer.Option(
        32, min=0, help="Number of requests that may wait for a thread; further requests are rejected with 429."
    ),
    max_candidates: int = typer.Option(4096, min=1, help="Largest number of candidates of one request."),
    drain_seconds: float = typer.Option(
        5.0, min=0, help="Time after SIGTERM, in seconds, in which new requests are still accepted."
    ),
    grace_seconds: float = typer.Option(
        8.0, min=0, help="Time for requests in flight to finish after new requests are no longer accepted, in seconds."
    ),
) -> None:
    """Serve a release's ranker by the Open Inference Protocol v2 (REST and gRPC, model `ranker`) until SIGTERM.

    The release must have been fetched and verified with `reelway release fetch --verify`. The server listens when the
    ranker is loaded and warm.

    Example:

      reelway rank-server --release-dir /var/cache/reelway/releases/3f9c... --host 127.0.0.1
    """
    from reelway.platform.telemetry import configure_logging

    configure_logging()
    logging.getLogger("faiss").setLevel(logging.WARNING)
    sys.argv = sys.argv[:1]  # kserve parses the process's command line when it is imported
    try:
        from reelway.serving.open_inference.server import RankServerOptions, run_rank_server
    except ModuleNotFoundError as error:
        raise ConfigError(f"rank-server: {error}; install `reelway-serving[rank-server]`") from error

    options = RankServerOptions(
        release_dir, host, http_port, grpc_port, threads=threads, max_queued=max_queued_requests,
        max_candidates=max_candidates, drain_s=drain_seconds, grace_period_s=grace_seconds,
    )  # fmt: skip

    def on_listening(ports: BoundPorts, release: str) -> None:
        at = url_host(resolve_host(host))
        print_status(f"listening: REST at http://{at}:{ports.http_port}, gRPC at {at}:{ports.grpc_port}")
        stdout_console.print(f"ranking with release {short_id(release)}", highlight=False)

    run_rank_server(options, on_listening)
