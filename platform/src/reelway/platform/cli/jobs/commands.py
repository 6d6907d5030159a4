"""``reelway submit`` and ``reelway jobs``: RayJobs of an installation, from a laptop or from CI.

What a job's pods are says the chart; the table of exit codes is in ``follow``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

from reelway.platform.cli.jobs.follow import INTERRUPTED, follow_or_ask, raise_if_bad
from reelway.platform.cli.rollout.place import tell
from reelway.platform.cli.terminal import out
from reelway.platform.errors import ConfigError

if TYPE_CHECKING:
    from reelway.platform.cluster.ray_job import RayJobs
    from reelway.platform.cluster.ray_job_status import Job

EXIT_CODES = (
    "Exit codes: 0 succeeded, 1 to 12 the command's own (as on a laptop: 2 usage, 3 data, 4 features, 5 training, "
    "6 release refused), 2 also no cluster or no installation, 7 the API server refuses, 13 never began or was ended "
    "from outside, 130 Ctrl-C, 137 killed, most often for its memory."
)
NAMESPACE = typer.Option(None, "--namespace", "-n", help="Where Reelway is installed; the context's when absent.")
CONTEXT = typer.Option(None, "--context", help="Of the kubeconfig.")
_ANSWERED_S = 20.0
NAME = typer.Argument(..., help="A job, as `reelway jobs` lists it.")


class Kind(StrEnum):
    """What can be submitted."""

    DATASET = "dataset"
    FEATURES = "features"
    TRAIN = "train"
    EVALUATE = "evaluate"
    RELEASE = "release"


class Output(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


def register(app: typer.Typer) -> None:
    """Add ``reelway submit`` and ``reelway jobs``."""
    app.command(epilog=EXIT_CODES)(submit)
    group = typer.Typer(invoke_without_command=True, help="Jobs on a cluster: list, follow, stop, delete.")
    group.callback()(list_jobs)
    group.command("follow", epilog=EXIT_CODES)(follow_job)
    group.command("stop")(stop)
    group.command("delete")(delete)
    app.add_typer(group, name="jobs")


def submit(
    kind: Kind = typer.Argument(..., help="What to do; each is the command of that name, run in a job's pods."),
    arguments: list[str] = typer.Argument(None, metavar="[-- ARGUMENTS]", help="Further ones of the command."),
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    installation: str | None = typer.Option(None, help="Helm release, where a namespace has several."),
    run: str | None = typer.Option(None, help="Name of the run; the installation's (jobs.runsPath) when absent."),
    workers: int | None = typer.Option(None, min=0, help="Worker pods; 0 does all on the head."),
    gpus: int | None = typer.Option(None, min=0, help="GPUs of each worker, or of the head without workers."),
    gpu_resource: str = typer.Option("nvidia.com/gpu", help="The cluster's name for GPUs."),
    cpus: str | None = typer.Option(None, help="Of each pod that computes: 4, 500m."),
    memory: str | None = typer.Option(None, help="Of each pod that computes: 16Gi."),
    queue: str | None = typer.Option(None, help="Kueue's queue to wait in."),
    toleration: list[str] = typer.Option([], help="KEY[=VALUE][:EFFECT] of nodes that it may run on. Repeatable."),
    ttl: int | None = typer.Option(None, min=0, help="Keep the job's Ray cluster so many seconds after its end."),
    backoff: int = typer.Option(0, min=0, help="Tries after the first one."),
    image: str | None = typer.Option(None, help="Instead of the installation's training image."),
    detach: bool = typer.Option(False, "--detach", help="Print the job's name and do not follow it."),
) -> None:
    """Do a step of a run on the cluster, follow its log, and end with its exit code.

    Pods, image, volumes and secrets are those of the installation; flags are laid over that. The log and what is being
    waited for go to standard error. `release` prints the id of the release, which lies in the installation's store.

    Ctrl-C asks whether to stop the job; a second one leaves it running, as it is without a terminal.

    \b
    Examples:
      reelway submit dataset -n reelway --run demo -- --viewers 2000
      reelway submit train -n reelway --workers 4 --gpus 1 --toleration nvidia.com/gpu:NoSchedule -- --epochs 5
      reelway rollout start $(reelway submit release -n reelway) -n reelway
    """
    from reelway.platform.cluster.ray_job_template import JobKind, JobRequest

    jobs = _jobs(namespace, context)
    request = JobRequest(
        kind=JobKind(kind), run=run, workers=workers, gpus=gpus, gpu_resource=gpu_resource, cpus=cpus, memory=memory,
        queue=queue, tolerations=tuple(toleration), ttl_s=ttl, backoff=backoff, image=image,
        arguments=tuple(arguments or ()),
    )  # fmt: skip
    job = jobs.submit(request, installation)
    tell(f"job {job.name} in namespace {jobs.namespace}: {job.command}")
    if detach:
        typer.echo(job.name)
        return
    _follow(jobs, job.name)


def list_jobs(
    asked: typer.Context,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    output: Output = typer.Option(Output.TABLE, "-o", "--output", help="For people, or for programs."),
) -> None:
    """List jobs, the newest first.

    Examples:

      reelway jobs -n reelway

      reelway jobs -n reelway -o json
    """
    if asked.invoked_subcommand is not None:
        return
    jobs = _jobs(namespace, context)
    found = [jobs.with_release(job) for job in jobs.all()]
    if output is Output.JSON:
        typer.echo(json.dumps([asdict(job) for job in found], default=str, indent=2))
        return
    _print(found, datetime.now(UTC))


def follow_job(name: str = NAME, namespace: str | None = NAMESPACE, context: str | None = CONTEXT) -> None:
    """Show a job's log from its beginning, go on until it ends, and end with its exit code.

    Example: reelway jobs follow reelway-training-x2k4p -n reelway
    """
    _follow(_jobs(namespace, context), name)


def stop(name: str = NAME, namespace: str | None = NAMESPACE, context: str | None = CONTEXT) -> None:
    """End a job's pods. What it wrote stays, and the next job of the run goes on from its checkpoint.

    A job of a Kueue queue is deleted: Kueue would start it again.

    Example: reelway jobs stop reelway-training-x2k4p -n reelway
    """
    jobs = _jobs(namespace, context)
    job = jobs.get(name)
    if job.state.ended:
        tell(f"job {name} has ended already: {job.state.value}")
        return
    jobs.stop(name)
    tell(f"job {name} is {'deleted' if job.queue else 'being stopped'}")


def delete(
    names: list[str] = typer.Argument(None, metavar="[NAME]...", help="Jobs, as `reelway jobs` lists them."),
    ended: bool = typer.Option(False, "--ended", help="All that have ended."),
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
) -> None:
    """Delete jobs with their pods and logs. What they wrote stays.

    Examples:

      reelway jobs delete reelway-training-x2k4p -n reelway

      reelway jobs delete --ended -n reelway
    """
    jobs = _jobs(namespace, context)
    wanted = [jobs.get(name).name for name in names or ()]
    if ended:
        wanted += [job.name for job in jobs.all() if job.state.ended and job.name not in wanted]
    if not names and not ended:
        raise ConfigError("which jobs? expected names, or --ended")
    for name in wanted:
        jobs.delete(name)
        tell(f"job {name} is deleted")


def _follow(jobs: RayJobs, name: str) -> None:
    job = follow_or_ask(jobs, name)
    if job is None:
        raise typer.Exit(INTERRUPTED)
    raise_if_bad(job)
    if job.release:
        typer.echo(job.release)


def _print(jobs: Sequence[Job], now: datetime) -> None:
    headers = ("job", "kind", "run", "state", "age", "took", "release")
    table = Table(*(Column(header, no_wrap=True) for header in headers))
    for job in jobs:
        took = _span((job.ended_at or now) - job.started_at) if job.started_at else "-"
        state = job.state.value + (f" ({job.exit_code})" if job.exit_code else "")
        table.add_row(job.name, job.kind, job.run, state, _span(now - job.created_at), took, job.release[:12] or "-")
    wide = Console(width=max(out.width, Measurement.get(out, out.options.update(max_width=500), table).maximum))
    wide.print(table)  # never folded: names are copied from here


def _span(length: object) -> str:
    from datetime import timedelta

    assert isinstance(length, timedelta)
    seconds = int(length.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _jobs(namespace: str | None, context: str | None) -> RayJobs:
    try:
        from reelway.platform.cluster.kube_api import KubeApi
        from reelway.platform.cluster.ray_job import RayJobs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed; commands on a cluster need `pip install reelway-platform[cluster]`"
        ) from error
    return RayJobs(KubeApi(namespace, context=context, timeout_s=_ANSWERED_S))
