"""The training configuration: merging of presets, files and single values, and its error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelway.pipelines.training.config import PRESETS, TrainingConfig, load_config
from reelway.platform.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_is_equal_after_a_dump_and_a_load(preset: str) -> None:
    config = load_config(preset)
    assert TrainingConfig(**config.model_dump()) == config
    assert TrainingConfig.model_validate_json(config.model_dump_json()) == config


def test_override_precedes_the_file_which_precedes_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("two_tower: {dim: 32, layers: 2}\nranker_loop: {lr: 1e-3}\n")
    config = load_config("demo", file, ["two_tower.layers=3", "two_tower_loop.max_steps_per_epoch=null"], seed=9)
    assert (config.two_tower.dim, config.two_tower.layers, config.seed) == (32, 3, 9)
    assert config.ranker_loop.lr == 0.001
    assert config.two_tower.history_length == load_config("demo").two_tower.history_length


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("two_tower.dims=3", r"training configuration: two_tower\.dims: unknown key, expected one of category_dim, "),
        ("towers=3", r"towers: unknown key, expected one of calibration_fraction, "),
        ("two_tower.dim=many", r"two_tower\.dim: saw 'many', expected a valid integer"),
        ("two_tower.dim=true", r"two_tower\.dim: saw True, expected a valid integer"),
        ("two_tower.dim=0", r"two_tower\.dim: saw 0, expected greater than or equal to 2"),
        ("two_tower.dim=7", r"two_tower: dim 7 is not a multiple of heads 2"),
        ("two_tower_loop.lr=fast", r"two_tower_loop\.lr: saw 'fast', expected a valid number"),
        ("ranker.kind=ple", r"ranker\.kind: saw 'ple', expected 'shared_bottom' or 'mmoe'"),
        ("ranker.task_weights={watch: 1.0}", r"ranker\.task_weights\.watch.*expected one of long_watch"),
        ("two_tower=3", r"two_tower: saw 3, expected a mapping with the keys category_dim, "),
        ("train_fraction=1.5", r"train_fraction: saw 1\.5, expected less than or equal to 1"),
        ("two_tower.learn_temperature=3", r"two_tower\.learn_temperature: saw 3, expected a valid boolean"),
        ("seed", "has no '='"),
        ("seed=[", "the value is not YAML"),
    ],
)
def test_error_names_path_value_and_expectation(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", overrides=[override])


def test_unknown_preset_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'big'"):
        load_config("big")


def test_file_without_a_mapping_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config("demo", tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config("demo", tmp_path / "list.yaml")
