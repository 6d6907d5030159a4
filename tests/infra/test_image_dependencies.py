"""Dependencies of images: serving and training share a layer, and torch for CPUs comes without CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.infra.scripts import load_script

dependencies = load_script("images/dependencies.py")
without_cuda = load_script("images/without_cuda.py")
ROOT = Path(__file__).parents[2]


def test_shared_requirements_keep_common_extras_with_bounds() -> None:
    some = ["feast[duckdb,redis]", "only-here", "pydantic>=2", "ray[serve]", "numpy>=1"]
    others = ["feast[duckdb,redis]", "numpy>=2", "only-there", "pydantic>=2", "ray[data,train]"]
    assert dependencies.shared_requirements(some, others) == ["feast[duckdb,redis]", "numpy", "pydantic>=2", "ray"]


def test_serving_shares_large_packages_with_training() -> None:
    serving, training = (dependencies.requirements([one, "platform[s3]"], ROOT) for one in ("serving", "pipelines"))
    both = dependencies.shared_requirements(serving, training)
    assert {"ray", "feast[duckdb,redis]", "pyarrow", "onnxruntime", "s3fs"} <= set(both)
    assert not any("torch" in one or "serve" in one for one in both)


def test_requirements_follow_members() -> None:
    assert "kubernetes" in dependencies.requirements(["platform[cluster]"], ROOT)
    with pytest.raises(SystemExit, match="platform has no extra 'gpu'; it has"):
        dependencies.requirements(["platform[gpu]"], ROOT)


def test_torch_for_cpus_excludes_unused_cuda_packages() -> None:
    left_out = without_cuda.excluded_packages((ROOT / "constraints.txt").read_text().splitlines())
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"} <= set(left_out)
    assert not {"torch", "nvidia-cuda-runtime", "nvidia-cuda-cupti"} & set(left_out)


def test_folder_without_torch_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no torch for Linux, expected .*libtorch_global_deps\.so"):
        without_cuda.link_empty_libraries(tmp_path)
