"""Builds Dockerfiles with docker, podman or buildah behind one interface."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final


class BuilderError(Exception):
    """Raised if no builder works or a build fails; its output is in the message or on the terminal."""


@dataclass(frozen=True)
class Builder:
    """docker, podman or buildah."""

    program: str

    def build(self, dockerfile: Path, context: Path, image: str, arguments: Mapping[str, str]) -> None:
        """Builds ``image``.

        Raises:
            BuilderError: if the build fails.
        """
        command = [*self._build_command(), "--tag", image, "--file", str(dockerfile)]
        for name, value in arguments.items():
            command += ["--build-arg", f"{name}={value}"]
        for name, path in _build_secrets().items():
            command += ["--secret", f"id={name},src={path}"]
        _run([*command, str(context)])

    def digest_of(self, image: str) -> str:
        """Returns the identity of an image's content. Empty if the image does not exist."""
        if self.program == "docker":
            command = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
        else:
            named = ".FromImageID" if self.program == "buildah" else ".Id"
            command = [self.program, "inspect", "--type=image", "--format", f"{{{{{named}}}}}", image]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    def run_program(self, image: str, program: Path) -> str:
        """Runs a Python program inside an image, without a network, and returns what it prints.

        Raises:
            BuilderError: if the image cannot run, or the program fails.
        """
        if self.program != "buildah":
            command = [self.program, "run", "--rm", "--interactive", "--network", "none", "--entrypoint", "python3"]
            return _read([*command, image, "-"], program.read_text())
        container = _read(["buildah", "from", "--pull-never", image]).strip()
        try:
            command = ["buildah", "run", "--isolation", "chroot", "--terminal=false", container, "--", "python3", "-"]
            return _read(command, program.read_text())
        finally:
            _read(["buildah", "rm", container])

    def save(self, image: str, archive: Path) -> None:
        """Writes an archive for ``ctr images import`` and ``docker load``, unless it exists with the same content.

        Raises:
            BuilderError: if the archive cannot be written.
        """
        digest, packed = self.digest_of(image), archive.with_name(f"{archive.name}.of")
        if digest and archive.exists() and packed.exists() and packed.read_text() == digest:
            return
        packed.unlink(missing_ok=True)
        archive.unlink(missing_ok=True)
        self._pack(image, archive)
        packed.write_text(digest)

    def _pack(self, image: str, archive: Path) -> None:
        if self.program == "buildah":
            _run(["buildah", "push", "--quiet", *_COMPRESSED, image, f"oci-archive:{archive}:{image}"])
        elif self.program == "podman":
            _run(["podman", "save", "--quiet", "--format", "oci-archive", "--output", str(archive), image])
        else:
            _run(["docker", "save", "--output", str(archive), image])

    def _build_command(self) -> list[str]:
        if self.program == "buildah":
            # Chroot isolation requires neither a container runtime nor a network.
            return ["buildah", "build", "--isolation", "chroot", "--layers", "--quiet"]
        if self.program == "podman":
            return ["podman", "build", "--layers", "--quiet"]
        return ["docker", "buildx", "build", "--load", "--quiet"]


def find_builder() -> Builder:
    """Returns the first of docker, podman and buildah that works on this machine, or the one in ``$REELWAY_BUILDER``.

    Raises:
        BuilderError: if none works.
    """
    named = os.environ.get("REELWAY_BUILDER")
    for program in (named,) if named else _PROBES:
        if program not in _PROBES:
            raise BuilderError(f"REELWAY_BUILDER: {program!r} is no builder; set one of {', '.join(_PROBES)}")
        if shutil.which(program) and subprocess.run(_PROBES[program], capture_output=True, check=False).returncode == 0:
            return Builder(program)
    raise BuilderError("image builder: none works; install docker (with a running daemon), podman or buildah")


_COMPRESSED: Final = ("--compression-format", "zstd", "--compression-level", "3")
"""For buildah's archives. Its default, gzip, takes minutes for the training image."""
_PROBES: Final = {
    "docker": ["docker", "info"],
    "podman": ["podman", "info"],
    "buildah": ["buildah", "info"],
}


def _build_secrets() -> dict[str, str]:
    """Files that are mounted during the build and stored in no layer."""
    bundle = os.environ.get("REELWAY_CA_BUNDLE") or os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    named = {"ca": bundle, "pip": os.environ.get("REELWAY_PIP_CONFIG")}
    return {name: path for name, path in named.items() if path and Path(path).is_file()}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        raise BuilderError(f"{' '.join(command)} ended with {done.returncode}")


def _read(command: list[str], stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuilderError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
