"""Writes an image's bill of materials (CycloneDX 1.6, JSON) and the list of its licences beside its archive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from builders import Builder, BuilderError
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

INVENTORY: Final = Path(__file__).with_name("inventory.py")
UNKNOWN: Final = "unknown"


def write_bill_of_materials(builder: Builder, image: str, archive: Path) -> tuple[Path, Path]:
    """Runs the inventory inside an image and writes ``NAME.cdx.json`` and ``NAME.licences.tsv`` beside the archive.

    Raises:
        BuilderError: if the image cannot run, or its output is no inventory.
    """
    output = builder.run_program(image, INVENTORY)
    try:
        contents = json.loads(output)
    except ValueError as error:
        raise BuilderError(f"{image}: the inventory is not JSON ({error}): {output[:200]!r}") from error
    bom, licences = archive.with_suffix(".cdx.json"), archive.with_suffix(".licences.tsv")
    bom.write_text(bill_of_materials(image, builder.digest_of(image), contents))
    licences.write_text(licence_list(contents))
    return bom, licences


def bill_of_materials(image: str, digest: str, contents: Mapping[str, Any]) -> str:
    """Returns the bill of materials as JSON.

    Args:
        image: the image's name and tag.
        digest: identity of the image's content.
        contents: output of ``inventory.py``.
    """
    name, _, tag = image.rpartition(":")
    bom = Bom()
    bom.metadata.component = Component(
        name=name, version=tag, type=ComponentType.CONTAINER, bom_ref=f"{image}@{digest}",
        properties=[
            Property(name="reelway:image:id", value=digest), Property(name="reelway:system", value=contents["system"]),
            Property(name="reelway:python", value=contents["python_version"]),
        ],
    )  # fmt: skip
    for package in contents["python"]:
        bom.components.add(_component(package, PackageURL("pypi", None, package["name"].lower(), package["version"])))
    for package in contents["debian"]:
        where = {"arch": package["architecture"]}
        bom.components.add(_component(package, PackageURL("deb", "debian", package["name"], package["version"], where)))
    bom.register_dependency(bom.metadata.component, bom.components)
    return str(JsonV1Dot6(bom).output_as_string(indent=2))


def licence_list(contents: Mapping[str, Any]) -> str:
    """Returns one line per package: kind, name, version, licence."""
    lines = ["kind\tname\tversion\tlicence"]
    for kind in ("python", "debian"):
        lines += [f"{kind}\t{one['name']}\t{one['version']}\t{one['licence'] or UNKNOWN}" for one in contents[kind]]
    return "\n".join(lines) + "\n"


def _component(package: Mapping[str, str], purl: PackageURL) -> Component:
    licence = [LicenseFactory().make_from_string(package["licence"])] if package["licence"] else []
    return Component(
        name=package["name"], version=package["version"], type=ComponentType.LIBRARY, purl=purl,
        bom_ref=purl.to_string(), licenses=licence,
    )  # fmt: skip
