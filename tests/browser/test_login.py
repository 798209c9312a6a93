"""Who gets in, and what the page keeps of a token."""

from datetime import timedelta

import httpx
from playwright.sync_api import Page, expect
from sqlalchemy import update

from service import tokens
from service.db import utc_now
from service.models import TokenRow
from service.tokens import Role
from tests.browser.chromium import sign_in
from tests.browser.conftest import Live, Troubles
from tests.browser.scenes import PRETRAIN


def make_token(live: Live, role: Role = Role.SUBMITTER) -> tuple[str, str]:
    """Its id and its text."""
    with live.scenes.database.write() as session:
        row, token = tokens.create(
            session, name="of a test", role=role, project=None, expires_at=utc_now() + timedelta(days=1), now=utc_now()
        )
        return row.id, token


def test_a_wrong_token_is_told_and_a_good_one_kept_for_this_tab_alone(fresh_page: Page, live: Live, troubles: Troubles) -> None:
    troubles.expect("status of 401")
    page = fresh_page
    page.goto("/#/cluster")
    page.get_by_label("Your token").fill("mst_wrong_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("not good here")
    page.get_by_label("Your token").fill("with a space")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_contain_text("neither spaces")
    token = make_token(live)[1]
    page.get_by_label("Your token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Cluster")).to_be_visible()
    assert page.evaluate("Object.values(localStorage)") == []
    assert token not in page.url
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Your token")).to_be_focused()
    assert page.evaluate("sessionStorage.length") == 0


def test_whose_token_expires_signs_in_again_and_is_where_he_was(fresh_page: Page, live: Live, troubles: Troubles) -> None:
    troubles.expect("status of 401")
    page, job_id = fresh_page, live.scenes.submit(PRETRAIN, name="watched to the end of a token")
    token_id, token = make_token(live)
    sign_in(page, token)
    page.goto(f"/#/jobs/{job_id}/spec")
    expect(page.get_by_role("heading", name="watched to the end")).to_be_visible()
    with live.scenes.database.write() as session:
        session.execute(update(TokenRow).where(TokenRow.id == token_id).values(expires_at=utc_now() - timedelta(seconds=1)))
    expect(page.get_by_role("alert")).to_contain_text("has expired")
    page.get_by_label("Your token").fill(make_token(live)[1])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="watched to the end")).to_be_visible()
    assert page.url.endswith(f"#/jobs/{job_id}/spec")


def test_the_page_may_do_little_and_is_kept_by_its_digest(live: Live) -> None:
    with httpx.Client(base_url=live.url, trust_env=False) as client:
        answer = client.get("/")
        policy = answer.headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"):
            assert part in policy
        assert "unsafe" not in policy
        assert f"img-src 'self' {live.stage.storage.endpoint};" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert client.get("/", headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
        [script] = [part.split('"')[0] for part in answer.text.split('src="') if "app.js" in part]
        file = client.get(script)
        assert (file.status_code, file.headers["cache-control"]) == (200, "public, max-age=31536000, immutable")
        assert file.headers["content-type"] == "text/javascript; charset=utf-8"
        assert client.head(script).status_code == 200
        digest = script.split("/")[2]
        for missing in (f"/dashboard/{'0' * 16}/app.js", f"/dashboard/{digest}/none.js", f"/dashboard/{digest}/../app.py", "/dashboard/x"):
            told = client.get(missing)
            assert (told.status_code, told.json()["type"]) == (404, "urn:maestro:not-found"), missing
        assert client.get("/favicon.ico").headers["content-type"] == "image/svg+xml"
