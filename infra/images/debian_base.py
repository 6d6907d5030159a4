"""Builds a base image without a registry: Debian 12 with Python 3.11, by debootstrap."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from builders import Builder, BuilderError

BASE_IMAGE: Final = "reelway.local/base:bookworm"
_PACKAGES: Final = ("python3", "python3-venv", "ca-certificates")
_NOT_NEEDED: Final = (
    "var/cache/apt", "var/lib/apt/lists", "var/log", "debootstrap",
    "usr/share/info", "usr/share/locale", "usr/share/man",
)  # fmt: skip


def make_base(builder: Builder, out: Path, mirror: str | None, say: Callable[[str], None]) -> None:
    """Builds ``BASE_IMAGE``, also if it exists.

    Args:
        mirror: URL of a Debian mirror; None for debootstrap's default.

    Raises:
        BuilderError: if debootstrap is not installed or fails.
    """
    if shutil.which("debootstrap") is None:
        raise BuilderError("debootstrap: not installed; install it, or use `build --base IMAGE`")
    with tempfile.TemporaryDirectory(dir=_bootstrap(out)) as folder:
        root = Path(folder) / "root"
        include = f"--include={','.join(_PACKAGES)}"
        command = ["debootstrap", "--variant=minbase", include, "bookworm", str(root), *([mirror] if mirror else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise BuilderError(f"debootstrap ended with {done.returncode}: {done.stdout[-2000:]}")
        for path in _NOT_NEEDED:
            shutil.rmtree(root / path, ignore_errors=True)
        keep_copyright_files(root / "usr" / "share" / "doc")
        # The image must not refer to the mirror of the build machine.
        (root / "etc" / "apt" / "sources.list").unlink(missing_ok=True)
        (root / "etc" / "resolv.conf").unlink(missing_ok=True)
        (root / "etc" / "hostname").unlink(missing_ok=True)
        say("packages are there")
        archive = Path(folder) / "context" / "base.tar"
        archive.parent.mkdir()
        subprocess.run(["tar", "-C", str(root), "--numeric-owner", "-cf", str(archive), "."], check=True)
        builder.build(Path(__file__).with_name("base.Dockerfile"), archive.parent, BASE_IMAGE, {})
        say(f"{BASE_IMAGE} is built")


def keep_copyright_files(documents: Path) -> None:
    """Deletes Debian's documentation, except the licences that must be distributed with the programs."""
    for path in documents.rglob("*"):
        if path.name != "copyright" and not path.is_dir():  # a package may link to the folder of another one
            path.unlink()


def _bootstrap(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
