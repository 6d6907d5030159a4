"""Builds the pause image from Kubernetes' pause.c: one static program, no base image."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from build import BuildError, module_folder
from layout import PAUSE_IMAGE


def write_pause_image(archive: Path) -> None:
    """Writes an OCI archive for ``ctr images import``."""
    layer = _layer()
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _entry(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [_entry(layer, "application/vnd.oci.image.layer.v1.tar")],
        }
    )
    named = {"io.containerd.image.name": PAUSE_IMAGE, "org.opencontainers.image.ref.name": PAUSE_IMAGE}
    index = _json(
        {
            "schemaVersion": 2,
            "manifests": [
                {**_entry(manifest, "application/vnd.oci.image.manifest.v1+json"), "annotations": named,
                 "platform": {"architecture": "amd64", "os": "linux"}}
            ],
        }
    )  # fmt: skip
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(tar, "index.json", index)
        for blob in (layer, config, manifest):
            _add(tar, f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}", blob)


def _layer() -> bytes:
    source = module_folder("kubernetes", "k8s.io/kubernetes") / "build" / "pause" / "linux" / "pause.c"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pause"
        done = subprocess.run(
            ["cc", "-Os", "-static", "-s", "-DVERSION=reelway", "-o", str(program), str(source)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BuildError(f"pause.c: compilation failed: {done.stderr.strip()}; install gcc and libc6-dev")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            _add(tar, "pause", program.read_bytes(), mode=0o755)
        return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    tar.addfile(entry, io.BytesIO(content))


def _entry(blob: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
