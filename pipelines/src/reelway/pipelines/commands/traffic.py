"""``reelway traffic``: simulated viewers who use the running service. It only wires ``simulation.live``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from reelway.platform.cli.terminal import console, say


def register(app: typer.Typer) -> None:
    """Add ``reelway traffic``."""
    app.command()(traffic)


def traffic(
    run: Path = typer.Option(Path("runs/default"), "--run", help="Run directory; its simulated viewers ask."),
    url: str | None = typer.Option(None, help="Address of the service; where the run is being served when absent."),
    rate: float = typer.Option(40.0, min=0.1, max=2_000, help="Slates asked for per second, at random moments."),
    seconds: float | None = typer.Option(None, min=0.1, help="How long; until Ctrl-C when absent."),
    viewers: int | None = typer.Option(None, min=1, help="So many viewers; all who have an account when absent."),
    count: int = typer.Option(10, min=1, max=100, help="Videos per slate."),
    timeout_s: float = typer.Option(10.0, "--timeout", min=0.1, help="Seconds after which a request has failed."),
    report: Path | None = typer.Option(None, help="JSON file, kept up to date every second."),
    seed: int = typer.Option(0, min=0, help="Of who asks when and what they do."),
) -> None:
    """Send live traffic: the run's simulated viewers ask for slates, watch, and send back what they did.

    The world of the data set goes on: same viewers, same tastes. A better release earns more watch time here, a
    broken one less. Requests leave when they are due, however slow the service is. Ctrl-C ends it in good order.

    The report has what failed, latency per arm, requests and viewers per release and arm, what was watched, outcomes,
    and how often a viewer was seen to change arm other than by a ramp or the end of a rollout (expected: never).

    \b
    Examples:
      reelway traffic --run runs/demo
      reelway traffic --run runs/demo --rate 80 --seconds 60 --report traffic.json
    """
    import json

    from reelway.platform.errors import ConfigError
    from reelway.platform.runs import RunDirectory

    directory = RunDirectory(run)
    info_path = directory.dataset / "dataset.json"
    record = directory.path / "serving.json"
    if not info_path.exists():
        raise ConfigError(f"{directory.path} has no data set; make one with `reelway simulate --run {run}`")
    if url is None and not record.exists():
        raise ConfigError(f"{run} is not being served; start `reelway serve --run {run}`, or give --url")
    address = url or str(json.loads(record.read_text())["url"])
    found = _send(json.loads(info_path.read_text()), address, rate, seconds, viewers, count, timeout_s, report, seed)
    _show(found)
    if report is not None:
        say(f"report: {report}")


def _send(
    info: dict[str, Any],
    url: str,
    rate: float,
    seconds: float | None,
    viewers: int | None,
    count: int,
    timeout_s: float,
    report: Path | None,
    seed: int,
) -> dict[str, Any]:
    import asyncio
    import signal
    import time

    from reelway.pipelines.simulation.live import LiveTraffic, TrafficOptions
    from reelway.pipelines.simulation.live_viewers import LiveViewers, world_of

    options = TrafficOptions(url, rate, seconds, count, timeout_s, seed=seed, report=report)
    crowd = LiveViewers(world_of(info), seed=seed, now_s=time.time(), count=viewers)
    say(f"{crowd.count} viewers, {rate:g} slates per second from {url}" + ("" if seconds else "; Ctrl-C ends it"))

    async def send() -> dict[str, Any]:
        with console.status("traffic") as status:
            live = LiveTraffic(options, crowd, lambda seen: status.update(_line(seen)))
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, live.stop)
            return await live.run()

    return asyncio.run(send())


def _line(seen: dict[str, Any]) -> str:
    arms = ", ".join(
        f"{one['arm']} {one['release'][:12]} {one['requests']}" for one in seen["releases"] if one["requests"]
    )
    return (
        f"traffic: {seen['elapsed_s']:.0f} s, {seen['requests']} requests, {seen['failed']} failed, "
        f"{seen['outcomes']['sent']} outcomes; {arms}"
    )


def _show(seen: dict[str, Any]) -> None:
    from rich.table import Table

    from reelway.platform.cli.terminal import out

    table = Table(title="what viewers saw", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("release", "arm", "asked", "viewers", "p50 ms", "p95", "p99", "degraded", "long", "watch s"):
        table.add_column(column, justify="left" if column in ("release", "arm") else "right", no_wrap=True)
    for one in seen["releases"]:
        latency = [_number(one["latency_ms"][name], ".1f") for name in ("p50", "p95", "p99")]
        table.add_row(
            one["release"][:12], one["arm"], str(one["requests"]), str(one["viewers"]), *latency,
            str(sum(one["degraded"].values())), _number(one["long_watch_rate"], ".1%"),
            _number(one["watch_s_per_impression"], ".2f"),
        )  # fmt: skip
    out.print(table)
    out.print(
        f"{seen['requests']} requests in {seen['elapsed_s']:.1f} s, {seen['failed']} failed; "
        f"{seen['outcomes']['sent']} outcomes; {seen['arm_changes']} changes of arm out of order; "
        f"{seen['cpu_ms_per_request']:.2f} ms of CPU per request here",
        highlight=False,
    )
    for example in [*seen["failures"], *seen["arm_change_examples"]]:
        say(f"  {example}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
