"""Cold start of one replica: from the start of its process to its first slate, all digests verified.

Usage: python -m tests.benchmarks.serving_replica FOLDER RELEASE

The process imports what a replica of the service imports. It prints the times as one line of JSON and runs until the
end of standard input, so that its memory can be measured.
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
from reelway.serving.metrics import IngressMetrics
from reelway.serving.release_loader import open_trusted
from reelway.serving.request_path import RequestPath


async def main(fixture: Path, release: str) -> None:
    store_args = ReleaseStoreArgs(
        release_store=str(fixture / "releases"), release_cache=fixture / "cache", public_keys=fixture / "keys"
    )
    imported = time.time()
    opened = open_fused(open_trusted(store_args.release_args(release, "fused")), budget_ms=10_000)
    signer, metrics = TokenSigner(b"a secret for the first slate"), IngressMetrics(CollectorRegistry())
    path = RequestPath(opened.router_release, opened.stages, signer, metrics, executor=opened.executor)
    recommendation = await path.recommend(RecommendRequest(viewer_id=1, count=20), {}, time.time())
    now, started = time.time(), psutil.Process().create_time()
    whole = not recommendation.response.degraded and len(recommendation.video_ids) == 20
    print(json.dumps({"seconds": now - started, "imports_s": imported - started, "whole": whole}), flush=True)
    sys.stdin.read()
    await opened.close_when_idle()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
