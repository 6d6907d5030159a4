"""Measures the time from a fault to the rollback through Prometheus and Alertmanager, with the chart's intervals.

On a real installation under load, ten releases with a failing ranker are rolled out sequentially. In ten runs the
controller's guardrails are off, so that only the alert can roll back. Further runs have them on and state which of the
two came first. Each hop is timed by the clock of the component that takes it (see ``tests.support.e2e.alert_latency``).

    python -m tests.benchmarks.bench_alerts [--runs 10] [--with-evidence 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from tests.support.bench_results import Row, write_report
from tests.support.e2e.alert_latency import Rollback, measure_rollback
from tests.support.e2e.clusters import find_cluster
from tests.support.e2e.monitored_installation import (
    BAR_S,
    BY_EVIDENCE,
    ONLY_ALERTS,
    RATE,
    SHARE_PERCENT,
    MonitoredInstallation,
    monitored,
)
from tests.support.e2e.rollouts import begin, wait_until_phase

from reelway.platform.cli.terminal import print_status


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_alerts", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="rollbacks by alert (%(default)s)")
    parser.add_argument(
        "--with-evidence", type=int, default=3, help="rollbacks with the default guardrails (%(default)s)"
    )
    options = parser.parse_args()
    cluster = find_cluster()
    if cluster is None:
        raise SystemExit("no cluster: start one with `make cluster`, or set KUBECONFIG and REELWAY_CLUSTER_TESTS=1")
    with ExitStack() as stack:
        service = stack.enter_context(monitored(cluster, errors=options.runs + options.with_evidence, slow=0))
        service.monitoring.wait_until_scraped(service.kubectl.namespace)
        alone = [_run(service, number, by_alert=True) for number in range(options.runs)]
        both = [_run(service, options.runs + number, by_alert=False) for number in range(options.with_evidence)]
    cluster.wait_until_deleted()
    write_report("alerts", [*_rows("alert only", alone), *_rows("alert and evidence", both)])


def _run(service: MonitoredInstallation, number: int, *, by_alert: bool) -> Rollback:
    """Rolls out one failing release and measures it from its first to its last request."""
    release, name, began = service.releases.errors[number], f"fault-{number}", service.load.now()
    begin(service.kubectl, name, release, ONLY_ALERTS if by_alert else BY_EVIDENCE)
    wait_until_phase(service.kubectl, name, "RolledBack", within_s=300)
    rollback = measure_rollback(service.kubectl, service.load, service.monitoring, name, release, since=began)
    shares = ", ".join(f"{hop} {taken:.2f}" for hop, taken in rollback.hops.items())
    cause = "alert" if rollback.by_alert else "evidence"
    print_status(f"{name}: {rollback.total_s:.1f} s ({shares}) by {cause}: {rollback.reason}")
    if by_alert and not rollback.by_alert:
        raise RuntimeError(f"{name}: expected a rollback by the alert, rolled back by: {rollback.reason}")
    return rollback


def _rows(variant: str, rollbacks: Sequence[Rollback]) -> list[Row]:
    if not rollbacks:
        return []
    totals = [each.total_s for each in rollbacks]
    load = f"{RATE:g} requests/s, {SHARE_PERCENT} % to the canary"
    rows = [
        Row(
            f"{variant}: fault to all new requests on stable, median of {len(rollbacks)}",
            statistics.median(totals),
            "s",
            load,
        ),
        Row(
            f"{variant}: fault to all new requests on stable, longest",
            max(totals),
            "s",
            f"under {BAR_S:g}",
            max(totals) < BAR_S,
        ),
        Row(f"{variant}: runs rolled back by the alert", sum(each.by_alert for each in rollbacks), "runs"),
    ]
    for hop in dict.fromkeys(hop for each in rollbacks for hop in each.hops):
        taken = [each.hops[hop] for each in rollbacks if hop in each.hops]
        rows.append(Row(f"{variant}: share of {hop}, median", statistics.median(taken), "s"))
    return rows


if __name__ == "__main__":
    main()
