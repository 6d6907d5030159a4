"""Ray's head is killed, and with it all of Serve: KubeRay brings it back on what is live, without a hand."""

from __future__ import annotations

import pytest
from tests.e2e.conftest import Flow

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
BACK_S = 60.0


def test_slates_come_again_after_the_head_is_killed(flow: Flow) -> None:
    installation, load = flow.installation, flow.load
    killed = load.now()
    flow.kubectl.run("delete", "pod", installation.head(), "--grace-period=0", "--force", "--wait=true")
    first_lost = killed + 1.0  # answers that were on their way
    back = load.until_answered_by(flow.live, since=first_lost, within_s=240) - killed
    installation.until_ready()
    settled = load.now()
    rows = load.settled(since=killed, before=settled)
    lost = rows[rows["status"] != 200]
    flow.note("head pod killed -> slates again, one head, no external GCS store", back, "s", f"under {BACK_S:g}",
              back < BACK_S)  # fmt: skip
    flow.note(f"requests lost meanwhile, at {load.rate:g} a second", float(len(lost)), "requests")
    assert set(rows[rows["status"] == 200]["release"]) == {flow.live[:12].encode()}
    assert back < BACK_S
