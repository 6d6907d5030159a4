"""An alert for a release at the webhook rolls it back with one write of weights."""

from __future__ import annotations

import pytest
from tests.support.e2e.disruption_check import expect_no_disruption
from tests.support.e2e.flow import Flow
from tests.support.e2e.rollouts import HELD, begin, status, until_phase

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
BACK_S = 2.0


def test_alert_rolls_a_release_back_without_failed_requests(flow: Flow) -> None:
    bad, installation = flow.releases.ids[2], flow.installation
    with expect_no_disruption(flow, "rollback by webhook"):
        began = flow.load.now()
        begin(flow.kubectl, "bad", bad, HELD)
        flow.load.until_answered_by(bad, since=began, within_s=120, count=5)
        alerted = flow.load.alert(installation.webhook, installation.webhook_token, bad)
        until_phase(flow.kubectl, "bad", "RolledBack")
    sent = flow.load.answers(bad, since=alerted)["sent"]
    taken = float(sent.max() - alerted) if len(sent) else 0.0
    flow.note("alert sent -> last new request on the release, once", taken, "s", f"under {BACK_S:g}", taken < BACK_S)
    assert taken < BACK_S
    assert "CanaryErrors" in status(flow.kubectl, "bad")["reason"]


def test_rolled_back_release_is_refused_afterwards(flow: Flow) -> None:
    begin(flow.kubectl, "again", flow.releases.ids[2], HELD)
    until_refused = "--for=jsonpath={.status.phase}=Refused"
    flow.kubectl.run("wait", until_refused, "releaserollout/again", "--timeout=30s")
    assert "spec.force" in status(flow.kubectl, "again")["reason"]
    flow.kubectl.run("delete", "releaserollout", "again", "--timeout=30s")
