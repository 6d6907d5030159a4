"""Loads a settings file (YAML) into a pydantic model and explains what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

from reelway.platform.errors import ConfigError

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


def explain_problem(model: type[BaseModel], problem: Mapping[str, Any], source: str) -> str:
    """Returns one line for one pydantic error: source, path, value seen and value expected."""
    location: Sequence[str | int] = problem["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    origin = _environment_variable(model, location) or source
    if problem["type"] == "extra_forbidden":
        return f"{origin}: {path}: unknown key, expected one of {', '.join(_known_keys(model, location[:-1]))}"
    if problem["type"] == "missing":
        return f"{origin}: {path}: missing, and it has no default"
    if problem["type"] == "value_error":
        return f"{origin}: {path}: {problem['ctx']['error']}"
    expected = str(problem["msg"]).removeprefix("Input should be ")
    return f"{origin}: {path}: saw {problem['input']!r}, expected {expected}"


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the settings file: {error}; pass another one with --config") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"{path}: saw {loaded!r}, expected a mapping of settings")
    return loaded


def _environment_variable(model: type[BaseModel], location: Sequence[str | int]) -> str | None:
    """The environment variable that the setting at ``location`` came from, if one is set."""
    prefix = str(model.model_config.get("env_prefix", ""))
    if not prefix:
        return None
    names = {name.upper() for name in os.environ}
    for length in range(len(location), 0, -1):
        name = (prefix + "__".join(str(part) for part in location[:length])).upper()
        if name in names:
            return name
    return None


def _known_keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel))
    return sorted(model.model_fields)
