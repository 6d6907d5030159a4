"""Builds images of servers for the test node (monitoring, Redis, Kafka) from programs of this machine.

The test node has no access to a registry. Users run such servers from their own cluster.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from build_context import REGISTRY, REPOSITORY
from builders import Builder, BuilderError
from debian_base import BASE_IMAGE

_C_LIBRARY: Final = frozenset({"libc", "libm", "libdl", "libpthread", "librt", "libresolv"})
_BUILT: Final = REPOSITORY / ".cluster" / "bin"
"""Programs that infra/cluster built."""
NODE_IMAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "monitoring": (
        "prometheus", "prometheus-config-reloader", "prometheus-alertmanager",
        "/usr/share/prometheus/alertmanager/default.tmpl", "/usr/share/prometheus/alertmanager/email.tmpl",
    ),
    "redis": ("redis-server",),
    "kafka": (),
}  # fmt: skip
"""Programs and files of this machine that the Dockerfiles copy, by image. Kafka has a Java runtime and jars instead."""
KAFKA_POM: Final = Path(__file__).with_name("kafka.pom.xml")


def build_node_image(builder: Builder, name: str, out: Path, say: Callable[[str], None]) -> Path:
    """Builds an image on the Debian base, writes its archive into ``out`` and returns the archive's path.

    Raises:
        BuilderError: if a program is missing or the build fails.
    """
    image, archive = f"{REGISTRY}/{name}:node", out / f"{name}.tar"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        (context / "lib").mkdir()
        for found in map(_find_program, NODE_IMAGES[name]):
            shutil.copy2(found, context / found.name)
            for library in _libraries(found):
                shutil.copy2(library, context / "lib" / library.name)
        if name == "kafka":
            _copy_kafka(context, say)
        builder.build(Path(__file__).with_name(f"{name}.Dockerfile"), context, image, {"BASE": BASE_IMAGE})
        say(f"{image} is built")
        builder.save(image, archive)
    return archive


def _copy_kafka(context: Path, say: Callable[[str], None]) -> None:
    """Copies the machine's Java runtime, and Kafka's jars as Maven fetches them."""
    java, maven = shutil.which("java"), shutil.which("mvn")
    if java is None or maven is None:
        raise BuilderError("java, mvn: not found on this machine; `make system-packages` installs both")
    runtime = Path(java).resolve().parents[1]
    unused = shutil.ignore_patterns("src.zip", "man", "jmods", "legal", "docs")  # some are links that lead nowhere
    shutil.copytree(runtime, context / "java", ignore=unused, ignore_dangling_symlinks=True)
    say("fetching Kafka's jars")
    fetch = [maven, "-q", "-B", "-f", str(KAFKA_POM), "dependency:copy-dependencies"]
    done = subprocess.run(
        [*fetch, f"-DoutputDirectory={context / 'jars'}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BuilderError(f"Kafka's jars: Maven ended with {done.returncode}: {done.stdout[-1000:]}")
    shutil.copy2(Path(__file__).with_name("kafka.sh"), context / "kafka.sh")


def _find_program(name: str) -> Path:
    """Returns the path of a file or a program. Programs built by infra/cluster take precedence over the machine's."""
    found = name if Path(name).is_file() else shutil.which(name, path=str(_BUILT)) or shutil.which(name)
    if found is None:
        raise BuilderError(
            f"{name}: not found on this machine; `python infra/cluster build prometheus-operator prometheus` builds "
            "Prometheus and the reloader, Debian's package prometheus-alertmanager has the rest"
        )
    return Path(found)


def _libraries(program: Path) -> list[Path]:
    """Returns the shared libraries of a program, without those of the C library, which every base image has."""
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    paths = [Path(fields[2]) for fields in map(str.split, listed.splitlines()) if len(fields) > 3 and fields[1] == "=>"]
    return [path for path in paths if path.name.split(".so")[0] not in _C_LIBRARY]
