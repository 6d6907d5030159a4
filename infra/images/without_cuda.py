"""Torch without what only a GPU would ever call, so that a node without one does not store four gigabytes.

The package index has one torch for Linux: linked against CUDA, which it loads and does not call where there is no GPU.
``python without_cuda.py excluded constraints.txt`` prints the packages that are not to be installed beside it: all of
CUDA but the runtime and the profiler. ``python without_cuda.py link SITE_PACKAGES`` puts a link to an empty library
under each name that torch's libraries then miss, for the loader. Functions are bound when they are first called (a
``.pth`` file tells Python's loader so), and whoever does call one is told the missing symbol's name. Where PyTorch's
own index is reached, its CPU wheel does the same with less.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_EMPTY: Final = "libtorch_global_deps.so"
"""Torch's own list of what to load first: it has no symbols, and is loaded before all others."""
_CUDA: Final = re.compile(r"^(nvidia-[a-z0-9-]+|cuda-bindings|cuda-pathfinder|triton)==")
_KEPT: Final = frozenset({"nvidia-cuda-runtime", "nvidia-cuda-cupti"})
"""What torch calls on a CPU too: it asks whether there is a GPU, and its profiler names its own library."""
_DRIVER: Final = "libcuda.so.1"
"""Comes with a GPU's driver, and torch does without where there is none."""
_MISSING: Final = re.compile(r"^\s*(lib\S+) => not found$", re.MULTILINE)
_LAZY_BINDING: Final = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n"


def excluded_packages(constraints: Iterable[str]) -> list[str]:
    """Packages of the constraints that a torch for CPUs is installed without."""
    found = (match[1] for line in constraints if (match := _CUDA.match(line)))
    return sorted(set(found) - _KEPT)


def link_empty_libraries(site_packages: Path) -> list[str]:
    """Names that torch's libraries missed and that are there now.

    Raises:
        SystemExit: no such torch lies there.
    """
    folder = site_packages / "torch" / "lib"
    if not (folder / _EMPTY).is_file():
        raise SystemExit(f"{site_packages} holds no torch of Linux; expected {folder / _EMPTY}")
    missed: set[str] = set()
    for library in sorted(folder.glob("*.so*")):
        said = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
        missed.update(_MISSING.findall(said))
    missed.discard(_DRIVER)
    for name in missed:
        (folder / name).symlink_to(_EMPTY)
    (site_packages / "lazy_binding.pth").write_text(_LAZY_BINDING)
    return sorted(missed)


def main() -> None:
    match sys.argv[1:]:
        case ["excluded", constraints]:
            print("\n".join(excluded_packages(Path(constraints).read_text().splitlines())))
        case ["link", site_packages]:
            print("left out of CUDA:", " ".join(link_empty_libraries(Path(site_packages))) or "nothing")
        case _:
            raise SystemExit("expected `excluded CONSTRAINTS` or `link SITE_PACKAGES`")


if __name__ == "__main__":
    main()
