"""Ray's head is killed, and with it all of Serve: KubeRay brings it back on what is live, without a hand.

The live release's rollout is over by then. One that is still kept to be gone back from would be: what an outage costs
counts against it, whoever is to blame, and the release before is warm.
"""

from __future__ import annotations

import pytest
from tests.e2e.conftest import Flow
from tests.e2e.rollouts import STEPPED, begin, until_phase
from tests.e2e.waiting import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
BACK_S = 60.0


@pytest.fixture
def settled(flow: Flow) -> str:
    """The live release is one that nobody can go back from."""
    before, release = flow.live, flow.releases.ids[0 if flow.live != flow.releases.ids[0] else 1]
    begin(flow.kubectl, "settled", release, {**STEPPED, "retention_s": 1}, force=True)
    until_phase(flow.kubectl, "settled", "Promoted")
    flow.live = release
    until("the release before is gone", lambda: before not in flow.installation.serve_details()["applications"], 60)
    return release


def test_slates_come_again_after_the_head_is_killed(flow: Flow, settled: str) -> None:
    installation, load = flow.installation, flow.load
    before = installation.pods("serving")
    killed = load.now()
    flow.kubectl.run("delete", "pod", installation.head(), "--grace-period=0", "--force", "--wait=true")
    installation.until_other_head(before)
    installation.until_ready()
    load.until_answered_by(settled, since=load.now(), within_s=240, count=20)
    rows = load.settled(since=killed, before=load.now())
    lost = rows[rows["status"] != 200]
    assert len(lost), "nobody noticed that the head was gone"
    back = float(lost["sent"].max() - killed)
    flow.note("head pod killed -> slates for good, one head, no external GCS store", back, "s", f"under {BACK_S:g}",
              back < BACK_S)  # fmt: skip
    flow.note(f"requests lost meanwhile, at {load.rate:g} a second", float(len(lost)), "requests")
    assert set(rows[rows["status"] == 200]["release"]) == {settled[:12].encode()}
    assert back < BACK_S
