"""The page in a real Chromium, before a real gunicorn, a real planner and real nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.running import RedisProcess, Service, until
from support.web_cases import Server

from web.auth import new_token
from workers.jobs.jobs import Jobs
from workers.service.services import Services
from workers.settings import QueueSettings, Settings

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


def _planned(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The answer of /api/process for a model that was profiled."""
    for path, sent in (("/api/request", {"model_name": body["model_name"]}), ("/api/process", body)):
        request = urllib.request.Request(
            server.url + path,
            data=json.dumps(sent).encode(),
            headers={"Content-Type": "application/json", "Prefer": "wait=120"},
        )
        with urllib.request.urlopen(request, timeout=150) as answer:
            found: dict[str, Any] = json.load(answer)
    return found


def _show(page: Page, plan: dict[str, Any]) -> None:
    page.locator(f'#jobs [data-key="{plan["job_id"]}"]').click()
    page.get_by_role("heading", name=f"Plan of {plan['model_name']}").wait_for()
    page.locator("#plan table tbody tr").first.wait_for()


def test_a_plan_is_compared_on_what_it_was_made_for(page: Page, server: Server) -> None:
    # Slow machines with slow links that the service has not, and a budget: nothing of what is alive now.
    nodes = [
        {"node_id": name, "flop_per_s": flop, "memory_bytes": 1 << 30, "memory_bytes_per_s": 1e7}
        for name, flop in (("attic", 2e9), ("cellar", 1e9))
    ]
    links = {"latency_s": 0.005, "bytes_per_s": 1e8}
    plan = _planned(
        server,
        {"model_name": "tiny/phi3", "available_nodes": nodes, "links": links, "strategy": "pipeline",
         "time_budget_s": 2.5, "reserve_bytes": 1000},
    )  # fmt: skip
    page.goto(server.url)
    _show(page, plan)
    facts = dict(fact.split("\n") for fact in page.locator("#plan .facts div").all_inner_texts())
    rows = [row.split("\t") for row in page.locator("#plan table tbody tr").all_inner_texts()]
    (own,) = [row for row in rows if row[0] == "pipeline, as planned"]
    assert own[1:3] == [facts["bottleneck"], facts["latency"]]
    # Planned anew it is the same, or it had a row of its own.
    assert {row[0] for row in rows} == {"pipeline, as planned", "greedy", "equal", "memory"}
    text = page.locator("#plan").inner_text()
    assert "% of 2.50 s" in text
    assert "proven" in text or "%" in facts["above the bound"]
    assert "≈" not in text


def test_an_approximate_plan_says_so_at_every_figure(page: Page, server: Server) -> None:
    plan = _planned(server, {"model_name": "tiny/bert"})
    guessed = plan | {"approximate": ["FLOP by the general rule"], "predicted": plan["predicted"] | {"exact": True}}
    guessed["missing_tensors"] = ["bert.pooler.dense.weight"]
    page.route(f"**/api/plans/{plan['plan_id']}", lambda route: route.fulfill(json=guessed))
    page.goto(server.url)
    _show(page, plan)
    text = page.locator("#plan").inner_text()
    assert "proven" not in text
    assert "rest on an approximate profile: FLOP by the general rule" in text
    assert "lacks 1 tensor of its model: bert.pooler.dense.weight." in text
    figures = [
        *page.locator("#plan .facts dd").all_inner_texts()[2:],
        *page.locator("#plan .gauge span:last-child").all_inner_texts(),
        *page.locator("#plan tbody td:not(:last-child)").all_inner_texts(),
    ]
    assert len(figures) > 10
    assert all(figure.startswith("≈ ") for figure in figures), figures


def test_a_plan_that_was_deleted_is_said_to_be(page: Page, server: Server) -> None:
    plan = _planned(server, {"model_name": "tiny/gemma2"})
    page.goto(server.url)
    _show(page, plan)
    gone = urllib.request.Request(f"{server.url}/api/plans/{plan['plan_id']}", method="DELETE")
    until(lambda: json.loads(server.get(f"/api/jobs/{plan['job_id']}")[1])["state"] == "done", what="shards are cut")
    with urllib.request.urlopen(gone, timeout=30) as answer:
        assert answer.status == 202
    until(lambda: server.get(f"/api/plans/{plan['plan_id']}")[0] == 404, what="the plan is forgotten")
    page.get_by_role("button", name="Show its plan").click()
    page.get_by_text("was deleted").wait_for()
    assert plan["plan_id"] in page.locator("#plan").inner_text()
    assert page.locator("#plan .share").count() == 0


def test_what_is_old_is_shown_as_old_with_since_when(page: Page, tmp_path: Path) -> None:
    with RedisProcess(tmp_path / "redis", appendonly=True) as redis:
        env = {"REDIS_URL": redis.url, "FAIRSHARD_DATA": str(tmp_path / "data")}
        stale = [page.locator(f"#{name}-stale") for name in ("jobs", "nodes", "job")]

        def all_stale(reason: str) -> None:
            for note in stale:
                note.filter(has_text=re.compile(rf"Stale since \d\d:\d\d:\d\d: .*{reason}")).wait_for()
            assert "alive" not in page.locator("#nodes-card h2").inner_text()
            assert page.locator("#jobs button").count() == 1  # it stays to be read

        with Server(tmp_path, env) as server:
            settings = Settings.from_env(env | {"NODE_ID": "web"})
            jobs = Jobs.from_settings(settings)
            jobs.submit_request("a/b")
            Services(settings=settings, queue=QueueSettings.from_env()).registry.announce(
                {"node_id": "one", "instance": "1", "flop_per_s": 1e9, "memory_bytes": 1 << 30}
            )
            page.goto(server.url)
            page.get_by_text("1 alive").wait_for()
            page.locator("#jobs button").click()
            page.locator("#job .steps li").first.wait_for()
            assert not any(note.is_visible() for note in stale)
            redis.kill()
            all_stale("Redis")
            redis.start()
            for note in stale:
                note.wait_for(state="hidden")
        all_stale("does not answer")
        _picture(page, "stale")


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


def _try_the_documents_calls(page: Page, server: Server, token: str) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{server.url}/docs")
    page.locator(".opblock").first.wait_for()
    shown = [text.replace("\u200b", "") for text in page.locator(".opblock-summary-path").all_inner_texts()]
    document = json.loads(server.get("/openapi.json")[1])
    operations = [path for path, item in document["paths"].items() for _ in item.keys() - {"parameters"}]
    assert sorted(shown) == sorted(operations)
    assert not said

    call = page.locator(".opblock", has=page.locator('[data-path="/api/nodes"]'))
    call.locator(".opblock-summary-control").click()
    call.get_by_role("button", name="Execute").click()
    call.locator(".live-responses-table .response-col_status", has_text="401").wait_for()
    assert len(said) == 1  # the browser itself names each answer of 400 or more
    page.get_by_role("button", name="Authorize").first.click()
    page.locator(".modal-ux input").fill(token)
    page.locator(".modal-ux").get_by_role("button", name="Apply credentials").click()
    page.locator(".modal-ux").get_by_role("button", name="Close").click()
    call.get_by_role("button", name="Execute").click()
    call.locator(".live-responses-table .response-col_status", has_text="200").wait_for()
    assert '"node_id": "big"' in call.locator(".live-responses-table").inner_text()
    assert len(said) == 1
    _picture(page, "docs")


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
        _try_the_documents_calls(page, server, token)
        page.close()
    audit = [line for line in server.log.read_text().splitlines() if "fairshard.audit" in line]
    assert any('"action": "request"' in line and '"token": "me"' in line for line in audit)
    assert token not in server.log.read_text()
