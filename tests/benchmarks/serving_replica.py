"""A replica of nothing but itself: from the start of its process to its first slate, every digest checked.

Usage: python -m tests.benchmarks.serving_replica PLACE RELEASE

It imports what a replica of the service imports, so that its start is a replica's; it prints what it took as one line
of JSON and stays until its input ends, so that its memory can be looked at.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry

from reelway.platform.contracts.api import RecommendRequest
from reelway.platform.rollout.traffic.serving_options import ReleaseStoreArgs
from reelway.platform.tokens import TokenSigner
from reelway.serving.fused import open_fused
from reelway.serving.graph import RequestPath
from reelway.serving.metrics import IngressMetrics
from reelway.serving.release_loader import open_trusted


async def main(place: Path, release: str) -> None:
    shelf = ReleaseStoreArgs(
        release_store=str(place / "releases"), release_cache=place / "cache", public_keys=place / "keys"
    )
    imported = time.time()
    opened = open_fused(open_trusted(shelf.release_args(release, "fused")), budget_ms=10_000)
    signer, metrics = TokenSigner(b"a secret for the first slate"), IngressMetrics(CollectorRegistry())
    path = RequestPath(opened.edge, opened.stages, signer, metrics, place=opened.place)
    answered = await path.answer(RecommendRequest(viewer_id=1, count=20), {}, time.time())
    now, started = time.time(), psutil.Process().create_time()
    whole = not answered.response.degraded and len(answered.video_ids) == 20
    print(json.dumps({"seconds": now - started, "imports_s": imported - started, "whole": whole}), flush=True)
    sys.stdin.read()
    await opened.close_when_idle()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
