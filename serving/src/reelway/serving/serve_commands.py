"""``reelway serve`` serves a run's release over HTTP; ``reelway recommend`` prints one viewer's slate.

However ``serve`` is stopped, it also stops Ray, Serve, every replica and the local controller within ``STOP_LIMIT_S``.
It does not start if ``verify`` rejects the release, if the port is in use, or if the run is being served already.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import typer
from rich.markup import escape
from rich.table import Table

from reelway.platform.atomic_files import ensure_private_token, write_json
from reelway.platform.cli.processes import ChildProcesses, reelway_command
from reelway.platform.cli.supervisor import command_pid, supervise
from reelway.platform.cli.terminal import print_status, stderr_console, stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ConfigError, FeatureError, ServingError
from reelway.platform.rollout.traffic.serving_options import Composition
from reelway.platform.run_directory import RunDirectory
from reelway.serving.free_ports import check_port_free, find_free_port
from reelway.serving.serve_settings import serve_host

if TYPE_CHECKING:
    from reelway.platform.release.verify import VerifiedRelease

LIVE_RELEASE: Final = "live"
WARM_UP_REQUESTS: Final = 20
STOP_LIMIT_S: Final = 12.0
"""Seconds from a stop signal until what has not ended is killed. A caller that stops this command waits longer."""
BACKGROUND_STOP_LIMIT_S: Final = 1.0
"""Seconds for the controller and the streams after Ray has stopped; they are told to stop before Serve is."""
SERVING_RECORD: Final = "serving.json"
RAY_TOKEN: Final = "ray.token"
"""Token file in the run's key folder. A client with the token can change what Ray Serve runs."""
RUN = typer.Option(Path("runs/default"), "--run", help="Run directory of the service.")


def register_serve(app: typer.Typer) -> None:
    """Adds ``reelway serve``."""
    app.command()(serve)


def register_recommend(app: typer.Typer) -> None:
    """Adds ``reelway recommend``."""
    app.command()(recommend)


def serve(
    run: Path = RUN,
    release: str = typer.Option(
        LIVE_RELEASE,
        help="Release id or a unique prefix of one, 'latest', or 'live': the release that the last rollout left live, "
        "or the latest if there was no rollout.",
    ),
    host: str = typer.Option("127.0.0.1", help="IP address to listen on; * listens on all interfaces."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0 chooses a free port."),
    internal_port: int = typer.Option(
        0,
        min=0,
        max=65535,
        help="Port of the internal API on 127.0.0.1: metrics, current releases and the schema; 0 chooses a free port.",
    ),
    auth: Path | None = typer.Option(
        None,
        help="YAML file with the proof of identity that viewers send, and with request rates. By default any client "
        "may ask for any viewer.",
    ),
    composition: Composition = typer.Option(
        "staged",
        help="Where the stages run: 'staged' in processes of their own, 'fused' in the router processes, without calls "
        "between processes. Start one router per core with 'fused'.",
    ),
    router_replicas: int = typer.Option(1, min=1, help="Number of router processes, which receive the HTTP requests."),
    retrieval_replicas: int = typer.Option(1, min=1, help="Number of processes of the retrieval stage."),
    ranking_replicas: int = typer.Option(1, min=1, help="Number of processes of the ranking stage."),
    reranking_replicas: int = typer.Option(1, min=1, help="Number of processes of the re-ranking stage."),
    max_ongoing_requests: int = typer.Option(
        64, min=1, help="Limit of requests in flight at one release per router; further requests are rejected with 429."
    ),
    max_ongoing_sustained: int | None = typer.Option(
        None,
        min=1,
        help="Limit of requests in flight once the queue has not been empty for half a second: a standing queue delays "
        "every later request. By default equal to --max-ongoing-requests.",
    ),
    parity_sample_ratio: float = typer.Option(
        0.01, min=0.0, max=1.0, help="Share of requests, from 0 to 1, that is logged for the parity replay."
    ),
    controller: bool = typer.Option(
        True, help="Also start the local rollout controller, which logs to rollout/controller.log."
    ),
    live: bool = typer.Option(
        True,
        help="Also start the feature stream and the writer of uploads and lists, which log to stream/*.log. Without "
        "them, features, lists and videos stay as in the release; shown videos and takedowns still count.",
    ),
) -> None:
    """Serve a run's release over HTTP until Ctrl-C: retrieval, ranking and re-ranking behind a router, on Ray Serve.

    Once the service answers, its address is printed and written to serving.json in the run directory. The file also
    has the addresses of the internal API, which clients cannot reach through the service's port, and of Serve's REST
    API, through which the rollout controller changes what runs.

    Examples:

      reelway serve --run runs/demo

      reelway serve --run runs/demo --release 3f9c --port 0 --ranking-replicas 2 --no-controller

      reelway serve --run runs/demo --composition fused --router-replicas 2

      reelway serve --run runs/demo --auth auth.yaml
    """
    directory = RunDirectory(run)
    supervise(STOP_LIMIT_S)
    with exclusive_serving_lock(directory):
        verified = _verified(directory, release)
        if max_ongoing_sustained and max_ongoing_sustained > max_ongoing_requests:
            raise ConfigError(
                f"--max-ongoing-sustained {max_ongoing_sustained}: larger than --max-ongoing-requests "
                f"{max_ongoing_requests}; lower it"
            )
        host = serve_host(host)
        port = find_free_port(host) if port == 0 else check_port_free(host, port)
        from reelway.platform.rollout.traffic.routing import Routing
        from reelway.platform.rollout.traffic.serving_options import Deployments, ReleaseStoreArgs, ServingOptions
        from reelway.serving.access import InternalCredential, describe_access
        from reelway.serving.access.access_file import read_access
        from reelway.serving.deployments.local_serve import running_service
        from reelway.serving.token_secrets import read_token_secrets

        serving_dir = directory.path / "serving"
        options = ServingOptions(
            releases=ReleaseStoreArgs(
                release_store=str(directory.release_store),
                release_cache=serving_dir / "releases",
                public_keys=directory.keys,
                overlay=str(directory.overlay),
            ),
            metrics_dir=_empty_directory(serving_dir / "metrics"),
            token_secrets=_token_secrets(directory),
            features_dir=_features_dir(directory),
            vector_log=str(serving_dir / "vectors.jsonl"),
            parity_ratio=parity_sample_ratio,
            outcomes=serving_dir / "outcomes.db",
            events=str(directory.events),
            host=host,
            port=port,
            deployments=Deployments.with_replicas(
                router=router_replicas,
                retrieval=retrieval_replicas,
                ranking=ranking_replicas,
                reranking=reranking_replicas,
            ),
            composition=composition,
            max_ongoing_requests=max_ongoing_requests,
            max_ongoing_sustained=max_ongoing_sustained,
            access=read_access(auth),
        )
        credential = InternalCredential(read_token_secrets(options.token_secrets))
        release_id = verified.manifest.release_id
        with ChildProcesses(BACKGROUND_STOP_LIMIT_S) as background, ExitStack() as stack:
            with stderr_console.status("starting Ray and the stages"):
                routing = Routing.single_release(release_id)
                token = directory.keys / RAY_TOKEN
                service = stack.enter_context(running_service(routing, options, token, internal_port=internal_port))
                _warm_up(service.url, credential.headers)
            record = {
                "url": service.url,
                "internal_url": service.internal_url,
                "pid": command_pid(),
                "release": release_id,
                "serve_api": service.serve_api,
            }
            stack.enter_context(_record(directory, record))
            stack.callback(background.interrupt)  # they stop while Serve does
            if controller:
                _start_in_background(background, directory, "rollout", "controller")
            if live:
                _start_in_background(background, directory, "stream", "overlay")
            if live and options.features_dir:
                _start_in_background(background, directory, "stream")
            stdout_console.print(f"serving release {short_id(release_id)} at {service.url}", highlight=False)
            print_status(f"internal API at {service.internal_url}; {describe_access(options.access)}")
            print_status(f"Press Ctrl-C to stop. {_trial(service.url, options.access.mode)}")
            _wait_for_interrupt()


def recommend(
    viewer: int = typer.Option(..., min=0, help="Viewer id; an unknown viewer gets the slate of a new viewer."),
    count: int = typer.Option(10, min=1, max=100, help="Number of videos in the slate."),
    run: Path = RUN,
    url: str | None = typer.Option(
        None, help="URL of the service. Defaults to the service that serves the run directory."
    ),
    device: str = typer.Option("phone", help="Device of the viewer."),
    region: str | None = typer.Option(None, help="Region of the viewer, used if the viewer's profile has no region."),
    token_file: Path | None = typer.Option(
        None, help="File with the viewer's JSON Web Token, for a service that demands one; see `reelway viewer-token`."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the service's JSON response instead of a table."),
) -> None:
    """Request one viewer's slate from the running service.

    Examples:

      reelway recommend --run runs/demo --viewer 123

      reelway recommend --url http://127.0.0.1:8000 --viewer 123 --count 20 --json
    """
    address = url or _recorded_url(RunDirectory(run))
    body = {"viewer_id": viewer, "count": count, "context": {"device": device, "region": region}}
    try:
        answer = httpx.post(f"{address}/v1/recommend", json=body, headers=_bearer(token_file), timeout=30)
    except httpx.HTTPError as error:
        advice = "check the address given with --url" if url else f"start the service with `reelway serve --run {run}`"
        raise ServingError(f"{address}: no answer: {error}; {advice}") from error
    if not answer.is_success:
        raise ServingError(
            f"{address}: answered {answer.status_code}: {answer.text[:500]}{_advice(answer.status_code)}"
        )
    if as_json:
        typer.echo(answer.text)
        return
    _print_slate(answer.json())


@contextmanager
def exclusive_serving_lock(run: RunDirectory) -> Iterator[None]:
    """Locks the run directory, so that only one process serves the run.

    Raises:
        ConfigError: if the run directory does not exist, or another process serves the run.
    """
    serving_dir = run.path / "serving"
    if not run.path.is_dir():
        raise ConfigError(f"{run.path}: not a run directory; create one with `reelway demo` or `reelway simulate`")
    serving_dir.mkdir(exist_ok=True)
    with (serving_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            record = run.path / SERVING_RECORD
            server = record.read_text().strip() if record.exists() else "starting"
            raise ConfigError(f"{run.path}: is being served already ({server}); stop that process first") from None
        yield


def _verified(run: RunDirectory, release: str) -> VerifiedRelease:
    from reelway.platform.cli.release_commands import fetch_verified
    from reelway.platform.release.store import LATEST

    return fetch_verified(run, _live_release(run) or LATEST if release == LIVE_RELEASE else release)


def _features_dir(run: RunDirectory) -> Path | None:
    """Returns the folder of the run's feature store, or None if the run has none.

    Without a feature store all viewers are unknown. That is printed here and counted by the router.
    """
    from reelway.platform.features.feast_store import open_feature_store

    try:
        open_feature_store(run.features)
    except FeatureError as error:
        print_status(f"[yellow]no viewer rows:[/] {escape(str(error))}")
        return None
    return run.features.absolute()


def _live_release(run: RunDirectory) -> str | None:
    """Returns the release that the last rollout left live, or None if there was no rollout."""
    from reelway.platform.rollout.control.sqlite_store import SqliteRolloutStore

    path = run.path / "rollout" / "state.db"
    if not path.exists():
        return None
    last = SqliteRolloutStore(path).latest()
    return last.state.live_release if last else None


def _token_secrets(run: RunDirectory) -> Path:
    """Returns the file of the run's token secret, created on first use and readable by its owner only.

    The environment variable ``REELWAY_TOKEN_SECRET`` takes precedence over the file.
    """
    path = run.keys / "token.secret"
    ensure_private_token(path)
    return path


def _start_in_background(children: ChildProcesses, run: RunDirectory, *command: str) -> None:
    """Starts a `reelway` command of this run with a log of its own in the run directory."""
    log = run.path / command[0] / f"{command[-1]}.log"
    log.parent.mkdir(exist_ok=True)
    children.start(reelway_command(*command, "--run", str(run.path)), log)


def _empty_directory(folder: Path) -> Path:
    """Returns the folder, emptied of the files of an earlier start."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _warm_up(url: str, headers: Mapping[str, str]) -> None:
    """Sends requests until ``WARM_UP_REQUESTS`` responses came from the stages and not from fallbacks.

    The first requests include the deferred initialisation of every process.
    """
    deadline = time.monotonic() + 60
    answered = 0
    with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
        while answered < WARM_UP_REQUESTS:
            answer = client.post("/v1/recommend", json={"viewer_id": 0, "count": 1})
            stages_answer = answer.is_success and not set(answer.json()["degraded"]) - {"no_viewer_row"}
            answered += stages_answer
            if not stages_answer and time.monotonic() > deadline:
                raise ServingError(
                    f"{url}: the stages do not answer after 60 s; the last response was {answer.text[:300]}"
                )


@contextmanager
def _record(run: RunDirectory, record: dict[str, Any]) -> Iterator[None]:
    path = run.path / SERVING_RECORD
    write_json(path, record)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _wait_for_interrupt() -> None:
    while True:
        signal.pause()


def _recorded_url(run: RunDirectory) -> str:
    path = run.path / SERVING_RECORD
    if not path.exists():
        raise ConfigError(f"{run.path}: not being served; start `reelway serve --run {run.path}` or pass --url")
    return str(json.loads(path.read_text())["url"])


def _trial(url: str, mode: str) -> str:
    """Returns how to try the service that was started."""
    if mode == "gateway":
        return "Requests need the header Reelway-Viewer, which your gateway signs."
    token = " --token-file FILE" if mode == "jwt" else ""
    return f"Try: reelway recommend --url {url} --viewer 1{token}"


def _advice(status: int) -> str:
    """Returns what to do about a refused request."""
    if status == 401:
        return "; pass --token-file FILE, which `reelway viewer-token` writes, or ask through the application's gateway"
    return "; pass the token of this viewer" if status == 403 else ""


def _bearer(token_file: Path | None) -> dict[str, str]:
    """Returns the header with the token in the file; none without a file."""
    if token_file is None:
        return {}
    try:
        token = token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{token_file}: cannot read the token: {error}; pass another --token-file") from error
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", token):  # never shown: it may be a private key
        raise ConfigError(f"{token_file}: expected one JSON Web Token; write one with `reelway viewer-token`")
    return {"Authorization": f"Bearer {token}"}


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
    stdout_console.print(table)
    if answer["degraded"]:
        stdout_console.print(f"degraded: {', '.join(answer['degraded'])}", highlight=False)
