"""``reelway traffic``: sends requests of simulated viewers to a running service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from reelway.platform.cli.terminal import print_status, stderr_console

if TYPE_CHECKING:
    from reelway.pipelines.simulation.live_traffic import TrafficOptions
    from reelway.platform.viewer_assertions import ViewerTokenSigner


def register(app: typer.Typer) -> None:
    """Adds ``reelway traffic``."""
    app.command()(traffic)


def traffic(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory with simulated viewers."),
    url: str | None = typer.Option(
        None, help="URL of the service. Defaults to the service that serves the run directory."
    ),
    internal_url: str | None = typer.Option(
        None,
        help="URL of the service's internal API, which names the canaries. Without it, and with --url, arm changes "
        "are not counted.",
    ),
    rate: float = typer.Option(40.0, min=0.1, max=2_000, help="Mean requests per second; arrival times are random."),
    seconds: float | None = typer.Option(
        None, min=0.1, help="Duration of the traffic in seconds. By default it runs until Ctrl-C."
    ),
    viewers: int | None = typer.Option(
        None, min=1, help="Number of simulated viewers. Defaults to all viewers with an account."
    ),
    count: int = typer.Option(10, min=1, max=100, help="Number of videos per slate."),
    timeout_s: float = typer.Option(10.0, "--timeout", min=0.1, help="Request timeout in seconds."),
    report: Path | None = typer.Option(
        None, help="JSON file to which the report is written every second. By default no file."
    ),
    seed: int = typer.Option(0, min=0, help="Random seed for arrival times and viewer behaviour."),
    viewer_key: Path | None = typer.Option(
        None,
        help="Private key that signs a token for each viewer, for a service that demands one; see "
        "`reelway viewer-key`. Requires --audience.",
    ),
    audience: str | None = typer.Option(None, help="Audience of these tokens: jwt.audience of the service."),
    issuer: str | None = typer.Option(None, help="Issuer of these tokens: jwt.issuer of the service. By default none."),
) -> None:
    """Send live traffic: the run's simulated viewers request slates, watch videos and report outcomes.

    Viewers and tastes are those of the simulated data set. A better release earns more watch time, a broken one less.
    Requests are sent on schedule, even if the service is slow. Ctrl-C finishes the requests in flight and exits.

    The report contains failures, latency per arm, requests and viewers per release and arm, watch time, outcomes and
    the number of arm changes that no ramp and no end of a rollout explains (expected: 0).

    \b
    Examples:
      reelway traffic --run runs/demo
      reelway traffic --run runs/demo --rate 80 --seconds 60 --report traffic.json
    """
    import json

    from reelway.pipelines.simulation.live_traffic import TrafficOptions
    from reelway.platform.errors import ConfigError, ServingError
    from reelway.platform.run_directory import RunDirectory

    directory = RunDirectory(run)
    info_path = directory.dataset / "dataset.json"
    record = directory.path / "serving.json"
    if not info_path.exists():
        raise ConfigError(f"{directory.path} has no data set; create one with `reelway simulate --run {run}`")
    if url is None and not record.exists():
        raise ConfigError(f"{run} is not being served; run `reelway serve --run {run}`, or pass --url")
    if url is None:
        served = json.loads(record.read_text())
        url, internal_url = str(served["url"]), internal_url or str(served["internal_url"])
    signer = _signer(viewer_key, audience, issuer)
    options = TrafficOptions(url, internal_url, rate, seconds, count, timeout_s, seed=seed, report=report)
    traffic_report = _run_traffic(directory.dataset, options, viewers, signer)
    _show(traffic_report)
    if report is not None:
        print_status(f"report: {report}")
    if traffic_report["requests"] and traffic_report["failed"] == traffic_report["requests"]:
        proof = "" if signer else "; if the service demands a proof of identity, pass --viewer-key and --audience"
        raise ServingError(f"{url}: no request was answered with a slate: {traffic_report['failures'][:1]}{proof}")


def _signer(key: Path | None, audience: str | None, issuer: str | None) -> ViewerTokenSigner | None:
    from reelway.platform.errors import ConfigError
    from reelway.platform.viewer_assertions import ViewerTokenSigner, read_viewer_key

    if key is None:
        return None
    if audience is None:
        raise ConfigError("--viewer-key without --audience; pass the service's jwt.audience")
    return ViewerTokenSigner(read_viewer_key(key), audience=audience, issuer=issuer)


def _run_traffic(
    dataset: Path, options: TrafficOptions, viewers: int | None, signer: ViewerTokenSigner | None
) -> dict[str, Any]:
    import asyncio
    import json
    import time

    from reelway.pipelines.simulation.live_traffic import LiveTraffic
    from reelway.pipelines.simulation.live_viewers import LiveViewers, load_history, load_world
    from reelway.platform.stop_signals import call_on_stop_signals

    world = load_world(json.loads((dataset / "dataset.json").read_text()))
    history = load_history(world, dataset / "outcomes.parquet")
    crowd = LiveViewers(world, seed=options.seed, now_s=time.time(), count=viewers, history=history)
    print_status(
        f"{crowd.count} viewers, {options.rate:g} requests per second to {options.url}"
        + ("" if options.seconds else "; stop with Ctrl-C")
    )

    async def send() -> dict[str, Any]:
        with stderr_console.status("traffic") as status:
            live = LiveTraffic(options, crowd, lambda report: status.update(_progress_line(report)), signer=signer)
            call_on_stop_signals(asyncio.get_running_loop(), live.stop)
            return await live.run()

    return asyncio.run(send())


def _progress_line(report: dict[str, Any]) -> str:
    arms = ", ".join(
        f"{entry['arm']} {entry['release'][:12]} {entry['requests']}"
        for entry in report["releases"]
        if entry["requests"]
    )
    return (
        f"traffic: {report['elapsed_s']:.0f} s, {report['requests']} requests, {report['failed']} failed, "
        f"{report['outcomes']['sent']} outcomes; {arms}"
    )


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from reelway.platform.cli.terminal import stdout_console

    table = Table(title="traffic per release and arm", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("release", "arm", "requests", "viewers", "p50 ms", "p95", "p99", "degraded", "long", "watch s"):
        table.add_column(column, justify="left" if column in ("release", "arm") else "right", no_wrap=True)
    for entry in report["releases"]:
        latency = [_number(entry["latency_ms"][name], ".1f") for name in ("p50", "p95", "p99")]
        table.add_row(
            entry["release"][:12], entry["arm"], str(entry["requests"]), str(entry["viewers"]), *latency,
            str(sum(entry["degraded"].values())), _number(entry["long_watch_rate"], ".1%"),
            _number(entry["watch_s_per_impression"], ".2f"),
        )  # fmt: skip
    stdout_console.print(table)
    stdout_console.print(
        f"{report['requests']} requests in {report['elapsed_s']:.1f} s, {report['failed']} failed; "
        f"{report['outcomes']['sent']} outcomes; {report['arm_changes']} unexpected arm changes; "
        f"{report['cpu_ms_per_request']:.2f} ms of client CPU per request",
        highlight=False,
    )
    for example in [*report["failures"], *report["arm_change_examples"]]:
        print_status(f"  {example}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
