"""``reelway submit`` and ``reelway jobs``: RayJobs of an installation, submitted from any machine or from CI.

The chart defines a job's pods. ``follow`` has the table of exit codes.
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

from reelway.platform.cli.jobs.follow import INTERRUPTED, follow_interactively, raise_for_failure
from reelway.platform.cli.rollout.location import print_unwrapped
from reelway.platform.cli.terminal import stdout_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.errors import ConfigError

if TYPE_CHECKING:
    from reelway.platform.cluster.ray_job import RayJobs
    from reelway.platform.cluster.ray_job_status import RayJobStatus

EXIT_CODES = (
    "Exit codes: 0 succeeded; 1 to 12 the command's own (2 usage, 3 data, 4 features, 5 training, 6 release refused); "
    "2 also if the cluster or the installation was not found; 7 API server error; 13 the job never started or was "
    "terminated; 130 Ctrl-C; 137 killed, usually for exceeding its memory limit."
)
NAMESPACE = typer.Option(
    None, "--namespace", "-n", help="Kubernetes namespace of the installation. Default: the kubeconfig context's."
)
CONTEXT = typer.Option(None, "--context", help="Kubeconfig context. Default: the current one.")
_SUBMIT_TIMEOUT_S = 20.0
JOB_NAME_ARGUMENT = typer.Argument(..., help="Name of a job, as `reelway jobs` prints it.")


class JobKindChoice(StrEnum):
    """The kinds of ``cluster.ray_job_template.JobKind``, without importing the cluster package."""

    DATASET = "dataset"
    FEATURES = "features"
    TRAIN = "train"
    EVALUATE = "evaluate"
    RELEASE = "release"


class TableOrJson(StrEnum):
    TABLE = "table"
    JSON = "json"


def register(app: typer.Typer) -> None:
    app.command(epilog=EXIT_CODES)(submit)
    group = typer.Typer(invoke_without_command=True, help="List, follow, stop and delete jobs on a cluster.")
    group.callback()(list_jobs)
    group.command("follow", epilog=EXIT_CODES)(follow_job)
    group.command("stop")(stop)
    group.command("delete")(delete)
    app.add_typer(group, name="jobs")


def submit(
    kind: JobKindChoice = typer.Argument(..., help="Step of the pipeline: the `reelway` command to run."),
    arguments: list[str] = typer.Argument(
        None, metavar="[-- ARGUMENTS]", help="Arguments appended to the command of the step."
    ),
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    installation: str | None = typer.Option(
        None, help="Helm release that defines the job; required if the namespace has several."
    ),
    run: str | None = typer.Option(
        None, help="Name of the run whose files the job reads and writes. Default: the installation's (jobs.runsPath)."
    ),
    workers: int | None = typer.Option(
        None, min=0, help="Number of Ray worker pods; 0 runs the job on the head pod. Default: the installation's."
    ),
    gpus: int | None = typer.Option(
        None,
        min=0,
        help="Number of GPUs per worker pod, or of the head pod if there are no workers. Default: the installation's.",
    ),
    gpu_resource: str = typer.Option("nvidia.com/gpu", help="Resource name of GPUs in the cluster."),
    cpus: str | None = typer.Option(
        None, help="CPUs of each pod that computes, such as 4 or 500m. Default: the installation's."
    ),
    memory: str | None = typer.Option(
        None, help="Memory of each pod that computes, such as 16Gi. Default: the installation's."
    ),
    queue: str | None = typer.Option(None, help="Kueue LocalQueue that admits the job. Default: the installation's."),
    toleration: list[str] = typer.Option(
        [], help="Node taint that the job's pods tolerate, KEY[=VALUE][:EFFECT]. Repeatable."
    ),
    ttl: int | None = typer.Option(
        None,
        min=0,
        help="Seconds for which the job's Ray cluster is kept after the job has ended. Default: the installation's.",
    ),
    backoff_limit: int = typer.Option(0, min=0, help="Maximum number of retries of a failed job."),
    image: str | None = typer.Option(
        None, help="Image of the job's pods, one of jobs.allowedImages. Default: the installation's."
    ),
    detach: bool = typer.Option(False, "--detach", help="Print the job's name and exit without following it."),
) -> None:
    """Run one step of the pipeline on the cluster, follow its log and exit with its exit code.

    The installation defines pods, image, volumes and secrets; options override its values. The log and the progress
    are printed to standard error. `release` prints the id of the release, which is in the installation's store.

    Ctrl-C asks whether to stop the job. A second Ctrl-C leaves it running; so does Ctrl-C without a terminal.

    \b
    Examples:
      reelway submit dataset -n reelway --run demo -- --viewers 2000
      reelway submit train -n reelway --workers 4 --gpus 1 --toleration nvidia.com/gpu:NoSchedule -- --epochs 5
      reelway rollout start $(reelway submit release -n reelway) -n reelway
    """
    from reelway.platform.cluster.ray_job_template import JobKind, JobRequest

    jobs = _open_ray_jobs(namespace, context)
    request = JobRequest(
        kind=JobKind(kind), run=run, workers=workers, gpus=gpus, gpu_resource=gpu_resource, cpus=cpus, memory=memory,
        queue=queue, tolerations=tuple(toleration), ttl_s=ttl, backoff_limit=backoff_limit, image=image,
        arguments=tuple(arguments or ()),
    )  # fmt: skip
    job = jobs.submit(request, installation)
    print_unwrapped(f"job {job.name} in namespace {jobs.namespace}: {job.command}")
    if detach:
        typer.echo(job.name)
        return
    _follow(jobs, job.name)


def list_jobs(
    typer_context: typer.Context,
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
    output: TableOrJson = typer.Option(TableOrJson.TABLE, "-o", "--output", help="Output format."),
) -> None:
    """List jobs, newest first.

    Examples:

      reelway jobs -n reelway

      reelway jobs -n reelway -o json
    """
    if typer_context.invoked_subcommand is not None:
        return
    jobs = _open_ray_jobs(namespace, context)
    found = [jobs.with_release(job) for job in jobs.all()]
    if output is TableOrJson.JSON:
        typer.echo(json.dumps([asdict(job) for job in found], default=str, indent=2))
        return
    _print(found, datetime.now(UTC))


def follow_job(name: str = JOB_NAME_ARGUMENT, namespace: str | None = NAMESPACE, context: str | None = CONTEXT) -> None:
    """Print a job's log from the start until the job ends, and exit with its exit code.

    Example: reelway jobs follow reelway-train-x2k4p -n reelway
    """
    _follow(_open_ray_jobs(namespace, context), name)


def stop(name: str = JOB_NAME_ARGUMENT, namespace: str | None = NAMESPACE, context: str | None = CONTEXT) -> None:
    """Stop a job's pods. The run's files stay, and the next job of the run continues from its checkpoint.

    A job of a Kueue queue is deleted, because Kueue would restart it.

    Example: reelway jobs stop reelway-train-x2k4p -n reelway
    """
    jobs = _open_ray_jobs(namespace, context)
    job = jobs.get(name)
    if job.state.ended:
        print_unwrapped(f"job {name}: not stopped, it has ended ({job.state.value})")
        return
    jobs.stop(name)
    print_unwrapped(f"job {name}: {'deleted' if job.queue else 'stopping'}")


def delete(
    names: list[str] = typer.Argument(None, metavar="[NAME]...", help="Names of jobs, as `reelway jobs` prints them."),
    ended: bool = typer.Option(False, "--ended", help="Delete all jobs of the namespace that have ended."),
    namespace: str | None = NAMESPACE,
    context: str | None = CONTEXT,
) -> None:
    """Delete jobs with their pods and logs. The files of their runs stay.

    Examples:

      reelway jobs delete reelway-train-x2k4p -n reelway

      reelway jobs delete --ended -n reelway
    """
    jobs = _open_ray_jobs(namespace, context)
    selected = [jobs.get(name).name for name in names or ()]
    if ended:
        selected += [job.name for job in jobs.all() if job.state.ended and job.name not in selected]
    if not names and not ended:
        raise ConfigError("no jobs selected; pass their names or --ended")
    for name in selected:
        jobs.delete(name)
        print_unwrapped(f"job {name}: deleted")


def _follow(jobs: RayJobs, name: str) -> None:
    job = follow_interactively(jobs, name)
    if job is None:
        raise typer.Exit(INTERRUPTED)
    raise_for_failure(job)
    if job.release:
        typer.echo(job.release)


def _print(jobs: Sequence[RayJobStatus], now: datetime) -> None:
    headers = ("job", "kind", "run", "state", "age", "took", "release")
    table = Table(*(Column(header, no_wrap=True) for header in headers))
    for job in jobs:
        took = _format_duration((job.ended_at or now) - job.started_at) if job.started_at else "-"
        state = job.state.value + (f" ({job.exit_code})" if job.exit_code else "")
        table.add_row(
            job.name,
            job.kind,
            job.run,
            state,
            _format_duration(now - job.created_at),
            took,
            short_id(job.release) or "-",
        )
    wide = Console(
        width=max(
            stdout_console.width,
            Measurement.get(stdout_console, stdout_console.options.update(max_width=500), table).maximum,
        )
    )
    wide.print(table)  # never wrapped, because users copy the names


def _format_duration(length: object) -> str:
    from datetime import timedelta

    assert isinstance(length, timedelta)
    seconds = int(length.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _open_ray_jobs(namespace: str | None, context: str | None) -> RayJobs:
    try:
        from reelway.platform.cluster.kube_api import KubeApi
        from reelway.platform.cluster.ray_job import RayJobs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"package {error.name} is not installed; run `pip install reelway-platform[cluster]`"
        ) from error
    return RayJobs(KubeApi(namespace, context=context, timeout_s=_SUBMIT_TIMEOUT_S))
