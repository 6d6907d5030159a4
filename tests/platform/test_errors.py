"""The error tree and its exit codes."""

from __future__ import annotations

import re

import pytest

from reelway.platform import errors
from reelway.platform.errors import MalformedFileError, ReelwayError

DRAWN = re.findall(r"^([ │├└─]*)(\w+Error)\b(?: +exit (\d+))?", errors.__doc__ or "", flags=re.MULTILINE)
"""Indentation, name and, for branches, exit code of each error in the docstring."""
EXIT_CODES = {name: int(code) for _, name, code in DRAWN if code}


def tree() -> dict[str, type[ReelwayError]]:
    return {name: one for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, ReelwayError)}


def test_docstring_tree_lists_every_error() -> None:
    assert sorted(name for _, name, _ in DRAWN) == sorted(tree())


def test_docstring_tree_shows_each_error_below_its_base() -> None:
    path: list[tuple[int, str]] = []
    for indent, name, _ in DRAWN:
        path = [step for step in path if step[0] < len(indent)]
        if path:
            assert tree()[name].__bases__ == (tree()[path[-1][1]],)
        path.append((len(indent), name))


@pytest.mark.parametrize("name", sorted(tree()))
def test_error_has_the_exit_code_of_its_branch(name: str) -> None:
    branch = next(base for base in tree()[name].__mro__ if base.__name__ in EXIT_CODES)
    assert tree()[name].exit_code == EXIT_CODES[branch.__name__]


def test_exit_codes_of_branches_are_distinct() -> None:
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
    assert not {0, 130} & set(EXIT_CODES.values())


def test_malformed_file_error_names_row_column_value() -> None:
    error = MalformedFileError("u.data", "a rating of 1..5", seen="x", row=3, column="rating")
    assert str(error) == "u.data, row 3, column 'rating': saw 'x', expected a rating of 1..5"
    assert (error.row, error.column, error.seen) == (3, "rating", "x")
