"""Why: an installation works when a viewer gets a whole slate through the Service, and not before."""

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
            print(f"stepped down: {', '.join(slate['degraded']) or 'nothing'}")
            sys.exit(0)
    except httpx.HTTPError as error:
        seen = str(error) or type(error).__name__
    if time.monotonic() > deadline:
        sys.exit(f"{url} gives no slate to viewer {viewer}; the last answer was {seen}")
    time.sleep(1)
