"""``reelway operator``: what looks after rollouts on a cluster."""

from __future__ import annotations

import re
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add ``reelway operator``."""
    app.command()(operator)


def operator(
    namespace: str | None = typer.Option(None, "--namespace", "-n", help="The one it looks after; its own by default."),
    context: str | None = typer.Option(None, help="Of the kubeconfig, where it does not run in a pod."),
    host: str = typer.Option("0.0.0.0", help="Address of the alert webhook, /metrics, /healthz and /readyz."),
    port: int = typer.Option(8080, min=0, max=65535, help="Their port."),
    webhook_token_file: Path = typer.Option(
        Path("/etc/reelway/webhook/token"), help="Bearer token of the webhook: a key of a Secret, mounted."
    ),
    ray_token_file: Path | None = typer.Option(None, help="Ray's token: a key of a Secret, mounted."),
    interval: float = typer.Option(2.0, min=0.1, help="Seconds between two looks; commands and alerts do not wait."),
    prometheus: str | None = typer.Option(None, help="Prometheus' URL; without it the router is scraped directly."),
    alertmanager: str | None = typer.Option(None, help="Alertmanager's URL, to be polled besides its webhook."),
    prometheus_token_file: Path | None = typer.Option(None, help="Bearer token for Prometheus, read at each use."),
    prometheus_ca_file: Path | None = typer.Option(None, help="Certificates (PEM) that Prometheus' is checked with."),
    prometheus_label: list[str] = typer.Option(
        [], help="NAME=VALUE that our series have besides the namespace, where Prometheus holds several clusters'."
    ),
    alertmanager_token_file: Path | None = typer.Option(None, help="Bearer token for Alertmanager."),
    alertmanager_ca_file: Path | None = typer.Option(None, help="Certificates (PEM) for Alertmanager's."),
    ray_service: str = typer.Option(
        "", help="RayService whose Serve config is composed from the chart's options; by default none is."
    ),
    head_url: str | None = typer.Option(None, help="URL of a RayService's dashboard, with {name} and {namespace}."),
    router_url: str | None = typer.Option(None, help="URL of a RayService's router, with {name} and {namespace}."),
    trust_host: list[str] = typer.Option(
        [], help="Host that Ray's token may be sent to, besides the namespace's Services; may be given several times."
    ),
    releases: str | None = typer.Option(
        None, help="Path or URL of the release store: what is in it is recorded as Release resources."
    ),
    parity: str | None = typer.Option(
        None, help="Path or URL (s3://...) where `reelway features parity --report` leaves its findings."
    ),
    ranker_template: Path | None = typer.Option(
        None, help="InferenceService of a release's ranker, with {release} and {release_id}, where KServe runs rankers."
    ),
    lease: str = typer.Option("reelway-operator", help="Name of the Lease that makes one process the active one."),
    lease_duration: float = typer.Option(
        10.0, min=1, help="A silent holder of the Lease is gone after so many seconds."
    ),
    identity: str | None = typer.Option(
        None, envvar="POD_NAME", help="Of this process, in the Lease: a pod's name; made up otherwise."
    ),
) -> None:
    """Look after the ReleaseRollouts of a namespace until SIGTERM. One process is active; others wait for its Lease.

    Needs, in its namespace: releaserollouts get, list, watch, patch; releaserollouts/status update; rayservices get,
    patch; leases get, create, update; events create; configmaps get; releases list, create; releases/status update;
    with --ranker-template also inferenceservices list, create, delete.

    Examples:

      reelway operator --namespace reelway --prometheus http://prometheus:9090

      reelway operator -n dev --context kind --head-url http://127.0.0.1:8265 --router-url http://127.0.0.1:8000
    """
    import os
    import secrets
    import socket

    from reelway.platform.cluster.inference_service import read_template
    from reelway.platform.cluster.kube_api import KubeApi
    from reelway.platform.cluster.lanes import HEAD_URL, ROUTER_URL, LaneSettings
    from reelway.platform.cluster.rollout_operator import OperatorSettings, run_operator
    from reelway.platform.rollout.sources import Access

    _quietly()
    if ranker_template is not None:
        read_template(ranker_template)  # a wrong one is said now, and not when a rollout begins
    lanes = LaneSettings(
        interval_s=interval, prometheus_url=prometheus, alertmanager_url=alertmanager, ray_token_file=ray_token_file,
        prometheus_access=Access(prometheus_token_file, prometheus_ca_file, _labels(prometheus_label)),
        alertmanager_access=Access(alertmanager_token_file, alertmanager_ca_file), parity=parity,
        head_url=head_url or HEAD_URL, router_url=router_url or ROUTER_URL,
        ranker_template=ranker_template, trusted_hosts=tuple(trust_host),
    )  # fmt: skip
    made_up = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
    settings = OperatorSettings(
        webhook_token_file=webhook_token_file, identity=identity or made_up, host=host, port=port, lease=lease,
        lease_duration_s=lease_duration, lanes=lanes, releases=releases,
        ray_service=ray_service,
    )  # fmt: skip
    run_operator(KubeApi(namespace, context=context), settings)


def _labels(given: list[str]) -> dict[str, str]:
    labels = {}
    for pair in given:
        name, sign, value = pair.partition("=")
        if not sign or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name):
            raise typer.BadParameter(
                f"{pair!r}, expected NAME=VALUE with a label's name", param_hint="--prometheus-label"
            )
        labels[name] = value
    return labels


def _quietly() -> None:
    """Decisions are logged; requests, and what Kopf does, are not."""
    import logging

    from reelway.platform.telemetry import configure_logging

    configure_logging()
    for chatty in ("httpx", "kopf", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
