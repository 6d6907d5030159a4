"""``reelway release rehearse``: releases to try a rollout with. It only wires ``pipelines.rehearsal``."""

from __future__ import annotations

import getpass
from enum import StrEnum
from pathlib import Path

import typer

from reelway.pipelines.commands.own_key import own_key
from reelway.platform.cli.release import RUN
from reelway.platform.cli.terminal import console, say
from reelway.platform.release.signing import fingerprint, load_private_key
from reelway.platform.release.store import LATEST, ReleaseStore
from reelway.platform.runs import RunDirectory


class Kind(StrEnum):
    """As ``rehearsal.Rehearsal``, without what it imports."""

    ERRORS = "errors"
    SLOW = "slow"
    WORSE = "worse"
    POPULAR = "popular"


def rehearse(
    kind: Kind = typer.Argument(..., help="errors, slow, worse or popular; see above."),
    run: Path = RUN,
    of: str = typer.Option(LATEST, help="The good release that it is made from: id, its beginning, or 'latest'."),
    key: Path | None = typer.Option(None, help="Private key (PEM) that signs; the run's own when absent."),
    by: str | None = typer.Option(None, help="Who answers for it; the user who is logged in when absent."),
    seed: int = typer.Option(0, min=0, help="Of what is drawn."),
    force: bool = typer.Option(False, "--force", help="Make it again although nothing changed."),
) -> None:
    """Make a release to rehearse a rollout with, from a good one. Its fault is in its files, never in the service.

    \b
    errors    the ranker's graph fails for every viewer with a history: verifies, starts, warms up, then fails
    slow      the ranker's graph does needless work for the busiest viewers: only the 99th percentile shows it
    worse     the ranker was trained on shuffled labels: quick, well, and wrong; only viewers notice
    popular   no fault: everybody is shown what is popular, for a trained release to beat

    It is signed like any release and named rehearsal-KIND; `latest` never means it, and whoever verifies it is told
    that it was not evaluated.

    \b
    Examples:
      reelway release rehearse errors --run runs/demo
      reelway rollout start $(reelway release rehearse worse --run runs/demo) --run runs/demo --wait
    """
    directory = RunDirectory(run)
    good = ReleaseStore(str(directory.release_store.absolute())).resolve(of)
    signer = load_private_key(key or own_key(directory))
    step_name = f"rehearse-{kind.value}"
    config = {"kind": kind.value, "of": good, "seed": seed, "key": fingerprint(signer.public_key())}
    outputs = _outputs(directory, step_name)
    with directory.step(step_name, config=config, outputs=outputs, force=force) as step:
        if step.done:
            say(f"rehearsal {kind.value}: already made from the same release, skipped (use --force to redo)")
        else:
            from reelway.pipelines import rehearsal

            with console.status(f"rehearsal {kind.value}") as status:
                release_id, folder = rehearsal.rehearse(
                    directory,
                    rehearsal.Rehearsal(kind.value),
                    of=good,
                    key=signer,
                    by=by or getpass.getuser(),
                    seed=seed,
                    report=lambda what: status.update(f"rehearsal {kind.value}: {what}"),
                )
            step.summary |= {"release_id": release_id, "folder": str(folder)}
            say(f"release {release_id[:12]} is rehearsal-{kind.value}: {rehearsal.ABOUT[rehearsal.Rehearsal(kind)]}")
        typer.echo(step.summary["release_id"])


def _outputs(directory: RunDirectory, step_name: str) -> tuple[Path, ...]:
    """What was made the last time, so that a release removed from the store is made again."""
    if not directory.record_path(step_name).exists():
        return (directory.path / "never made",)
    made = directory.record(step_name)["summary"].get("release_id", "none")
    return (directory.release_store / made / "manifest.json",)
