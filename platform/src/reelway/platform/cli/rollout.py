"""``reelway rollout``: for an on-call engineer at three in the morning, and for scripts.

Commands write to the run's store of rollouts and the controller moves the traffic; nothing here touches the service.
Exit codes are in ``rollout_wait``.
"""

from __future__ import annotations

from pathlib import Path

import typer

from reelway.platform.cli.rollout_policy import policy_group
from reelway.platform.cli.rollout_run import open_run

GROUP_HELP = "Roll a release out as a canary, watch it, and take it back."
EXIT_CODES = (
    "Exit codes: 0 promoted or done as asked, 2 usage, 6 release refused, 9 refused, 10 rolled back, "
    "11 still under way (at --timeout), 12 paused, 130 Ctrl-C."
)
RUN = typer.Option(Path("runs/default"), "--run", help="Run directory.")


def register(app: typer.Typer) -> None:
    """Add ``reelway rollout ...``."""
    group = typer.Typer(no_args_is_help=True, epilog=EXIT_CODES)
    app.add_typer(group, name="rollout", help=GROUP_HELP)
    group.command("controller")(controller)
    group.add_typer(policy_group(), name="policy", help="Look at policies and check them.")


def controller(
    run: Path = RUN,
    host: str = typer.Option("127.0.0.1", help="Address of the alert webhook; 0.0.0.0 for all."),
    port: int = typer.Option(0, min=0, max=65535, help="Port of the alert webhook; 0 chooses a free one."),
    interval: float = typer.Option(2.0, min=0.1, help="Seconds between two looks; commands are noticed sooner."),
    prometheus: str | None = typer.Option(None, help="Prometheus' URL; the service is scraped directly without it."),
    alertmanager: str | None = typer.Option(None, help="Alertmanager's URL, to be polled besides its webhook."),
) -> None:
    """Look after the run's rollouts until Ctrl-C: evidence, decision, record, traffic, over and over.

    Killed at any moment and started again, it goes on from what was recorded. `reelway serve` starts one by itself.

    Examples:

      reelway rollout controller --run runs/demo

      reelway rollout controller --run runs/demo --prometheus http://localhost:9090 --port 9095
    """
    directory = open_run(run)
    from reelway.platform.rollout.controller_service import (  # type: ignore[import-untyped,import-not-found]
        ControllerSettings,
        run_controller,
    )

    settings = ControllerSettings(
        run=directory.path, host=host, port=port, interval_s=interval, prometheus_url=prometheus,
        alertmanager_url=alertmanager,
    )  # fmt: skip
    run_controller(settings)
