"""``reelway release build`` and ``rehearse``: they join the platform's group, because only here are the models."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import typer

from reelway.pipelines.commands.own_key import own_key
from reelway.pipelines.commands.rehearse import rehearse
from reelway.platform.cli.release import RUN, release_group
from reelway.platform.cli.terminal import console, say
from reelway.platform.contracts.manifest import Waiver
from reelway.platform.errors import ConfigError, ReleaseNotFoundError
from reelway.platform.release.signing import fingerprint, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.runs import RunDirectory

STEP = "release"


def register(app: typer.Typer) -> None:
    """Add ``reelway release build|rehearse``."""
    group = release_group(app)
    group.command("build")(build)
    group.command("rehearse")(rehearse)


def build(
    run: Path = RUN,
    name: str | None = typer.Option(None, help="What people call it; the run's folder name when absent."),
    key: Path | None = typer.Option(
        None, help="Private key (PEM) that signs; the run's own, made when it has none, when absent."
    ),
    blend: Path | None = typer.Option(
        None, help="YAML with quotas, value weights and slate rules; the defaults when absent."
    ),
    index: str = typer.Option("auto", help="FAISS factory string, e.g. 'IVF1024,Flat' or 'HNSW32'; auto by size."),
    store: str | None = typer.Option(
        None, help="Release store as a URL (file://, s3://, gs://) to put it into; the run's when absent."
    ),
    parent: str | None = typer.Option(None, help="The release this one is meant to replace (id or its beginning)."),
    waive: list[str] = typer.Option([], help="GATE=REASON: build although this gate failed, on your name. Repeatable."),
    waived_by: str | None = typer.Option(None, help="Who waives; the user who is logged in when absent."),
    force: bool = typer.Option(False, "--force", help="Build again although nothing changed."),
) -> None:
    """Build a signed release from the run's trained and evaluated models.

    Exports both models to ONNX and compares them with torch, gathers the video table, index, popularity lists and
    neighbours, signs the manifest, verifies the whole and puts it into the release store. A run whose
    evaluation failed a gate is refused, with exit code 6 and every failed gate by name. A gate that failed can be
    waived: the reason and the name are signed with the release, and everybody who verifies it is told.

    Examples:

      reelway release build --run runs/demo

      reelway release build --run runs/demo --blend blend.yaml --key ~/.reelway/keys/release.private.pem

      reelway release build --run runs/new --waive "coverage=first week, 40 videos so far" --waived-by ines
    """
    from reelway.pipelines.build import build_release, read_blend
    from reelway.platform.contracts.blend import Blend

    directory = RunDirectory(run)
    place = ReleaseStore(store or str(directory.release_store.absolute()))
    directory.record("evaluate")
    signer = load_private_key(key or own_key(directory))
    blended = read_blend(blend) if blend else Blend()
    replaced = place.resolve(parent) if parent else None
    called = name or directory.path.absolute().name
    waivers = [waiver_from(text, waived_by) for text in waive]
    config: dict[str, Any] = {
        "name": called,
        "blend": blended.model_dump(mode="json"),
        "index": index,
        "parent": replaced,
        "key": fingerprint(signer.public_key()),
    }
    if waivers:
        config["waivers"] = [waiver.model_dump() for waiver in waivers]
    with directory.step(STEP, config=config, after=("evaluate",), force=force or not _built(directory, place)) as step:
        if step.done:
            say("release: already done with the same inputs, skipped (use --force to redo)")
        else:
            with console.status("release") as status:
                release_id = build_release(
                    directory,
                    name=called,
                    key=signer,
                    store=place,
                    parent=replaced,
                    blend=blended,
                    index=index,
                    waivers=waivers,
                    report=lambda what: status.update(f"release: {what}"),
                )
            step.summary |= {"release_id": release_id, "store": place.url}
        say(f"release {step.summary['release_id'][:12]} is in {place.url}")
        typer.echo(step.summary["release_id"])


def waiver_from(text: str, by: str | None) -> Waiver:
    """A waiver as a person types it.

    Raises:
        ConfigError: not GATE=REASON.
    """
    gate, _, reason = (part.strip() for part in text.partition("="))
    if not gate or not reason:
        raise ConfigError(f"--waive {text!r}, expected GATE=REASON, such as 'coverage=first week'")
    return Waiver(gate=gate, reason=reason, by=by or getpass.getuser())


def _built(directory: RunDirectory, store: ReleaseStore) -> bool:
    """Whether the store still has the last build; a release removed from it is built again."""
    if not directory.record_path(STEP).exists():
        return False
    try:
        store.resolve(directory.record(STEP)["summary"].get("release_id", "none"))
    except ReleaseNotFoundError:
        return False
    return True
