"""Ray's head is killed, and all of Serve with it. KubeRay restores the live release.

The rollout of the live release has ended. A rollout in its retention time would be rolled back, because the failed
requests of the outage count against its release.
"""

from __future__ import annotations

import pytest
from tests.support.e2e.flow import Flow
from tests.support.e2e.rollouts import STEPPED, begin, until_phase
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
BACK_S = 60.0


@pytest.fixture
def settled(flow: Flow) -> str:
    """The live release, whose predecessor is no longer retained."""
    before, release = flow.live, flow.releases.ids[0 if flow.live != flow.releases.ids[0] else 1]
    begin(flow.kubectl, "settled", release, {**STEPPED, "retention_s": 1}, force=True)
    until_phase(flow.kubectl, "settled", "Promoted")
    flow.live = release
    until("the release before is gone", lambda: before not in flow.installation.serve_details()["applications"], 60)
    return release


def test_service_recovers_after_the_head_is_killed(flow: Flow, settled: str) -> None:
    installation, load = flow.installation, flow.load
    before = installation.pods("serving")
    killed = load.now()
    flow.kubectl.run("delete", "pod", installation.head(), "--grace-period=0", "--force", "--wait=true")
    installation.until_other_head(before)
    installation.until_ready()
    load.until_answered_by(settled, since=load.now(), within_s=240, count=20)
    rows = load.settled(since=killed, before=load.now())
    lost = rows[rows["status"] != 200]
    assert len(lost), "no request failed, so the head was not killed"
    back = float(lost["sent"].max() - killed)
    flow.note("head pod killed -> slates for good, one head, no external GCS store", back, "s", f"under {BACK_S:g}",
              back < BACK_S)  # fmt: skip
    flow.note(f"requests lost meanwhile, at {load.rate:g} a second", float(len(lost)), "requests")
    assert set(rows[rows["status"] == 200]["release"]) == {settled[:12].encode()}
    assert back < BACK_S
