"""``python infra/images build NAME...``: builds images as OCI archives, with docker, podman or buildah.

Environment variables configure the build on this machine and are not stored in an image: ``REELWAY_CA_BUNDLE``
(certificates for the package index), ``REELWAY_PIP_CONFIG`` (a pip.conf), ``REELWAY_DEBIAN_MIRROR`` (for ``base``).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from build_context import IMAGES, REPOSITORY, copy_sources, image_name, version
from builders import BuilderError, find_builder
from debian_base import BASE_IMAGE, make_base
from node_images import NODE_IMAGES, build_node_image
from sbom import write_bill_of_materials

_BEGAN = time.monotonic()


def print_progress(line: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {line}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python infra/images", description=__doc__.partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="build a Debian 12 base with debootstrap, for machines without a registry")
    base.add_argument(
        "--again", action="store_true", help="build the base image again if it exists, with Debian's newest packages"
    )
    build = commands.add_parser("build", help="build images and write an archive for each")
    build.add_argument(
        "names",
        nargs="+",
        choices=[*IMAGES, "all"],
        metavar="NAME",
        help=f"image to build: {', '.join([*IMAGES, 'all'])}",
    )
    build.add_argument(
        "--base", help=f"base image instead of the Dockerfile's; the command `base` builds `{BASE_IMAGE}`"
    )
    build.add_argument(
        "--torch",
        choices=("cuda", "cpu"),
        default="cuda",
        help="torch build in the training image (default: %(default)s)",
    )
    build.add_argument("--tag", default=version(), help="tag of the images (default: %(default)s)")
    node = commands.add_parser("node", help="build images of servers for the test node from programs of this machine")
    node.add_argument(
        "names",
        nargs="+",
        choices=sorted(NODE_IMAGES),
        metavar="NAME",
        help=f"image to build: {', '.join(NODE_IMAGES)}",
    )
    for each in (base, build, node):
        each.add_argument(
            "--out",
            type=Path,
            default=REPOSITORY / ".cluster" / "images",
            help="folder that the archives are written to (default: %(default)s)",
        )
    options = parser.parse_args()
    try:
        if options.command == "base":
            builder = find_builder()
            if options.again or not builder.digest_of(BASE_IMAGE):
                make_base(builder, options.out, os.environ.get("REELWAY_DEBIAN_MIRROR"), print_progress)
        elif options.command == "node":
            for name in options.names:
                archive = build_node_image(find_builder(), name, options.out, print_progress)
                print(f"{archive}\t{archive.stat().st_size / 1e6:.0f} MB compressed", flush=True)
        else:
            names = IMAGES if "all" in options.names else tuple(dict.fromkeys(options.names))
            arguments = {"BASE": options.base} if options.base else {}
            build_images(names, options.tag, {**arguments, "TORCH": options.torch}, options.out)
    except BuilderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build_images(names: tuple[str, ...], tag: str, arguments: dict[str, str], out: Path) -> None:
    """Builds each image and writes its archive, its bill of materials and its licences into ``out``."""
    builder = find_builder()
    print_progress(f"building with {builder.program}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        context = copy_sources(Path(folder))
        for name in names:
            image, archive = image_name(name, tag), out / f"{name}.tar"
            dockerfile = context / "infra" / "images" / f"{name}.Dockerfile"
            builder.build(dockerfile, context, image, _declared_args(arguments, dockerfile))
            print_progress(f"{image} is built")
            builder.save(image, archive)
            print(f"{image}\t{archive}\t{archive.stat().st_size / 1e6:.0f} MB compressed", flush=True)
            for path in write_bill_of_materials(builder, image, archive):
                print(f"{image}\t{path}", flush=True)


def _declared_args(arguments: dict[str, str], dockerfile: Path) -> dict[str, str]:
    """Arguments that the Dockerfile declares with ``ARG``. Builders warn about others."""
    return {name: value for name, value in arguments.items() if f"ARG {name}=" in dockerfile.read_text()}


if __name__ == "__main__":
    sys.exit(main())
