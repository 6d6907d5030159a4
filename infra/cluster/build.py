"""Programs of the node from pinned Go modules. A tool is built again only when its pins have changed.

Each folder under ``tools/`` is a module of its own whose ``tool`` lines name what is built. What they share is at the
same versions (README.md), so that Go compiles it once. Nothing is installed outside of the state folder; Go's own
module and build caches are Go's.
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

from layout import HERE, Layout

TOOLS: Final = ("helm", "coredns", "kuberay", "kubernetes")  # quick ones first: a broken set-up shows early
MONITORING: Final = ("prometheus-operator", "prometheus")
"""For alerts that go all the way round; `up` does without."""
KSERVE: Final = ("kserve",)
"""For rankers behind KServe; `up` does without."""
_STRIPPED: Final = ("-ldflags", "-s -w")
_NO_DWARF: Final = ("-gcflags=all=-dwarf=false",)
"""The linker leaves it out in any case (-w); not to write it takes a fifth of a compiler's time."""
_FLAGS: Final[dict[str, tuple[str, ...]]] = {
    # without a version helm cannot parse what the API server says of itself
    "kubernetes": ("-ldflags", "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3"),
    # other discoveries bring the libraries of a dozen clouds
    "prometheus": (*_STRIPPED, "-tags", "remove_all_sd,enable_kubernetes_sd"),
}
_OWN_MAIN: Final = frozenset({"coredns"})
"""Tools whose folder is itself the program; of the others it is what the `tool` lines of `go.mod` name."""
_PROGRAMS: Final[dict[str, tuple[str, ...]]] = {
    "kubernetes": ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"),
    "kuberay": ("ray-operator",),
    "coredns": ("coredns",),
    "helm": ("helm", "helm-docs", "kubeconform"),
    "prometheus-operator": ("prometheus-operator", "prometheus-config-reloader"),
    "prometheus": ("prometheus",),
    "kserve": ("kserve-manager",),
}
_CALLED: Final = {"operator": "prometheus-operator", "manager": "kserve-manager"}
"""By its module -> here, where a bare name would not say whose it is."""


class BuildError(Exception):
    """A program could not be built; the compiler's words are in the message."""


def build_tools(layout: Layout, say: Callable[[str], None], tools: Sequence[str] = TOOLS) -> None:
    """Build what is missing or out of date, one tool after another."""
    if shutil.which("go") is None:
        raise BuildError("no `go` on the PATH; install Go 1.26 or newer, the programs are built from Go modules")
    layout.bin.mkdir(parents=True, exist_ok=True)
    for tool in tools:
        stamp = layout.bin / f".{tool}"
        pins = _pins_of(tool)
        if stamp.exists() and stamp.read_text() == pins and all((layout.bin / p).exists() for p in _PROGRAMS[tool]):
            continue
        say(f"building {', '.join(_PROGRAMS[tool])} (minutes the first time, seconds from Go's cache)")
        began = time.monotonic()
        _build(tool, layout.bin)
        stamp.write_text(pins)
        say(f"built {tool} in {time.monotonic() - began:.0f} s")


def module_folder(tool: str, module: str) -> Path:
    """Where Go keeps a module of a tool: CRDs and charts lie there. Fetched again where Go's cache was emptied."""
    done = _go(tool, "mod", "download", "-json", module)
    return Path(json.loads(done.stdout)["Dir"])


def _pins_of(tool: str) -> str:
    folder, whole = HERE / "tools" / tool, hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.read_bytes())
    return whole.hexdigest() + " ".join(_FLAGS.get(tool, ()))


def _build(tool: str, into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into) as fresh:
        _go(tool, "build", "-trimpath", *_NO_DWARF, *_FLAGS.get(tool, _STRIPPED), "-o", f"{fresh}/",
            "." if tool in _OWN_MAIN else "tool")  # fmt: skip
        for theirs, ours in _CALLED.items():
            if (named := Path(fresh) / theirs).exists():
                named.rename(Path(fresh) / ours)
        for program in _PROGRAMS[tool]:
            made = Path(fresh) / program
            if not made.exists():
                raise BuildError(
                    f"tools/{tool}: `go build` made {sorted(p.name for p in Path(fresh).iterdir())}, expected {program}"
                )
            made.replace(into / program)


def _go(tool: str, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["go", *words], cwd=HERE / "tools" / tool, capture_output=True, text=True, check=False,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false"},
    )  # fmt: skip
    if done.returncode:
        raise BuildError(f"tools/{tool}: `go {words[0]}` failed:\n{done.stderr.strip()[-3000:]}")
    return done
