"""CPU time that a request's admission costs: ``python -m tests.benchmarks.bench_access``.

Each proof is measured as the router verifies it: for the first time, and as remembered.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import jwt
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from reelway.platform.rollout.traffic.access_options import AccessOptions, GatewayOptions, JwtOptions
from reelway.platform.viewer_assertions import gateway_header
from reelway.serving.access import InternalCredential, ViewerAccess, build_viewer_access

REQUESTS: Final = 2_000
ROUNDS: Final = 5
SECRET: Final = b"a secret of the benchmark"
KEYS: Final[dict[str, tuple[Any, Any]]] = {
    "EdDSA": (ed25519.Ed25519PrivateKey.generate(), jwt.algorithms.OKPAlgorithm),
    "ES256": (ec.generate_private_key(ec.SECP256R1()), jwt.algorithms.ECAlgorithm),
    "RS256": (rsa.generate_private_key(public_exponent=65537, key_size=2048), jwt.algorithms.RSAAlgorithm),
}


def access_of(**options: Any) -> ViewerAccess:
    unlimited = {"per_second": 1e6, "burst": 1_000_000}
    whole = AccessOptions(per_viewer=unlimited, per_address=unlimited, **options)  # type: ignore[arg-type]
    return build_viewer_access(whole, InternalCredential([SECRET]), lambda: None, behind_haproxy=True)


def scope_of(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"9.9.9.9"), *headers]}


async def cpu_us(admit: Callable[[dict[str, Any]], Awaitable[object]], scopes: list[dict[str, Any]]) -> float:
    """Returns the median over rounds of the CPU time per request in microseconds."""
    rounds = []
    for _ in range(ROUNDS):
        before = time.process_time()
        for scope in scopes:
            await admit(scope)
        rounds.append(1e6 * (time.process_time() - before) / len(scopes))
    return float(np.median(rounds))


async def measure(folder: Path) -> dict[str, float]:
    """Returns microseconds of CPU by kind of proof."""
    found = {"off": await cpu_us(access_of().admit, [scope_of()] * REQUESTS)}
    (folder / "gateway.keys").write_bytes(SECRET)
    gateway = access_of(mode="gateway", gateway=GatewayOptions(keys_file=folder / "gateway.keys"))
    signed = [(b"reelway-viewer", gateway_header(SECRET, viewer, time.time()).encode()) for viewer in range(REQUESTS)]
    found["gateway"] = await cpu_us(gateway.admit, [scope_of(header) for header in signed])
    keys = [json.loads(algorithm.to_jwk(key.public_key())) for key, algorithm in KEYS.values()]
    (folder / "keys.json").write_text(json.dumps({"keys": keys}))
    options = JwtOptions(keys_file=folder / "keys.json", audience="reelway", algorithms=tuple(KEYS))  # type: ignore[arg-type]
    for algorithm, (key, _) in KEYS.items():
        claims = {"aud": "reelway", "exp": int(time.time()) + 3600}
        tokens = [jwt.encode({**claims, "sub": str(i)}, key, algorithm=algorithm) for i in range(REQUESTS // ROUNDS)]
        scopes = [scope_of((b"authorization", b"Bearer " + token.encode())) for token in tokens]
        first = []
        for _ in range(ROUNDS):
            access = access_of(mode="jwt", jwt=options)
            await access.admit(scopes[0])  # reads the keys
            before = time.process_time()
            for scope in scopes[1:]:
                await access.admit(scope)
            first.append(1e6 * (time.process_time() - before) / (len(scopes) - 1))
        found[algorithm] = float(np.median(first))
        found[f"{algorithm}, remembered"] = await cpu_us(access.admit, scopes)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, microseconds in asyncio.run(measure(Path(folder))).items():
            print(f"{name:20} {microseconds:7.1f} us")


if __name__ == "__main__":
    main()
