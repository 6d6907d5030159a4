"""Fault injected -> all new requests on stable, through Prometheus and Alertmanager with the chart's own intervals.

On a real installation under load, ten releases whose ranker fails are rolled out, one after another. The controller's
own guardrails are off in ten runs, so that the alert is what acts; some more have them on, and say which was earlier.
Each hop is told by the clock of who made it (tests/e2e/alert_hops.py).

    python -m tests.benchmarks.bench_alerts [--runs 10] [--with-evidence 3]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from tests.e2e.alert_hops import Rollback, rollback_of
from tests.e2e.clusters import chosen
from tests.e2e.monitored import BAR_S, BY_EVIDENCE, ONLY_ALERTS, RATE, SHARE_PERCENT, Monitored, monitored
from tests.e2e.rollouts import begin, until_phase
from tests.support.bench_results import Row, write_report

from reelway.platform.cli.terminal import say


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_alerts", description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="rollbacks by alert (%(default)s)")
    parser.add_argument("--with-evidence", type=int, default=3, help="with the default guardrails (%(default)s)")
    options = parser.parse_args()
    cluster = chosen()
    if cluster is None:
        raise SystemExit("no cluster: bring one up with `make cluster`, or set KUBECONFIG and REELWAY_CLUSTER_TESTS=1")
    with ExitStack() as stack:
        service = stack.enter_context(monitored(cluster, errors=options.runs + options.with_evidence, slow=0))
        service.monitoring.until_scraped(service.kubectl.namespace)
        alone = [_run(service, number, by_alert=True) for number in range(options.runs)]
        both = [_run(service, options.runs + number, by_alert=False) for number in range(options.with_evidence)]
    cluster.until_left()
    write_report("alerts", [*_rows("alert alone", alone), *_rows("alert and evidence", both)])


def _run(service: Monitored, number: int, *, by_alert: bool) -> Rollback:
    """One release that fails, from its first request to the last."""
    release, name, began = service.releases.errors[number], f"fault-{number}", service.load.now()
    begin(service.kubectl, name, release, ONLY_ALERTS if by_alert else BY_EVIDENCE)
    until_phase(service.kubectl, name, "RolledBack", within_s=300)
    seen = rollback_of(service.kubectl, service.load, service.monitoring, name, release, since=began)
    shares = ", ".join(f"{hop} {taken:.2f}" for hop, taken in seen.hops.items())
    say(f"{name}: {seen.total_s:.1f} s ({shares}) by {'alert' if seen.by_alert else 'evidence'}: {seen.reason}")
    if by_alert and not seen.by_alert:
        raise RuntimeError(f"{name} was to be taken back by an alert, and was by: {seen.reason}")
    return seen


def _rows(what: str, seen: Sequence[Rollback]) -> list[Row]:
    if not seen:
        return []
    totals = [one.total_s for one in seen]
    load = f"{RATE:g} requests a second, {SHARE_PERCENT} % to the canary"
    rows = [
        Row(
            f"{what}: fault -> all new requests on stable, median of {len(seen)}", statistics.median(totals), "s", load
        ),
        Row(f"{what}: the longest", max(totals), "s", f"under {BAR_S:g}", max(totals) < BAR_S),
        Row(f"{what}: acted upon the alert", sum(one.by_alert for one in seen), "runs"),
    ]
    for hop in dict.fromkeys(hop for one in seen for hop in one.hops):
        taken = [one.hops[hop] for one in seen if hop in one.hops]
        rows.append(Row(f"{what}: of it {hop}, median", statistics.median(taken), "s"))
    return rows


if __name__ == "__main__":
    main()
