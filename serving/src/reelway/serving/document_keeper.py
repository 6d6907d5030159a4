"""Why: Ray forgets what it runs when its head restarts; where no KubeRay does it, somebody must tell it again.

``python -m reelway.serving.document_keeper`` runs beside the head of a cluster without KubeRay. Where Serve has no
router it writes the document; what runs already is left alone, because traffic belongs to the rollout controller.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from reelway.platform.errors import ConfigError
from reelway.serving.serve_config import ROUTER

APPLICATIONS: Final = "/api/serve/applications/"
TOKEN_VARIABLE: Final = "RAY_AUTH_TOKEN"
log = logging.getLogger(__name__)


def keep_document(client: httpx.Client, document: Mapping[str, Any]) -> bool:
    """One look. True when the document had to be written.

    Raises:
        httpx.HTTPError: Serve's REST API does not answer, or refused it.
    """
    seen = client.get(APPLICATIONS).raise_for_status().json().get("applications", {})
    if ROUTER in seen:
        return False
    client.put(APPLICATIONS, json=document).raise_for_status()
    return True


def main() -> None:
    """Look every few seconds until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m reelway.serving.document_keeper")
    parser.add_argument("document", type=Path, help="Serve's configuration, JSON")
    parser.add_argument("--serve-api", default="http://127.0.0.1:8265")
    parser.add_argument("--interval-s", type=float, default=2.0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise ConfigError(f"{TOKEN_VARIABLE} is not set; it is the token that Ray was started with")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    document = json.loads(options.document.read_text())
    bearer = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=options.serve_api, headers=bearer, timeout=30, trust_env=False) as client:
        while not stop.wait(options.interval_s):
            try:
                if keep_document(client, document):
                    log.info("Serve had no router: the document is written")
            except httpx.HTTPError as error:
                log.warning("Serve's REST API at %s: %s", options.serve_api, error)


if __name__ == "__main__":
    main()
