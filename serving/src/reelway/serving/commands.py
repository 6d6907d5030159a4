"""``reelway serve`` and ``reelway recommend``: a run's release behind HTTP, and a slate in readable form.

Whatever ``serve`` starts it ends: Ray, Serve, every replica and the rollout controller go with it, however it is
stopped. It refuses a release that ``verify`` refuses, a port that is taken, and a run that is being served already.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import typer
from rich.markup import escape
from rich.table import Table

from reelway.platform.cli.processes import child, reelway_command
from reelway.platform.cli.terminal import console, out, say
from reelway.platform.durable import write_json
from reelway.platform.errors import ConfigError, FeatureError, ServingError
from reelway.platform.rollout.traffic.serving_options import Composition
from reelway.platform.runs import RunDirectory
from reelway.serving.free_ports import free_port, refuse_taken_port

if TYPE_CHECKING:
    from reelway.platform.release.verify import VerifiedRelease

LIVE: Final = "live"
WARM_UP: Final = 20
RECORD: Final = "serving.json"
RAY_TOKEN: Final = "ray.token"
"""Below the run's keys: who has it may say what runs."""
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
        LIVE,
        help="Id of a release in the run's store, the unique beginning of one, 'latest', or 'live': what the last "
        "rollout left live, the latest where there was none.",
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 chooses a free one."),
    composition: Composition = typer.Option(
        "staged",
        help="Where the stages run: 'staged' each in processes of its own, 'fused' in the routers', without hops; give "
        "it a router for each core.",
    ),
    router_replicas: int = typer.Option(1, min=1, help="Processes that take HTTP."),
    retrieval_replicas: int = typer.Option(1, min=1, help="Processes of the retrieval stage."),
    ranking_replicas: int = typer.Option(1, min=1, help="Processes of the ranking stage."),
    reranking_replicas: int = typer.Option(1, min=1, help="Processes of the re-ranking stage."),
    at_once: int = typer.Option(
        64, min=1, help="Requests that one router has under way at a release; more are answered 429."
    ),
    standing: int | None = typer.Option(
        None,
        min=1,
        help="The same where its queue has not been empty for half a second: what stands there is what everybody "
        "waits. As many as --at-once when absent.",
    ),
    parity_ratio: float = typer.Option(0.01, min=0.0, max=1.0, help="Share of requests logged for the parity replay."),
    controller: bool = typer.Option(True, help="Also start the rollout controller; its log is rollout/controller.log."),
) -> None:
    """Serve a run's release over HTTP until Ctrl-C: retrieval, ranking and re-ranking behind a router, on Ray Serve.

    When it answers, its address is printed and written to serving.json in the run directory, with the address of
    Serve's REST API, where the rollout controller changes what runs.

    Examples:

      reelway serve --run runs/demo

      reelway serve --run runs/demo --release 3f9c --port 0 --ranking-replicas 2 --no-controller

      reelway serve --run runs/demo --composition fused --router-replicas 2
    """
    directory = RunDirectory(run)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background ignores it
    with only_server_of(directory):
        verified = _verified(directory, release)
        if standing and standing > at_once:
            raise ConfigError(f"--standing {standing}: expected at most --at-once, which is {at_once}")
        port = free_port(host) if port == 0 else refuse_taken_port(host, port)
        from reelway.platform.rollout.traffic.routing import Routing
        from reelway.platform.rollout.traffic.serving_options import Deployments, ReleaseStoreArgs, ServingOptions
        from reelway.serving.deployments.service import running_service

        place = directory.path / "serving"
        options = ServingOptions(
            releases=ReleaseStoreArgs(
                release_store=str(directory.release_store),
                release_cache=place / "releases",
                public_keys=directory.keys,
                overlay=str(directory.overlay),
            ),
            metrics_dir=_emptied(place / "metrics"),
            token_secrets=_token_secrets(directory),
            features_dir=_features(directory),
            vector_log=place / "vectors.jsonl",
            parity_ratio=parity_ratio,
            outcomes=place / "outcomes.db",
            event_log=str(directory.event_log),
            host=host,
            port=port,
            deployments=Deployments.with_replicas(
                router=router_replicas,
                retrieval=retrieval_replicas,
                ranking=ranking_replicas,
                reranking=reranking_replicas,
            ),
            composition=composition,
            max_ongoing_requests=at_once,
            max_ongoing_sustained=standing,
        )
        release_id = verified.manifest.release_id
        with ExitStack() as stack:
            with console.status("starting Ray and the stages"):
                routing = Routing.whole(release_id)
                service = stack.enter_context(running_service(routing, options, directory.keys / RAY_TOKEN))
                _warm_up(service.url)
            record = {"url": service.url, "pid": os.getpid(), "release": release_id, "serve_api": service.serve_api}
            stack.enter_context(_record(directory, record))
            if controller:
                stack.enter_context(_controller(directory))
            out.print(f"serving release {release_id[:12]} at {service.url}", highlight=False)
            say(f"Ctrl-C stops it. Try: reelway recommend --url {service.url} --viewer 1")
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


def _verified(run: RunDirectory, release: str) -> VerifiedRelease:
    from reelway.platform.cli.release import fetch_verified
    from reelway.platform.release.store import LATEST

    return fetch_verified(run, _live(run) or LATEST if release == LIVE else release)


def _features(run: RunDirectory) -> Path | None:
    """The run's feature store. Without one everybody is served as unknown, which is said and counted."""
    from reelway.platform.features.store import open_feature_store

    try:
        open_feature_store(run.features)
    except FeatureError as error:
        say(f"[yellow]no viewer rows:[/] {escape(str(error))}")
        return None
    return run.features.absolute()


def _live(run: RunDirectory) -> str | None:
    """The release that the last rollout left live, where there was one."""
    from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore

    path = run.path / "rollout" / "state.db"
    if not path.exists():
        return None
    last = SqliteRolloutStore(path).latest()
    return last.state.live_release if last else None


def _token_secrets(run: RunDirectory) -> Path:
    """The file of the run's own secret, made once and readable by its owner only; the environment goes before it."""
    path = run.keys / "token.secret"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(secrets.token_hex(32))
    return path


@contextmanager
def _controller(run: RunDirectory) -> Iterator[None]:
    """The rollout controller of this run, ended with the service."""
    log = run.path / "rollout" / "controller.log"
    log.parent.mkdir(exist_ok=True)
    with child(reelway_command("rollout", "controller", "--run", str(run.path)), log=log):
        yield


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
