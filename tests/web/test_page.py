"""The page in a real Chromium, before a real gunicorn, a real planner and real nodes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.running import Service, until
from support.web_cases import Server

from web.auth import new_token

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

_CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
_ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
#: For what the page shows after work was done, in milliseconds.
_PATIENCE_MS = 120_000

pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must not report an error, nor ask for anything from elsewhere."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(_PATIENCE_MS)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda sent: None if sent.url.startswith("http://127.0.0.1:") else wrong.append(sent.url))
    yield page
    page.close()
    assert not wrong


def _picture(page: Page, name: str) -> None:
    """Keep a picture where SCREENSHOTS says, for people."""
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def _submit(page: Page, model: str) -> None:
    page.get_by_role("textbox", name="Model", exact=True).fill(model)
    page.get_by_role("button", name="Divide it").click()


def test_a_model_is_submitted_watched_and_its_plan_shown(page: Page, server: Server, service: Service) -> None:
    page.goto(server.url)
    assert page.title() == "fairshard"
    page.locator("#nodes .node").nth(1).wait_for()
    assert "2 alive" in page.locator("#nodes-total").inner_text()
    page.get_by_text("healthy", exact=True).wait_for()

    _submit(page, "tiny/llama_deep")
    page.get_by_role("heading", name="Plan of tiny/llama_deep").wait_for()
    page.locator("#job .chip.done").first.wait_for()
    page.locator("#job > p .chip.done").wait_for()
    steps = page.locator("#job .steps li")
    assert steps.count() >= 6
    assert page.locator("#job .steps .chip.done").count() == steps.count()

    shares = page.locator("#plan .share")
    assert shares.count() == 2
    text = page.locator("#plan").inner_text()
    for expected in ("big", "small", "compute", "memory", "Megaphone chain", "bottleneck", "FLOP", "KiB"):
        assert expected in text
    assert page.locator("#plan .chain li").count() >= 1
    rows = page.locator("#plan table tbody tr")
    rows.first.wait_for()
    names = [row.split("\t")[0] for row in rows.all_inner_texts()]
    assert any(name.startswith("greedy, as planned") for name in names)
    assert "pipeline" in names
    # Each bar says its value to those who cannot see it.
    for bar in page.get_by_role("progressbar").all():
        assert bar.get_attribute("aria-label")
        assert re.fullmatch(r"\d+", bar.get_attribute("aria-valuenow") or "")
    _picture(page, "page")


def test_a_refusal_and_a_failed_job_say_why(page: Page, server: Server, service: Service) -> None:
    page.goto(server.url)
    _submit(page, "../../etc/passwd")
    alert = page.locator("#submit-error")
    alert.wait_for()
    assert "owner/name" in alert.inner_text()
    _submit(page, "nobody/nothing")
    page.locator("#job > p .chip.failed").wait_for()
    assert "nobody/nothing" in page.locator("#job .error").first.inner_text()
    assert not alert.is_visible()
    _picture(page, "failed")


def test_markup_in_an_answer_stays_text(page: Page, server: Server) -> None:
    evil = {"job_id": "abcdef01", "kind": "request", "state": "failed", "step": None, "model_name": "<img src=x>",
            "created_at": None, "steps": [{"name": "<b>x</b>", "state": "failed", "attempts": 1, "progress": None,
            "error": {"code": "x", "message": "<script>window.broken = 1</script>"}, "node_id": None}],
            "error": None, "result": None}  # fmt: skip
    page.route(re.compile(r"/api/jobs\?"), lambda route: route.fulfill(json={"jobs": [evil]}))
    page.route("**/api/jobs/abcdef01", lambda route: route.fulfill(json=evil))
    page.goto(server.url)
    page.get_by_role("button", name="<img src=x>").click()
    page.locator("#job .error").wait_for()
    assert "<script>" in page.locator("#job .error").inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator("main img, main b:not(.hop b)").count() == 0


def test_everything_can_be_reached_by_keyboard(page: Page, server: Server) -> None:
    page.goto(server.url)
    page.locator("#nodes .node").first.wait_for()
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name || document.activeElement.innerText"))
    assert reached[0] == "Skip to content"
    for expected in ("API", "model_name", "strategy", "batch_size", "sequence_length", "Divide it"):
        assert expected in reached
    # The list is drawn anew every two seconds; whoever stands in it stays where they are.
    if page.locator("#jobs button").count():
        page.locator("#jobs button").first.focus()
        key = page.evaluate("document.activeElement.dataset.key")
        with page.expect_response(re.compile(r"/api/jobs\?")):
            pass
        page.wait_for_timeout(200)
        assert page.evaluate("document.activeElement.dataset.key") == key


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1280), ("light", 390)])
def test_it_fits_dark_rooms_and_small_screens(browser: Browser, server: Server, scheme: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(_PATIENCE_MS)
    page.goto(server.url)
    page.locator("#nodes .node").first.wait_for()
    buttons = page.locator("#jobs button")
    if buttons.count():
        buttons.last.click()
        page.locator("#job .steps li").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    _picture(page, f"{scheme}-{width}")
    page.goto(f"{server.url}/docs")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    _picture(page, f"docs-{scheme}-{width}")
    page.close()


def test_where_tokens_are_asked_for_so_does_the_page(page: Page, service: Service, tmp_path: Path) -> None:
    token = new_token(tmp_path / "tokens.json", "me", ["submit"])
    env = service.env | {"FAIRSHARD_REQUIRE_TOKEN": "always", "FAIRSHARD_TOKENS_FILE": str(tmp_path / "tokens.json")}
    with Server(tmp_path, env) as server:
        page.goto(server.url)
        page.get_by_label("Token", exact=True).fill(token)
        page.get_by_role("button", name="Use it").click()
        page.locator("#nodes .node").first.wait_for()
        _submit(page, "tiny/gpt2")
        page.locator("#job > p .chip.done").wait_for()
        assert token not in page.content()
        until(lambda: page.locator("#token-card").is_hidden(), what="the card is gone")
        page.close()
    audit = [line for line in server.log.read_text().splitlines() if "fairshard.audit" in line]
    assert any('"action": "request"' in line and '"token": "me"' in line for line in audit)
    assert token not in server.log.read_text()
