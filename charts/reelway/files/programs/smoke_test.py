"""Requests a slate through the router's Service until one has videos. Arguments: base URL, viewer id, auth mode.

With authentication the request must be refused, because this program has no proof of an identity.
"""

import sys
import time

import httpx

url, viewer, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]
deadline = time.monotonic() + 120
while True:
    try:
        answer = httpx.post(f"{url}/v1/recommend", json={"viewer_id": viewer, "count": 10}, timeout=10)
        seen = f"{answer.status_code} {answer.text[:500]}"
        if mode != "off" and answer.status_code == 401:
            print(f"a request without a proof of identity is refused: {answer.headers['WWW-Authenticate']}")
            sys.exit(0)
        if mode == "off" and answer.is_success and answer.json()["videos"]:
            slate = answer.json()
            print(f"{len(slate['videos'])} videos of release {slate['release'][:12]} ({slate['arm']})")
            print(f"degraded stages: {', '.join(slate['degraded']) or 'none'}")
            sys.exit(0)
    except httpx.HTTPError as error:
        seen = str(error) or type(error).__name__
    if time.monotonic() > deadline:
        sys.exit(f"{url}: auth.mode {mode}: no expected answer for viewer {viewer} within 120 s; last answer: {seen}")
    time.sleep(1)
