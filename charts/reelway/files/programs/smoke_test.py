"""Requests a slate through the router's Service until one has videos. Arguments: base URL, viewer id."""

import sys
import time

import httpx

url, viewer = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 120
while True:
    try:
        answer = httpx.post(f"{url}/v1/recommend", json={"viewer_id": viewer, "count": 10}, timeout=10)
        seen = f"{answer.status_code} {answer.text[:500]}"
        if answer.is_success and answer.json()["videos"]:
            slate = answer.json()
            print(f"{len(slate['videos'])} videos of release {slate['release'][:12]} ({slate['arm']})")
            print(f"degraded stages: {', '.join(slate['degraded']) or 'none'}")
            sys.exit(0)
    except httpx.HTTPError as error:
        seen = str(error) or type(error).__name__
    if time.monotonic() > deadline:
        sys.exit(f"{url}: no slate for viewer {viewer} within 120 s; last answer: {seen}")
    time.sleep(1)
