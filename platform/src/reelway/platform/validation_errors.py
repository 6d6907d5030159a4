"""Explains pydantic's validation errors of settings, policies and configurations: path, value and expectation."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel


def explain_problem(model: type[BaseModel], problem: Mapping[str, Any], source: str) -> str:
    """Returns one line for one pydantic error: source, path, value seen and value expected.

    Args:
        model: the validated model; its ``env_prefix`` names the environment variables that may have set the value.
        problem: an element of ``ValidationError.errors()``.
        source: name of the file or document, used unless an environment variable set the value.
    """
    location: Sequence[str | int] = problem["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    origin = _environment_variable(model, location) or source
    subject = f"{origin}: {path}" if path else origin
    if problem["type"] == "extra_forbidden":
        return f"{subject}: unknown key, expected one of {_keys_at(model, location[:-1])}"
    if problem["type"] == "missing":
        return f"{subject}: missing, and it has no default"
    if problem["type"] == "value_error":
        return f"{subject}: {problem['ctx']['error']}"
    if problem["type"] == "model_type":
        return f"{subject}: saw {problem['input']!r}, expected a mapping with the keys {_keys_at(model, location)}"
    expected = str(problem["msg"]).removeprefix("Input should be ")
    return f"{subject}: saw {problem['input']!r}, expected {expected}"


def known_keys(model: type[BaseModel]) -> str:
    """Returns the names of a model's fields, sorted and separated by commas."""
    return ", ".join(sorted(model.model_fields))


def _environment_variable(model: type[BaseModel], location: Sequence[str | int]) -> str | None:
    """Returns the environment variable that set the value at ``location``; None if no variable did."""
    prefix = str(model.model_config.get("env_prefix", ""))
    if not prefix:
        return None
    names = {name.upper() for name in os.environ}
    for length in range(len(location), 0, -1):
        name = (prefix + "__".join(str(part) for part in location[:length])).upper()
        if name in names:
            return name
    return None


def _keys_at(model: type[BaseModel], location: Sequence[str | int]) -> str:
    nested: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, str):
            field = nested.model_fields.get(part) if nested else None
            nested = _model_in(field.annotation) if field else None
    return known_keys(nested) if nested else "(none)"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        for inner in get_args(annotation):
            if found := _model_in(inner):
                return found
    return None
