"""``reelway release build`` and ``rehearse``, added to the platform's command group because they need the models."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import typer

from reelway.pipelines.commands.rehearse import rehearse
from reelway.pipelines.commands.signing_key import ensure_signing_key
from reelway.platform.cli.release_commands import RUN, release_group
from reelway.platform.cli.terminal import print_status, stderr_console
from reelway.platform.contracts.manifest import Waiver
from reelway.platform.errors import ConfigError, ReleaseNotFoundError
from reelway.platform.release.signing import fingerprint, load_private_key
from reelway.platform.release.store import ReleaseStore
from reelway.platform.run_directory import RunDirectory

STEP = "release"


def register(app: typer.Typer) -> None:
    """Adds ``reelway release build`` and ``reelway release rehearse``."""
    group = release_group(app)
    group.command("build")(build)
    group.command("rehearse")(rehearse)


def build(
    run: Path = RUN,
    name: str | None = typer.Option(None, help="Display name of the release; by default the name of the run's folder."),
    key: Path | None = typer.Option(
        None, help="Private signing key (PEM file); by default the run's key, created if it does not exist."
    ),
    blend: Path | None = typer.Option(
        None, help="YAML file with source quotas, value weights and slate rules; by default built-in values."
    ),
    index: str = typer.Option(
        "auto",
        help="FAISS factory string of the search index, such as 'IVF1024,Flat'; 'auto' chooses by catalogue size.",
    ),
    store: str | None = typer.Option(
        None, help="Release store URL (file://, s3://, gs://); by default the run's store."
    ),
    parent: str | None = typer.Option(
        None, help="Id, or unique id prefix, of the release that the new release replaces."
    ),
    waive: list[str] = typer.Option([], help="Failed gate to accept, with the reason: GATE=REASON. Repeatable."),
    waived_by: str | None = typer.Option(
        None, help="Name of the person who accepts failed gates; by default the current user."
    ),
    force: bool = typer.Option(False, "--force", help="Build the release again even if its inputs have not changed."),
) -> None:
    """Build a signed release from the run's trained and evaluated models.

    Exports both models to ONNX and compares them with torch, writes the video table, index, popularity lists and
    neighbours, signs the manifest, verifies the release and writes it to the release store. If a gate failed, the
    command lists all failed gates and exits with code 6. A failed gate can be waived: reason and name are part of the
    signed manifest, and every verification reports them.

    Examples:

      reelway release build --run runs/demo

      reelway release build --run runs/demo --blend blend.yaml --key ~/.reelway/keys/release.private.pem

      reelway release build --run runs/new --waive "coverage=first week, 40 videos so far" --waived-by ines
    """
    from reelway.pipelines.release_builder import build_release, load_blend_file
    from reelway.platform.contracts.blend import Blend

    directory = RunDirectory(run)
    target = ReleaseStore(store or str(directory.release_store.absolute()))
    directory.record("evaluate")
    signer = load_private_key(key or ensure_signing_key(directory))
    blended = load_blend_file(blend) if blend else Blend()
    replaced = target.resolve(parent) if parent else None
    called = name or directory.path.absolute().name
    waivers = [parse_waiver(text, waived_by) for text in waive]
    config: dict[str, Any] = {
        "name": called,
        "blend": blended.model_dump(mode="json"),
        "index": index,
        "parent": replaced,
        "key": fingerprint(signer.public_key()),
    }
    if waivers:
        config["waivers"] = [waiver.model_dump() for waiver in waivers]
    with directory.step(
        STEP, config=config, after=("evaluate",), force=force or not _is_in_store(directory, target)
    ) as step:
        if step.cached:
            print_status("release: already done with the same inputs, skipped (use --force to redo)")
        else:
            with stderr_console.status("release") as status:
                release_id = build_release(
                    directory,
                    name=called,
                    key=signer,
                    store=target,
                    parent=replaced,
                    blend=blended,
                    index=index,
                    waivers=waivers,
                    on_progress=lambda description: status.update(f"release: {description}"),
                )
            step.summary |= {"release_id": release_id, "store": target.url}
        print_status(f"release {step.summary['release_id'][:12]} is in {target.url}")
        typer.echo(step.summary["release_id"])


def parse_waiver(text: str, by: str | None) -> Waiver:
    """Parses GATE=REASON.

    Raises:
        ConfigError: if the text has another form.
    """
    gate, _, reason = (part.strip() for part in text.partition("="))
    if not gate or not reason:
        raise ConfigError(f"--waive {text!r}, expected GATE=REASON, such as 'coverage=first week'")
    return Waiver(gate=gate, reason=reason, by=by or getpass.getuser())


def _is_in_store(directory: RunDirectory, store: ReleaseStore) -> bool:
    """Whether the store still has the last build; a release that was removed is built again."""
    if not directory.record_path(STEP).exists():
        return False
    try:
        store.resolve(directory.record(STEP)["summary"].get("release_id", "none"))
    except ReleaseNotFoundError:
        return False
    return True
