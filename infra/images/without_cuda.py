"""Installs torch without the CUDA libraries that only a GPU uses, which saves 4 GB on a node without GPUs.

The package index has one torch for Linux. It is linked against CUDA, loads it, and does not call it without a GPU.

- ``python without_cuda.py excluded constraints.txt`` prints the packages to leave out: CUDA without its runtime and
  profiler.
- ``python without_cuda.py link SITE_PACKAGES`` links each library name that torch then misses to an empty library.

A ``.pth`` file makes the loader bind functions at their first call; calling a missing one fails with the symbol's name.
With access to PyTorch's own index, its CPU wheel is the smaller alternative.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_EMPTY: Final = "libtorch_global_deps.so"
"""A library of torch without symbols, loaded before all others."""
_CUDA: Final = re.compile(r"^(nvidia-[a-z0-9-]+|cuda-bindings|cuda-pathfinder|triton)==")
_KEPT: Final = frozenset({"nvidia-cuda-runtime", "nvidia-cuda-cupti"})
"""Packages that torch calls on a CPU too: to detect GPUs, and in its profiler."""
_DRIVER: Final = "libcuda.so.1"
"""Part of a GPU's driver; torch works without it."""
_MISSING: Final = re.compile(r"^\s*(lib\S+) => not found$", re.MULTILINE)
_LAZY_BINDING: Final = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n"


def excluded_packages(constraints: Iterable[str]) -> list[str]:
    """Packages of the constraints that torch for CPUs does not need."""
    found = (match[1] for line in constraints if (match := _CUDA.match(line)))
    return sorted(set(found) - _KEPT)


def link_empty_libraries(site_packages: Path) -> list[str]:
    """Links missing library names of torch to an empty library and returns these names.

    Raises:
        SystemExit: if the folder contains no torch for Linux.
    """
    folder = site_packages / "torch" / "lib"
    if not (folder / _EMPTY).is_file():
        raise SystemExit(f"{site_packages}: no torch for Linux, expected {folder / _EMPTY}; install torch first")
    missing: set[str] = set()
    for library in sorted(folder.glob("*.so*")):
        ldd_output = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=False).stdout
        missing.update(_MISSING.findall(ldd_output))
    missing.discard(_DRIVER)
    for name in missing:
        (folder / name).symlink_to(_EMPTY)
    (site_packages / "lazy_binding.pth").write_text(_LAZY_BINDING)
    return sorted(missing)


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
