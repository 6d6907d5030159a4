"""Training configuration: presets, then a file, then single values; nothing misspelt gets through."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelway.pipelines.training.config import PRESETS, TrainingConfig, load_config
from reelway.platform.errors import ConfigError


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_survives_being_written_down_and_read_again(preset: str) -> None:
    config = load_config(preset)
    assert TrainingConfig.from_dict(config.to_dict()) == config


def test_a_single_value_beats_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("two_tower: {dim: 32, layers: 2}\nranker_loop: {lr: 1e-3}\n")
    config = load_config("demo", file, ["two_tower.layers=3", "two_tower_loop.max_steps_per_epoch=null"], seed=9)
    assert (config.two_tower.dim, config.two_tower.layers, config.seed) == (32, 3, 9)
    assert config.ranker_loop.lr == 0.001
    assert config.two_tower.history_length == load_config("demo").two_tower.history_length


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("two_tower.dims=3", r"unknown name 'two_tower\.dims'"),
        ("two_tower.dim=many", r"two_tower\.dim is 'many', expected int"),
        ("two_tower.dim=7", "no multiple of two_tower.heads"),
        ("ranker.kind=ple", r"ranker\.kind is 'ple'"),
        ("two_tower=3", "expected a mapping|is a value|two_tower is 3"),
        ("train_fraction=1.5", "train_fraction is 1.5"),
        ("two_tower.learn_temperature=3", "expected bool"),
        ("seed", "has no '='"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", overrides=[override])


def test_an_unknown_preset_and_an_unreadable_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'big'"):
        load_config("big")
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config("demo", tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config("demo", tmp_path / "list.yaml")
