"""``reelway release rehearse``: builds releases for rollout drills."""

from __future__ import annotations

import getpass
from enum import StrEnum
from pathlib import Path

import typer

from reelway.pipelines.commands.signing_key import ensure_signing_key
from reelway.platform.cli.release_commands import RUN
from reelway.platform.cli.terminal import print_status, stderr_console
from reelway.platform.contracts.ids import short_id
from reelway.platform.release.signing import fingerprint, load_private_key
from reelway.platform.release.store import LATEST, ReleaseStore
from reelway.platform.run_directory import RunDirectory


class KindChoice(StrEnum):
    """The kinds of ``drill_releases.DrillReleaseKind``, without the imports of that module."""

    ERRORS = "errors"
    SLOW = "slow"
    WORSE = "worse"
    POPULAR = "popular"


def rehearse(
    kind: KindChoice = typer.Argument(..., help="Fault of the release, as listed above."),
    run: Path = RUN,
    of: str = typer.Option(LATEST, "--base", help="Good release to build from: id, unique id prefix, or 'latest'."),
    key: Path | None = typer.Option(None, help="Private signing key (PEM file). Defaults to the run's key."),
    by: str | None = typer.Option(
        None,
        "--waived-by",
        help="Person recorded as responsible for the missing evaluation. Defaults to the current user.",
    ),
    seed: int = typer.Option(0, min=0, help="Random seed for the label shuffle of the kind worse."),
    force: bool = typer.Option(False, "--force", help="Build the release again even if its inputs have not changed."),
) -> None:
    """Build a release for rollout drills from a good release. Its fault is in its files, not in the service.

    \b
    errors    the ranker's graph fails for viewers with a history: the release verifies, starts and warms up first
    slow      the ranker's graph does useless work for the busiest viewers: only the 99th percentile shows the fault
    worse     the ranker was trained on shuffled labels: only outcome metrics show the fault
    popular   no fault: recommends popular videos, as a baseline for a trained release

    The release is signed like any other and named rehearsal-KIND. `latest` never selects it, and verification reports
    that it was not evaluated.

    \b
    Examples:
      reelway release rehearse errors --run runs/demo
      reelway rollout start $(reelway release rehearse worse --run runs/demo) --run runs/demo --wait
    """
    directory = RunDirectory(run)
    good = ReleaseStore(str(directory.release_store.absolute())).resolve(of)
    signer = load_private_key(key or ensure_signing_key(directory))
    step_name = f"rehearse-{kind.value}"
    config = {"kind": kind.value, "of": good, "seed": seed, "key": fingerprint(signer.public_key())}
    outputs = _outputs(directory, step_name)
    with directory.step(step_name, config=config, outputs=outputs, force=force) as step:
        if step.cached:
            print_status(
                f"drill release {kind.value}: already built from the same release, skipped (use --force to redo)"
            )
        else:
            from reelway.pipelines import drill_releases

            with stderr_console.status(f"building drill release {kind.value}") as status:
                release_id, folder = drill_releases.build_drill_release(
                    directory,
                    drill_releases.DrillReleaseKind(kind.value),
                    of=good,
                    key=signer,
                    by=by or getpass.getuser(),
                    seed=seed,
                    report=lambda message: status.update(f"drill release {kind.value}: {message}"),
                )
            step.summary |= {"release_id": release_id, "folder": str(folder)}
            description = drill_releases.DESCRIPTIONS[drill_releases.DrillReleaseKind(kind)]
            print_status(f"release {short_id(release_id)} is rehearsal-{kind.value}: {description}")
        typer.echo(step.summary["release_id"])


def _outputs(directory: RunDirectory, step_name: str) -> tuple[Path, ...]:
    """Returns the manifest of the release built last, so that a release removed from the store is built again."""
    if not directory.record_path(step_name).exists():
        return (directory.path / "not built",)
    release = directory.record(step_name)["summary"].get("release_id", "none")
    return (directory.release_store / release / "manifest.json",)
