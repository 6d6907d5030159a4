"""Ray's head is killed, and all of Serve with it. KubeRay restores the live release.

The rollout of the live release has ended. A rollout in its retention time would be rolled back, because the failed
requests of the outage count against its release.
"""

from __future__ import annotations

import pytest
from tests.support.e2e.rollouts import STEPPED, begin, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation
from tests.support.e2e.wait_until import until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]
RECOVERY_LIMIT_S = 60.0


@pytest.fixture
def settled(shared: SharedInstallation) -> str:
    """The live release, whose predecessor is no longer retained."""
    before, release = shared.live, shared.releases.ids[0 if shared.live != shared.releases.ids[0] else 1]
    begin(shared.kubectl, "settled", release, {**STEPPED, "retention_s": 1}, force=True)
    wait_until_phase(shared.kubectl, "settled", "Promoted")
    shared.live = release
    until(
        "the previous release is removed", lambda: before not in shared.installation.serve_details()["applications"], 60
    )
    return release


def test_service_recovers_after_the_head_is_killed(shared: SharedInstallation, settled: str) -> None:
    installation, load = shared.installation, shared.load
    before = installation.pods("serving")
    killed = load.now()
    shared.kubectl.run("delete", "pod", installation.head(), "--grace-period=0", "--force", "--wait=true")
    installation.wait_until_other_head(before)
    installation.wait_until_ready()
    load.wait_until_answered_by(settled, since=load.now(), within_s=240, count=20)
    rows = load.settled(since=killed, before=load.now())
    lost = rows[rows["status"] != 200]
    assert len(lost), "no request failed, so the head was not killed"
    back_s = float(lost["sent"].max() - killed)
    shared.note("head pod killed -> slates for good, one head, no external GCS store", back_s, "s",
                f"under {RECOVERY_LIMIT_S:g}", back_s < RECOVERY_LIMIT_S)  # fmt: skip
    shared.note(f"requests lost meanwhile, at {load.rate:g} a second", float(len(lost)), "requests")
    assert set(rows[rows["status"] == 200]["release"]) == {settled[:12].encode()}
    assert back_s < RECOVERY_LIMIT_S
