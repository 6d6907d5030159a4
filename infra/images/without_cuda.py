"""Takes out of an image what only a GPU would ever call, so that a node without one does not store four gigabytes.

The package index has one torch for Linux: linked against CUDA, which it loads and does not call where there is no GPU.
Every CUDA library but the runtime becomes a link to an empty one: the loader finds a file under each name. Functions
are bound when they are first called (a ``.pth`` file tells Python's loader so), and whoever does call one is told the
missing symbol's name. Where PyTorch's own index is reached, its CPU wheel does the same with less.
``python without_cuda.py SITE_PACKAGES``. Refuses a folder that holds no such torch.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

_EMPTY: Final = Path("torch/lib/libtorch_global_deps.so")
"""Torch's own list of what to load first: it has no symbols, and is loaded before all others."""
_KEPT: Final = {"libcudart.so", "libcupti.so"}
"""What torch calls on a CPU too: it asks whether there is a GPU, and its profiler names its own library."""
_LAZY_BINDING: Final = "import os, sys; sys.setdlopenflags(os.RTLD_LAZY)\n"
_WHOLE_FOLDERS: Final = ("triton", "nvidia/cu13/include", "nvidia/cudnn/include", "nvidia/nvshmem/include")


def leave_out_cuda(site_packages: Path) -> int:
    """Bytes that are gone.

    Raises:
        SystemExit: no such torch lies there.
    """
    empty, libraries = site_packages / _EMPTY, sorted((site_packages / "nvidia").rglob("lib*.so*"))
    if not empty.is_file() or not libraries:
        raise SystemExit(f"{site_packages} holds no CUDA build of torch; expected {_EMPTY} and libraries under nvidia/")
    gone = 0
    for library in libraries:
        if library.name.partition(".so")[0] + ".so" in _KEPT:
            continue
        gone += library.lstat().st_size
        library.unlink()
        library.symlink_to(os.path.relpath(empty, library.parent))
    (site_packages / "lazy_binding.pth").write_text(_LAZY_BINDING)
    for folder in _WHOLE_FOLDERS:
        gone += sum(file.lstat().st_size for file in (site_packages / folder).rglob("*") if file.is_file())
        shutil.rmtree(site_packages / folder, ignore_errors=True)
    return gone


if __name__ == "__main__":
    print(f"{leave_out_cuda(Path(sys.argv[1])) / 1e9:.1f} GB of CUDA left out")
