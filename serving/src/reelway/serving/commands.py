"""``reelway serve`` and ``reelway recommend``: a run's release behind HTTP, and a slate in readable form.

Whatever ``serve`` starts it ends: Ray, Serve and every replica go with it, however it is stopped. It refuses a release
that ``verify`` refuses, a port that is taken, and a run that is being served already.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import typer
from rich.markup import escape
from rich.table import Table

from reelway.platform.cli.terminal import console, out, say
from reelway.platform.durable import write_json
from reelway.platform.errors import ConfigError, FeatureError, ServingError
from reelway.platform.runs import RunDirectory

if TYPE_CHECKING:
    from reelway.platform.release.verify import VerifiedRelease

SECRET_VARIABLE: Final = "REELWAY_TOKEN_SECRET"
"""The secret of impression tokens; several are separated by commas, the first one signs."""
WARM_UP: Final = 20
RECORD: Final = "serving.json"
RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")


def register_serve(app: typer.Typer) -> None:
    """Add ``reelway serve``."""
    app.command()(serve)


def register_recommend(app: typer.Typer) -> None:
    """Add ``reelway recommend``."""
    app.command()(recommend)


def serve(
    run: Path = RUN,
    release: str = typer.Option(
        "latest", help="Id of a release in the run's store, the unique beginning of one, or 'latest'."
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 chooses a free one."),
    router_replicas: int = typer.Option(1, min=1, help="Processes that take HTTP."),
    retrieval_replicas: int = typer.Option(1, min=1, help="Processes of the retrieval stage."),
    ranking_replicas: int = typer.Option(1, min=1, help="Processes of the ranking stage."),
    reranking_replicas: int = typer.Option(1, min=1, help="Processes of the re-ranking stage."),
    parity_ratio: float = typer.Option(0.01, min=0.0, max=1.0, help="Share of requests logged for the parity replay."),
) -> None:
    """Serve a run's release over HTTP until Ctrl-C: retrieval, ranking and re-ranking behind a router, on Ray Serve.

    When it answers, its address is printed and written to serving.json in the run directory.

    Examples:

      reelway serve --run runs/demo

      reelway serve --run runs/demo --release 3f9c --port 0 --ranking-replicas 2
    """
    directory = RunDirectory(run)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background ignores it
    with only_server_of(directory):
        verified = _verified(directory, release)
        port = free_port(host) if port == 0 else refuse_taken_port(host, port)
        from reelway.platform.rollout.routing import Routing
        from reelway.serving.deployments import Replicas, ServiceOptions, running_service

        place = (run / "serving").absolute()
        options = ServiceOptions(
            releases_dir=verified.folder.parent,
            metrics_dir=_emptied(place / "metrics"),
            token_secrets=_token_secrets(directory),
            features_dir=_features(directory),
            vector_log=place / "vectors.jsonl",
            parity_ratio=parity_ratio,
            host=host,
            port=port,
            replicas=Replicas(router_replicas, retrieval_replicas, ranking_replicas, reranking_replicas),
        )
        release_id = verified.manifest.release_id
        with ExitStack() as stack:
            with console.status("starting Ray and the stages"):
                url = stack.enter_context(running_service(Routing.whole(release_id), options))
                _warm_up(url)
            stack.enter_context(_record(directory, {"url": url, "pid": os.getpid(), "release": release_id}))
            out.print(f"serving release {release_id[:12]} at {url}", highlight=False)
            say(f"Ctrl-C stops it. Try: reelway recommend --url {url} --viewer 1")
            _wait_for_the_end()


def recommend(
    viewer: int = typer.Option(..., min=0, help="Viewer id; an unknown one gets what newcomers get."),
    count: int = typer.Option(10, min=1, max=100, help="Videos in the slate."),
    run: Path = RUN,
    url: str | None = typer.Option(None, help="Address of the service; where the run is being served when absent."),
    device: str = typer.Option("phone", help="The viewer's device."),
    region: str | None = typer.Option(None, help="The viewer's region, where the profile has none."),
    as_json: bool = typer.Option(False, "--json", help="The answer as it came."),
) -> None:
    """Ask the running service for one viewer's slate.

    Examples:

      reelway recommend --run runs/demo --viewer 123

      reelway recommend --url http://127.0.0.1:8000 --viewer 123 --count 20 --json
    """
    address = url or _recorded_url(RunDirectory(run))
    body = {"viewer_id": viewer, "count": count, "context": {"device": device, "region": region}}
    try:
        answer = httpx.post(f"{address}/v1/recommend", json=body, timeout=30)
    except httpx.HTTPError as error:
        raise ServingError(f"no answer from {address}: {error}; start it with `reelway serve --run {run}`") from error
    if not answer.is_success:
        raise ServingError(f"{address} answered {answer.status_code}: {answer.text[:500]}")
    if as_json:
        typer.echo(answer.text)
        return
    _print_slate(answer.json())


@contextmanager
def only_server_of(run: RunDirectory) -> Iterator[None]:
    """Hold the run for one server at a time.

    Raises:
        ConfigError: another one serves it.
    """
    place = run.path / "serving"
    if not run.path.is_dir():
        raise ConfigError(f"{run.path} is not a run directory; make one with `reelway demo` or `reelway simulate`")
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = run.path / RECORD
            where = record.read_text().strip() if record.exists() else "it is starting"
            raise ConfigError(f"{run.path} is being served already ({where}); stop that one first") from None
        yield


def refuse_taken_port(host: str, port: int) -> int:
    """The port, if it can be listened on.

    Raises:
        ConfigError: it cannot.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, name another --port, or "
                "give --port 0 to have a free one chosen"
            ) from error
    return port


def free_port(host: str) -> int:
    """A port that nobody listens on just now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def _verified(run: RunDirectory, release: str) -> VerifiedRelease:
    from reelway.platform.cli.release import registered_services
    from reelway.platform.release.folder import read_manifest
    from reelway.platform.release.signing import load_public_keys
    from reelway.platform.release.store import ReleaseStore
    from reelway.platform.release.verify import verify

    store = ReleaseStore(str(run.release_store.absolute()))
    release_id = store.resolve(release)
    folder = store.fetch(release_id, (run.path / "serving" / "releases").absolute())
    services = registered_services(run.features, read_manifest(folder).feature_services, required=False)
    keys = load_public_keys(run.keys)
    verified = verify(folder, public_keys=keys, feature_services=services, expected_id=release_id)
    say(f"release {release_id[:12]} verified: {len(verified.checks)} checks passed")
    return verified


def _features(run: RunDirectory) -> Path | None:
    """The run's feature store. Without one everybody is served as unknown, which is said and counted."""
    from reelway.platform.features.store import open_feature_store

    try:
        open_feature_store(run.features)
    except FeatureError as error:
        say(f"[yellow]no viewer rows:[/] {escape(str(error))}")
        return None
    return run.features.absolute()


def _token_secrets(run: RunDirectory) -> tuple[bytes, ...]:
    """From the environment, else a secret of the run's own, made once and readable by its owner only."""
    if given := os.environ.get(SECRET_VARIABLE):
        return tuple(secret.encode() for secret in given.split(","))
    path = run.keys / "token.secret"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(secrets.token_hex(32))
    return (path.read_bytes().strip(),)


def _emptied(folder: Path) -> Path:
    """The folder without what an earlier start left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _warm_up(url: str) -> None:
    """First requests pay for what every process sets up late; ready means that a whole answer came."""
    deadline = time.monotonic() + 60
    whole = 0
    with httpx.Client(base_url=url, timeout=30) as client:
        while whole < WARM_UP:
            answer = client.post("/v1/recommend", json={"viewer_id": 0, "count": 1})
            stages_answer = answer.is_success and not set(answer.json()["degraded"]) - {"no_viewer_row"}
            whole += stages_answer
            if not stages_answer and time.monotonic() > deadline:
                raise ServingError(f"{url} gives no whole answer after 60 s; the last was {answer.text[:300]}")


@contextmanager
def _record(run: RunDirectory, record: dict[str, Any]) -> Iterator[None]:
    path = run.path / RECORD
    write_json(path, record)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _wait_for_the_end() -> None:
    while True:
        signal.pause()


def _recorded_url(run: RunDirectory) -> str:
    path = run.path / RECORD
    if not path.exists():
        raise ConfigError(f"{run.path} is not being served; start `reelway serve --run {run.path}`, or give --url")
    return str(json.loads(path.read_text())["url"])


def _print_slate(answer: dict[str, Any]) -> None:
    title = f"viewer {answer['viewer_id']}, release {answer['release'][:12]} ({answer['arm']})"
    table = Table(title=title, title_justify="left")
    for column in ("#", "video", "source", "why", "value"):
        table.add_column(column, justify="right" if column in ("#", "value") else "left")
    for video in answer["videos"]:
        name = escape(video["title"] or f"video {video['video_id']}")
        table.add_row(
            str(video["position"] + 1), name, video["source"], escape(video["reason"]), f"{video['score']:.3f}"
        )
    out.print(table)
    if answer["degraded"]:
        out.print(f"degraded: {', '.join(answer['degraded'])}", highlight=False)
