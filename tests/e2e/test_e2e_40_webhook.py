"""An alert for a release at the webhook rolls it back with one write of weights."""

from __future__ import annotations

import pytest
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.rollouts import HELD, begin, status, wait_until_phase
from tests.support.e2e.shared_installation import SharedInstallation

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
ROLLBACK_LIMIT_S = 2.0


def test_alert_rolls_a_release_back_without_failed_requests(shared: SharedInstallation) -> None:
    bad, installation = shared.releases.ids[2], shared.installation
    with expect_no_disruption(shared, "rollback by webhook"):
        began = shared.load.now()
        begin(shared.kubectl, "bad", bad, HELD)
        shared.load.wait_until_answered_by(bad, since=began, within_s=120, count=5)
        alerted = shared.load.alert(installation.webhook, installation.webhook_token, bad)
        wait_until_phase(shared.kubectl, "bad", "RolledBack")
    sent = shared.load.answers(bad, since=alerted)["sent"]
    taken = float(sent.max() - alerted) if len(sent) else 0.0
    shared.note(
        "alert sent -> last new request on the release, once",
        taken,
        "s",
        f"under {ROLLBACK_LIMIT_S:g}",
        taken < ROLLBACK_LIMIT_S,
    )
    assert taken < ROLLBACK_LIMIT_S
    assert "CanaryErrors" in status(shared.kubectl, "bad")["reason"]


def test_rolled_back_release_cannot_start_without_force(shared: SharedInstallation) -> None:
    begin(shared.kubectl, "again", shared.releases.ids[2], HELD)
    until_refused = "--for=jsonpath={.status.phase}=Refused"
    shared.kubectl.run("wait", until_refused, "releaserollout/again", "--timeout=30s")
    assert "spec.force" in status(shared.kubectl, "again")["reason"]
    shared.kubectl.run("delete", "releaserollout", "again", "--timeout=30s")
