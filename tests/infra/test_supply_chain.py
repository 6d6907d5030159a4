"""What images are made of: bases by digest, packages by hash, a bill of materials and licences beside each archive."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from tests.support.infra.scripts import load_script

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "infra" / "images"
HASHED = ROOT / "constraints-hashed.txt"
dependencies = load_script("images/dependencies.py")
inventory = load_script("images/inventory.py")


@pytest.fixture(scope="module")
def images() -> ModuleType:
    """The module that writes bills of materials, with its neighbours importable."""
    sys.path.insert(0, str(IMAGES))
    try:
        return load_script("images/sbom.py")
    finally:
        sys.path.remove(str(IMAGES))


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.Dockerfile")), ids=lambda path: path.name)
def test_base_images_are_named_by_digest(path: Path) -> None:
    text = path.read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert bases
    assert set(bases) - stages <= {"scratch", "${BASE}"}
    if "${BASE}" in bases:
        [default] = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
        assert re.search(r"@sha256:[0-9a-f]{64}$", default) or default.startswith("reelway.local/")
    assert "http" not in re.sub(r"^#.*$", "", text, flags=re.MULTILINE)  # nothing is downloaded by URL


def test_hashes_cover_exactly_the_pinned_packages() -> None:
    pins = dependencies.read_pins(HASHED.read_text())
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    entries = [entry.split(" \\\n")[0] for own in pins.values() for entry in own]
    assert sorted(entries) == sorted(pinned)
    assert len(dependencies.hashed_entries(pins, pins)) == len(pinned) > 200


def test_package_without_a_hash_is_rejected() -> None:
    pins = dependencies.read_pins("a==1\nb==2 \\\n    --hash=sha256:00\n")
    assert dependencies.hashed_entries(["B"], pins) == ["b==2 \\\n    --hash=sha256:00"]
    for name in ("a", "c"):
        with pytest.raises(SystemExit, match=f"no version with hashes of '{name}'; run `make constraints`"):
            dependencies.hashed_entries([name], pins)


def test_installed_package_that_is_not_pinned_is_reported() -> None:
    pins = dependencies.read_pins(HASHED.read_text())
    frozen = ["PyYAML==6.0.3\n", "typing_extensions==4.16.0\n", "numpy==0.1\n", "leftpad==1\n", "\n"]
    assert dependencies.unknown_packages(frozen, pins) == ["numpy==0.1", "leftpad==1"]


def test_installer_rejects_a_file_with_another_hash(tmp_path: Path) -> None:
    """uv compares the hashes of constraints, for requirements without a version too."""
    name = "thing-1.0-py3-none-any.whl"
    record, metadata = "thing-1.0.dist-info/RECORD", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
    with zipfile.ZipFile(tmp_path / name, "w") as wheel:
        wheel.writestr("thing-1.0.dist-info/METADATA", metadata)
        wheel.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(metadata.encode()).digest()).rstrip(b"=").decode()
        wheel.writestr(record, f"thing-1.0.dist-info/METADATA,sha256={digest},{len(metadata)}\n{record},,\n")
    right = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

    def install(sha256: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "constraints.txt").write_text(f"thing==1.0 --hash=sha256:{sha256}\n")
        (tmp_path / "list.txt").write_text("thing\n")
        command = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--no-index", "--find-links", "."]
        command += ["--no-cache", "--target", "installed", "-c", "constraints.txt", "-r", "list.txt"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)

    refused = install("0" * 64)
    assert refused.returncode != 0
    assert "Hash mismatch for `thing==1.0`" in refused.stderr
    accepted = install(right)
    assert accepted.returncode == 0, accepted.stderr


def contents() -> dict[str, Any]:
    """The inventory of this environment, as it is run inside an image."""
    script = (IMAGES / "inventory.py").read_text()
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_bill_of_materials_is_valid_with_licences(images: ModuleType) -> None:
    found = contents()
    text = images.bill_of_materials("reelway.local/serving:1", "sha256:abc", found)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    assert document["metadata"]["component"]["name"] == "reelway.local/serving"
    components = {one["purl"].split("?")[0]: one for one in document["components"]}
    numpy = next(one for purl, one in components.items() if purl.startswith("pkg:pypi/numpy@"))
    assert "BSD-3-Clause" in json.dumps(numpy["licenses"])
    assert len(components) == len(found["python"]) + len({(one["name"], one["version"]) for one in found["debian"]})
    listed = images.licence_list(found).splitlines()
    assert len(listed) == 1 + len(found["python"]) + len(found["debian"])
    licence = {line.split("\t")[1]: line.split("\t")[3] for line in listed}
    assert licence["reelway-platform"] == "Apache-2.0"


def test_licences_of_debian_packages_are_read(tmp_path: Path) -> None:
    status = tmp_path / "status"
    paragraph = "Package: {0}\nStatus: {1}\nArchitecture: amd64\nVersion: 1-2\nDescription: a\n b\n"
    names = (
        ("listed", "install ok installed"),
        ("text", "install ok installed"),
        ("gone", "deinstall ok config-files"),
    )
    status.write_text("\n".join(paragraph.format(*one) for one in names))
    for name, text in (("listed", "Files: *\nLicense: MIT\n text\n\nLicense: GPL-2+\n"), ("text", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "copyright").write_text(text or "See `/usr/share/common-licenses/LGPL-2.1'.")
    found = inventory.debian_packages(status, tmp_path)
    assert [(one["name"], one["version"], one["licence"]) for one in found] == [
        ("listed", "1-2", "GPL-2+, MIT"), ("text", "1-2", "LGPL-2.1"),
    ]  # fmt: skip


def test_debian_base_keeps_licences_alone(tmp_path: Path) -> None:
    sys.path.insert(0, str(IMAGES))
    try:
        base = load_script("images/debian_base.py")
    finally:
        sys.path.remove(str(IMAGES))
    for name in ("copyright", "changelog.gz", "examples/a.c"):
        path = tmp_path / "gcc-12-base" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    (tmp_path / "libgcc").symlink_to("gcc-12-base")
    base.keep_copyright_files(tmp_path)
    assert (tmp_path / "libgcc" / "copyright").exists()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "gcc-12-base" / "copyright"]


BUILDAH = """#!/bin/sh
case "$1" in
from) echo "made $3" >>"$PLACE/calls"; echo container-1 ;;
run) test ! -e "$PLACE/broken" || { echo "no python3" >&2; exit 127; }
    exec "$PYTHON" - ;;
rm) echo "removed $2" >>"$PLACE/calls" ;;
inspect) echo sha256:abc ;;
esac
"""


@pytest.fixture
def buildah(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of buildah that runs Python programs on this machine. Returns its folder."""
    program = tmp_path / "bin" / "buildah"
    program.parent.mkdir()
    program.write_text(BUILDAH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("PYTHON", sys.executable)
    return tmp_path


def test_bill_of_materials_is_written_beside_the_archive(images: ModuleType, buildah: Path) -> None:
    builder = images.Builder("buildah")
    written = images.write_bill_of_materials(builder, "reelway.local/serving:1", buildah / "serving.tar")
    assert [path.name for path in written] == ["serving.cdx.json", "serving.licences.tsv"]
    assert json.loads(written[0].read_text())["bomFormat"] == "CycloneDX"
    assert (buildah / "calls").read_text().splitlines() == ["made reelway.local/serving:1", "removed container-1"]
    (buildah / "broken").touch()
    with pytest.raises(images.BuilderError, match="no python3"):
        images.write_bill_of_materials(builder, "reelway.local/serving:1", buildah / "serving.tar")
    assert (buildah / "calls").read_text().splitlines()[-1] == "removed container-1"


AUDIT = """#!/bin/sh
while [ "$1" != --output ]; do shift; done
case "$MODE" in
unreachable) echo "ERROR:pip_audit._cli:Could not connect to OSV" >&2; exit 1 ;;
clean) echo '{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}' >"$2" ;;
*) echo '{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}]}]}' >"$2"
    exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    ("mode", "code", "line"),
    [
        (
            "unreachable",
            3,
            "audit: nothing was checked: the advisory source 'osv' gave no answer: ERROR:pip_audit._cli:",
        ),
        ("clean", 0, "audit: 1 packages checked, 0 vulnerabilities"),
        ("vulnerable", 1, "a 1: CVE-1, fixed in 1.1"),
    ],
)
def test_audit_tells_findings_from_an_unreachable_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, code: int, line: str
) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(AUDIT)
    program.chmod(0o755)
    monkeypatch.setenv("MODE", mode)
    command = [sys.executable, str(IMAGES / "audit.py"), "--pip-audit", str(program), str(HASHED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert line in done.stdout
