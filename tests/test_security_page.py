"""Every row of SECURITY.md names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (?!asset |---).*\| \[`(\S+)`\]\((\S+)\) \|$", re.M)
ROWS = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if re.match(r"^\| (?!asset )", line)]


@pytest.mark.parametrize("row", ROWS)
def test_row_names_a_test_that_exists(row: str) -> None:
    found = ROW.match(row)
    assert found, row
    name, path = found.groups()
    text = (ROOT / path).read_text()
    assert name == Path(path).name or re.search(rf"^def {name}\(", text, re.M), row


def test_page_has_rows() -> None:
    assert len(ROWS) > 50
