"""Builds the node's programs from pinned Go modules. A tool is built again only when its pins changed.

Each folder under ``tools/`` is a Go module whose ``tool`` lines name the programs. Shared dependencies have the same
versions (README.md), so that Go compiles them once. Apart from Go's own caches nothing is written outside the state
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from layout import HERE, NodePaths

TOOLS: Final = ("helm", "coredns", "kuberay", "kubernetes")  # quick builds first, so that a broken setup fails early
MONITORING: Final = ("prometheus-operator", "prometheus")
"""Programs of `monitoring`."""
KSERVE: Final = ("kserve",)
"""Programs of `kserve`."""
_STRIPPED: Final = ("-ldflags", "-s -w")
_NO_DWARF: Final = ("-gcflags=all=-dwarf=false",)
"""The linker drops the debug information anyway (-w). Not generating it saves a fifth of the compile time."""
_FLAGS: Final[dict[str, tuple[str, ...]]] = {
    # Helm cannot parse the API server's version if it is empty.
    "kubernetes": ("-ldflags", "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3"),
    # Other service discoveries link the libraries of a dozen clouds.
    "prometheus": (*_STRIPPED, "-tags", "remove_all_sd,enable_kubernetes_sd"),
}
_OWN_MAIN: Final = frozenset({"coredns"})
"""Tools whose folder is the program. The programs of all others are the `tool` lines of `go.mod`."""
_TOOL_PROGRAMS: Final[dict[str, tuple[str, ...]]] = {
    "kubernetes": ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"),
    "kuberay": ("ray-operator",),
    "coredns": ("coredns",),
    "helm": ("helm", "helm-docs", "kubeconform"),
    "prometheus-operator": ("prometheus-operator", "prometheus-config-reloader"),
    "prometheus": ("prometheus",),
    "kserve": ("kserve-manager",),
}
_PROGRAM_NAMES: Final = {"operator": "prometheus-operator", "manager": "kserve-manager"}
"""Program name in its module -> name in ``bin``, where the former is ambiguous."""


class BuildError(Exception):
    """Raised if a program cannot be built; the message contains the compiler's output."""


def build_tools(layout: NodePaths, say: Callable[[str], None], tools: Sequence[str] = TOOLS) -> None:
    """Builds the programs that are missing or out of date, sequentially."""
    if shutil.which("go") is None:
        raise BuildError("go: not on the PATH; install Go 1.26 or newer, which builds the programs")
    layout.bin.mkdir(parents=True, exist_ok=True)
    for tool in tools:
        stamp = layout.bin / f".{tool}"
        pins = _pins_of(tool)
        if (
            stamp.exists()
            and stamp.read_text() == pins
            and all((layout.bin / p).exists() for p in _TOOL_PROGRAMS[tool])
        ):
            continue
        say(f"building {', '.join(_TOOL_PROGRAMS[tool])} (minutes the first time, seconds from Go's cache)")
        began = time.monotonic()
        _build(tool, layout.bin)
        stamp.write_text(pins)
        say(f"built {tool} in {time.monotonic() - began:.0f} s")


def module_folder(tool: str, module: str) -> Path:
    """Returns the folder of a tool's module in Go's cache, with CRDs and charts. Downloads a missing module."""
    done = _go(tool, "mod", "download", "-json", module)
    return Path(json.loads(done.stdout)["Dir"])


def _pins_of(tool: str) -> str:
    folder, digest = HERE / "tools" / tool, hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest() + " ".join(_FLAGS.get(tool, ()))


def _build(tool: str, target_folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target_folder) as fresh:
        _go(tool, "build", "-trimpath", *_NO_DWARF, *_FLAGS.get(tool, _STRIPPED), "-o", f"{fresh}/",
            "." if tool in _OWN_MAIN else "tool")  # fmt: skip
        for module_name, final_name in _PROGRAM_NAMES.items():
            if (named := Path(fresh) / module_name).exists():
                named.rename(Path(fresh) / final_name)
        for program in _TOOL_PROGRAMS[tool]:
            program_path = Path(fresh) / program
            if not program_path.exists():
                raise BuildError(
                    f"tools/{tool}: `go build` made {sorted(p.name for p in Path(fresh).iterdir())}, expected {program}"
                )
            program_path.replace(target_folder / program)


def _go(tool: str, *args: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["go", *args], cwd=HERE / "tools" / tool, capture_output=True, text=True, check=False,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"},
    )  # fmt: skip
    if done.returncode:
        raise BuildError(f"tools/{tool}: `go {args[0]}` failed:\n{done.stderr.strip()[-3000:]}")
    return done
