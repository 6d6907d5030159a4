"""Checks the structure of the repository: import rules, packages, names, docstrings, sizes and links."""

from __future__ import annotations

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MEMBERS = ("platform", "pipelines", "serving")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def tracked(*patterns: str) -> list[Path]:
    """Returns the files of the checkout that git does not ignore, whether committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return sorted(path for path in {ROOT / line for line in listed.splitlines()} if path.exists())


def modules() -> list[Path]:
    return [path for member in MEMBERS for path in tracked(f"{member}/src/**/*.py")]


def test_import_rules_hold() -> None:
    checked = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert re.search(r"Contracts: [5-9] kept, 0 broken", checked.stdout), checked.stdout


def test_namespace_and_top_level_folders_are_not_packages() -> None:
    """``reelway/__init__.py`` in one member hides the others; ``platform/__init__.py`` hides Python's ``platform``."""
    forbidden = [ROOT / member / "src" / "reelway" / "__init__.py" for member in MEMBERS]
    forbidden += [folder / "__init__.py" for folder in ROOT.iterdir() if folder.is_dir() and folder.name[0] != "."]
    forbidden += [ROOT / member / "src" / "__init__.py" for member in MEMBERS]
    assert [path for path in forbidden if path.exists()] == []
    import platform

    assert Path(platform.__file__ or "").is_relative_to(sys.base_prefix)


def test_test_modules_have_unique_names_outside_packages() -> None:
    tests = tracked("tests/**/*.py", "tests/*.py")
    assert [path for path in tests if path.name == "__init__.py"] == []
    names = [path.name for path in tests if path.name.startswith("test_")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_members_have_their_modules_under_src_reelway() -> None:
    for member in MEMBERS:
        assert (ROOT / member / "src" / "reelway" / member / "__init__.py").exists()
    assert len(modules()) > 30


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_has_an_allowed_name_with_a_docstring(path: Path) -> None:
    name = path.parent.name if path.name == "__init__.py" else path.stem
    assert name not in FORBIDDEN_NAMES
    is_member = path.name == "__init__.py" and path.parent.parent.name == "reelway"  # reelway.platform, a full name
    assert is_member or name not in sys.stdlib_module_names, f"{name} is also a module of the standard library"
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) if tree.body else "an empty __init__.py needs no docstring"
    assert docstring, "the first line says what the module is or does"
    assert "laceholder" not in docstring


def test_modules_have_at_most_five_hundred_lines() -> None:
    """The aim is 400. A longer module is split by concept."""
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_readme_has_at_most_160_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def imported_modules(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", tracked("tests/**/*.py", "tests/*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_and_benchmarks_share_only_the_builders_in_support(path: Path) -> None:
    own = "tests.benchmarks" if path.is_relative_to(ROOT / "tests" / "benchmarks") else "tests.support"
    shared = {name for name in imported_modules(path) if name.startswith("tests.")}
    assert {name for name in shared if not name.startswith((own, "tests.support"))} == set()


@pytest.mark.parametrize("path", tracked("*.py"), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_do_not_start_with_why(path: Path) -> None:
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [
        ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, nodes)
    ]
    assert [text for text in docstrings if text.startswith("Why:")] == []


def defined_names(path: Path) -> set[str]:
    """Returns the names that a module binds. Members of a class and its attributes are ``Class.name``."""
    names: set[str] = set()

    def visit(node: ast.AST, owner: str, in_body: bool) -> None:
        prefix = owner if in_body else ""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                names.update((child.name, f"{prefix}{child.name}"))
                visit(child, f"{child.name}.", True)
                continue
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                names.update((child.name, f"{prefix}{child.name}"))
                visit(child, owner, False)
                continue
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                names.update((child.id, f"{prefix}{child.id}"))
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                names.add(f"{owner}{child.attr}")
            elif isinstance(child, ast.arg):
                names.add(child.arg)
            visit(child, owner, in_body)

    visit(ast.parse(path.read_text()), "", True)
    return names


def test_retired_names_do_not_come_back() -> None:
    """``retired_names.tsv`` lists each retired name with the module that defined it and the name in use now."""
    with (ROOT / "tests" / "retired_names.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert len(rows) > 500
    defined = {path: defined_names(ROOT / path) for path in {row["path"] for row in rows} if (ROOT / path).exists()}
    modules_back = [row["path"] for row in rows if row["kind"] == "module" and row["path"] in defined]
    names_back = [
        f"{row['path']}: {row['retired']} is now {row['name now']}"
        for row in rows
        if row["kind"] == "name" and row["retired"] in defined.get(row["path"], ())
    ]
    assert modules_back + names_back == []


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def anchors(page: Path) -> set[str]:
    """Returns GitHub's anchors of a page's headings: lower case, no punctuation, hyphens instead of blanks."""
    headings = re.findall(r"^#+\s+(.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", tracked("*.md"), ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_no_broken_links(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        reached = linked.exists() and (not anchor or linked.suffix != ".md" or anchor in anchors(linked))
        if not reached or not linked.is_relative_to(ROOT):
            broken.append(target)
    assert broken == []


def test_command_entry_points_are_callable() -> None:
    from importlib.metadata import entry_points

    entries = list(entry_points(group="reelway.commands"))
    assert {"release", "release-build"} <= {entry.name for entry in entries}
    for entry in entries:
        assert callable(entry.load())
