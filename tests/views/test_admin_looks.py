"""The pages of the admins in a browser: readable, narrow and wide, in light and in dark."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page

from app.machines import heartbeats
from app.tables import AuditLog
from tests import lives
from tests.looks import look_at

pytestmark = pytest.mark.browser


@pytest.mark.long
def test_admin_and_audit_log(page: Page, served: str, session, user, tiny_registered, tmp_path: Path):
    lives.Life(session, lives.order(session, user, tiny_registered, name="support-tone")).claim().say(lives.started(), *lives.steps(1, 20))
    failed = lives.Life(session, lives.order(session, user, tiny_registered, name="broken")).claim()
    failed.fail(lives.events.Failed(kind="bad_data", message="Row 3 is empty.", hint="Fill it."))
    lives.order(session, user, tiny_registered, name="waits")
    for n in range(130):
        entry = AuditLog(type=f"job.{'cancelled' if n % 3 else 'deleted'}", actor="session", user_id=user.id, user_name="owner")
        entry.object_id, entry.address = f"ftjob-{n:032x}", "127.0.0.1"
        entry.details = {"method": "POST", "route": "/v1/fine_tuning/jobs/{job_id}/cancel"}
        session.add(entry)
    session.commit()
    heartbeats.say_alive("train", 0.0)
    heartbeats.say_machine(name="gpu-1")
    for name in ("admin", "admin/limits", "admin/audit"):
        page.goto(f"{served}/{name}")
        look_at(page, name.replace("/", "-"), tmp_path)
    page.select_option("#type", "job.deleted")
    page.get_by_role("button", name="Apply").click()
    assert page.locator("tbody tr").count() == 44 and page.locator("tbody").inner_text().count("job.cancelled") == 0
    page.goto(f"{served}/admin/audit")
    page.get_by_role("link", name="Older").click()
    assert 30 <= page.locator("tbody tr").count() < 40
