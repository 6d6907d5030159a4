"""Loads a settings file (YAML) into a pydantic model and explains what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from reelway.platform.errors import ConfigError
from reelway.platform.validation_errors import explain_problem

ModelT = TypeVar("ModelT", bound=BaseModel)


def load_settings(model: type[ModelT], path: Path | None, overrides: Mapping[str, Any] | None = None) -> ModelT:
    """Reads and checks a settings file.

    Args:
        path: YAML file. None stands for an empty file: every setting has its default or comes from ``overrides``.
        overrides: nested settings that replace those of the file, such as command-line options; None values are
            ignored. Environment variables of a pydantic-settings model replace both.

    Raises:
        ConfigError: if the file cannot be read or is not a YAML mapping, or a setting is unknown, missing or invalid.
            The message has one line per problem, each with the setting's path.
    """
    document = merged({} if path is None else _read_mapping(path), overrides or {})
    source = "settings" if path is None else str(path)
    try:
        return model(**document)
    except ValidationError as error:
        lines = [explain_problem(model, problem, source) for problem in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from error
    except SettingsError as error:
        prefix = str(model.model_config.get("env_prefix", ""))
        names = sorted(name for name in os.environ if name.upper().startswith(prefix))
        raise ConfigError(f"{', '.join(names)}: {error}; write lists and mappings as JSON") from error


def merged(document: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``document`` with the values of ``overrides`` merged into it, key by key. None values are ignored."""
    result = dict(document)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            below = result.get(key)
            if below is None or isinstance(below, Mapping):  # anything else is reported by the validation
                result[key] = merged(below or {}, value)
        elif value is not None:
            result[key] = value
    return result


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the settings file: {error}; pass another file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: saw {loaded!r}, expected a mapping of settings")
    return loaded
