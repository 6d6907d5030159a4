"""Steps of a run directory are skipped only if nothing that they depend on has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.platform.errors import ConfigError
from reelway.platform.run_directory import RunDirectory, digest_of, digest_of_files


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def do(run: RunDirectory, name: str, **options: Any) -> bool:
    """Whether the work was done this time."""
    with run.step(name, **({"config": {}} | options)) as step:
        if not step.cached:
            step.summary["value"] = 42
    return not step.cached


def test_repeated_step_is_skipped_with_its_summary(run: RunDirectory) -> None:
    assert do(run, "simulate", config={"seed": 0})
    assert not do(run, "simulate", config={"seed": 0})
    with run.step("simulate", config={"seed": 0}) as step:
        assert step.summary == {"value": 42}


def test_record_contains_the_configuration(run: RunDirectory) -> None:
    do(run, "simulate", config={"seed": 7})
    record = json.loads((run.path / "steps" / "simulate.json").read_text())
    assert record["config"] == {"seed": 7}
    assert record["elapsed_s"] >= 0
    assert record["summary"] == {"value": 42}
    assert record["version"]


def test_changed_configuration_reruns_the_step(run: RunDirectory) -> None:
    do(run, "simulate", config={"seed": 0})
    assert do(run, "simulate", config={"seed": 1})
    assert do(run, "simulate", config={"seed": 0})


def test_key_order_of_the_configuration_does_not_matter(run: RunDirectory) -> None:
    do(run, "simulate", config={"a": 1, "b": 2})
    assert not do(run, "simulate", config={"b": 2, "a": 1})


def test_changed_step_reruns_only_dependent_steps(run: RunDirectory) -> None:
    def everything(seed: int) -> list[str]:
        steps = {"simulate": (), "features": ("simulate",), "train": ("features",), "other": ()}
        return [
            name
            for name, after in steps.items()
            if do(run, name, after=after, config={"seed": seed} if name == "simulate" else {})
        ]

    assert everything(0) == ["simulate", "features", "train", "other"]
    assert everything(0) == []
    assert everything(1) == ["simulate", "features", "train"]


def test_input_file_is_compared_by_content(run: RunDirectory, tmp_path: Path) -> None:
    path = tmp_path / "blend.yaml"
    path.write_text("a")
    do(run, "release", inputs=[path])
    path.write_text("a")
    assert not do(run, "release", inputs=[path])
    path.write_text("b")
    assert do(run, "release", inputs=[path])


def test_missing_output_reruns_the_step(run: RunDirectory, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.touch()
    do(run, "train", outputs=[output])
    assert not do(run, "train", outputs=[output])
    output.unlink()
    assert do(run, "train", outputs=[output])


def test_force_reruns_the_step(run: RunDirectory) -> None:
    do(run, "train")
    assert do(run, "train", force=True)


def test_failed_step_is_not_recorded(run: RunDirectory) -> None:
    do(run, "train", config={"lr": 1})
    with pytest.raises(KeyboardInterrupt), run.step("train", config={"lr": 2}):
        raise KeyboardInterrupt
    assert not run.record_path("train").exists()
    assert do(run, "train", config={"lr": 1})


def test_missing_predecessor_error_names_the_command(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="step 'features' has not finished in this run; run `reelway features --run"):
        do(run, "train", after=("features",))


def test_digest_of_files_depends_on_content_and_order(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("a")
    b.write_text("b")
    assert digest_of_files([a, b]) == digest_of_files([a, b])
    assert digest_of_files([a, b]) != digest_of_files([b, a])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=4))
def test_digest_of_a_value_does_not_depend_on_key_order(value: dict[str, Any]) -> None:
    assert digest_of(json.loads(json.dumps(value))) == digest_of(value)
    assert digest_of(dict(reversed(value.items()))) == digest_of(value)


def test_path_that_fsspec_would_split_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a::b'?.*contains '::'"):
        RunDirectory(tmp_path / "a::b" / "run")
