"""Tests of ``make bench-report``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = {"date": "2026-01-31", "commit": "0123456789", "machine": "Test CPU, 2 cores, 8 GiB"}
ROWS = [
    {"metric": "simulator", "value": 880_000.0, "unit": "impressions/s", "bar": ">= 200,000", "holds": True},
    {"metric": "simulator, a|b", "value": 1.23456, "unit": "x", "bar": "2", "holds": False},
    {"metric": "no bar", "value": 0.0, "unit": "s", "bar": "", "holds": None},
]


def report(results: Path, page: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.bench_report", "--results", str(results), "--output", str(page)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def write_result(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(ROWS))
    (folder / f"{name}.run.json").write_text(json.dumps(RUN))


def test_page_states_value_bar_and_origin_of_each_result(tmp_path: Path) -> None:
    write_result(tmp_path / "bench", "simulator")
    page = tmp_path / "page.md"
    assert report(tmp_path / "bench", page).returncode == 0
    text = page.read_text()
    assert "| [simulator](#simulator) | `make bench-simulator` | 2026-01-31 | 0123456789 | 1 of 2 |" in text
    assert "| simulator | 880,000 | impressions/s | >= 200,000 | yes |" in text
    assert r"| simulator, a\|b | 1.235 | x | 2 | **no** |" in text
    assert "| no bar | 0 | s |  |  |" in text
    assert "Machine: Test CPU, 2 cores, 8 GiB." in text


def test_page_lists_every_benchmark_without_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert report(tmp_path, page).returncode == 0
    written = {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r'\bwrite_report\(\s*"(\w+)"', path.read_text())
    }
    assert {"simulator", "e2e"} <= written
    assert written == set(re.findall(r"^\| \[(\w+)\].*\| not measured \|", page.read_text(), flags=re.MULTILINE))


def test_report_rejects_a_result_of_an_unknown_benchmark(tmp_path: Path) -> None:
    write_result(tmp_path / "bench", "unheard_of")
    result = report(tmp_path / "bench", tmp_path / "page.md")
    assert result.returncode == 1
    assert "unknown benchmarks ['unheard_of']" in result.stderr
    assert not (tmp_path / "page.md").exists()


def test_report_rejects_a_result_without_its_run(tmp_path: Path) -> None:
    write_result(tmp_path / "bench", "simulator")
    (tmp_path / "bench" / "simulator.run.json").unlink()
    result = report(tmp_path / "bench", tmp_path / "page.md")
    assert result.returncode == 1
    assert "simulator.run.json" in result.stderr
