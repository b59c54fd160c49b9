"""The page at /_proxy/ as a person sees it: in a real Chromium, while the fake is being called, in real time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from browser import Page, chromium, executable
from conftest import Gateway, Start
from fake_vast import Behaviour, Fault

from proxy.policy.members import hashed

RENT = {"client_id": "me", "image": "x", "disk": 10}
KEY = "0123456789abcdef" * 4
LIVE = "document.querySelector('#link')?.dataset.state === 'live'"
ROWS = "[...document.querySelectorAll('#%s tbody tr')].map(row => row.innerText.split('\\t').join(' '))"


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Page]:
    """A tab of a browser of its own. Whatever it did, nothing may have been complained of."""
    executable()
    async with chromium(tmp_path / "chromium") as page:
        await page.look(width=1280)
        yield page
        assert page.complaints == []


async def visit(page: Page, start: Start, behaviour: Behaviour | None = None, **given: Any) -> Gateway:
    gateway: Gateway = await start(behaviour, **given)
    await page.open(f"{gateway.url}/_proxy/")
    await page.until(LIVE)
    return gateway


def seen(selector: str, text: str) -> str:
    """An expression: is this text to be read there?"""
    return f"(document.querySelector({json.dumps(selector)})?.innerText ?? '').includes({json.dumps(text)})"


async def test_it_loads_without_a_complaint_from_the_proxy_alone_and_says_how_to_begin(
    page: Page, start: Start
) -> None:
    gateway = await visit(page, start)
    how = (await page.text("#how")).splitlines()
    assert len(how) == 3
    assert how[0] == f"export VAST_URL={gateway.url}"
    assert how[1].startswith("vastai ")
    assert await page.text("#lines + .none") == "Nobody waits."
    assert {url.rpartition("/")[0] for url in page.requested} == {f"{gateway.url}/_proxy"}


async def test_it_follows_what_happens(page: Page, start: Start) -> None:
    gateway = await visit(page, start, fast=True)
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "the-first"})
    await page.until(seen("#exchanges", "the-first"))
    assert await page.text("#empty") == ""
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "the-second"})
    await page.until(seen("#exchanges tbody tr:first-child", "the-second"))
    [second, first] = await page.get(ROWS % "exchanges")
    assert "GET /api/v0/ssh/" in first
    assert " miss " in first
    assert " hit " in second
    assert await page.text("#sum-requests") == "2"
    assert await page.text("#sum-saved") == "1"
    assert "50.0 %" in await page.text("#cache")
    plots = await page.get("[...document.querySelectorAll('path')].map(p => p.getAttribute('d').length > 0)")
    assert plots[:2] == [True, True], "requests, calls saved"
    assert plots[3] is False, "429s absorbed"


async def test_a_queue_is_seen_to_drain(page: Page, start: Start) -> None:
    gateway = await visit(page, start, Behaviour(scale=0.3), limits={"scale": 0.3})
    renting = [asyncio.create_task(gateway.put(gateway.offer(number), RENT, key=KEY)) for number in range(5)]
    depths: list[str] = []
    while len(depths) < 2 or depths[-1] != "0":
        depth = await page.text("#sum-waiting")
        if not depths or depths[-1] != depth:
            depths.append(depth)
        if depth.isdigit() and depth != "0":
            for row in await page.get(ROWS % "lines"):
                assert row.startswith("PUT /api/v0/asks/{id}/ ")
                assert "127.0.0.1 " in row, "who"
        await asyncio.sleep(0.05)
    drained = [int(depth) for depth in depths[depths.index("4") :]]
    assert drained == sorted(drained, reverse=True)
    assert len(drained) >= 4, "a busy machine may miss one"
    assert [answer.status for answer in await asyncio.gather(*renting)] == [200] * 5
    [limit, *_] = await page.get(ROWS % "limits")
    assert limit.startswith("PUT /api/v0/asks/{id}/ ")
    assert "documented" in limit
    assert KEY not in await page.get("document.documentElement.outerHTML")


async def test_who_waits_is_shown_with_how_long_and_what_for(page: Page, start: Start) -> None:
    gateway = await visit(page, start)
    renting = [asyncio.create_task(gateway.put(gateway.offer(number), RENT)) for number in range(4)]
    await page.until("document.querySelector('#lines tbody td:nth-child(4)')?.innerText.startsWith('3')", within=8)
    heads = await page.get("[...document.querySelectorAll('#lines th')].map(head => head.innerText)")
    assert heads[3:5] == ["Oldest", "Held by"]
    assert await page.text("#lines tbody td:nth-child(5)") == "limit"
    assert "in 1 line, oldest " in await page.text("#sum-waiting-more")
    longest = "document.querySelectorAll('#plots figure')[2].querySelector('span').innerText"
    await page.until(f"parseFloat({longest}) >= 4", within=15)
    assert "All calls to the API: 2 a second, up to 5 at once" in await page.text("#ceiling")
    assert "of 100 connections in use" in await page.text("#ceiling")
    for task in renting:
        task.cancel()
    await asyncio.gather(*renting, return_exceptions=True)


async def test_red_is_what_failed_and_not_what_a_client_asked_for(page: Page, start: Start) -> None:
    gateway = await visit(page, start, fast=True)
    await gateway.get("/api/v0/ssh/", headers={"Cache-Control": "only-if-cached", "X-Request-ID": "harmless"})
    await page.until(seen("#sum-errors-more", "1 in the last hour"))
    assert await page.get("document.querySelectorAll('main .bad').length") == 0
    gateway.fake.faults.append(Fault(match="PUT *", kind="status", status=503))
    await gateway.put(gateway.offer(), RENT, headers={"X-Request-ID": "serious"})
    await page.until(seen("#sum-errors-more", "2 in the last hour, 1 fault"))
    red = await page.get("[...document.querySelectorAll('main .bad')].map(node => node.innerText)")
    assert red == ["2", "outcome_unknown", "500 outcome_unknown"]
    assert (await page.get(ROWS % "errors"))[0].startswith("outcome_unknown something failed"), "first"


async def test_of_long_tables_the_first_rows_are_shown_and_the_others_when_they_are_wanted(
    page: Page, start: Start
) -> None:
    gateway = await visit(page, start, fast=True)
    for number in range(30):
        await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": f"r{number}"})
    await page.until(seen("#filter-count", "30 of 30"))
    rows = "document.querySelectorAll('#exchanges tbody tr').length"
    assert await page.get(rows) == 20
    await page.get("document.querySelector('#exchanges').parentElement.querySelector('.more').click()")
    assert await page.get(rows) == 30
    assert await page.text("#exchanges ~ .more") == "Only the first 20"


async def test_what_was_corrected_comes_first_and_accounts_that_say_nothing_do_not_come(
    page: Page, start: Start
) -> None:
    gateway = await visit(page, start)
    own = {"Cache-Control": "no-store"}
    for _ in range(3):
        await gateway.get("/api/v0/users/current/", headers=own)
    await gateway.get("/api/v0/ssh/", headers=own)
    gateway.fake.faults.append(Fault(match="GET *", kind="refuse429", form="json_retry_after", retry_after=1.5))
    await gateway.get("/api/v0/ssh/", headers=own)
    await page.until(seen("#limits", "learned"))
    rows = await page.get(ROWS % "limits")
    assert [row.split()[1] for row in rows] == ["/api/v0/ssh/", "/api/v0/users/current"]


@pytest.mark.parametrize("width", [1280, 1000, 390])
async def test_the_longest_name_of_a_member_fits(page: Page, start: Start, width: int, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    name, token = "w" * 64, "vp_" + "a" * 43
    team = {
        "keys": {"default": {"file": str(tmp_path / "key")}},
        "members": {name: {"token": hashed(token)}},
    }
    await page.look(width=width)
    gateway = await visit(page, start, team=team)
    renting = [asyncio.create_task(gateway.put(gateway.offer(number), RENT, key=token)) for number in range(2)]
    await page.until(seen("#exchanges", name))
    await page.until(seen("#lines", name))
    assert await page.get("document.documentElement.scrollWidth") == width
    for task in renting:
        task.cancel()
    await asyncio.gather(*renting, return_exceptions=True)


async def test_from_elsewhere_it_asks_for_the_token_and_keeps_it_for_the_tab(page: Page, start: Start) -> None:
    gateway = await start(fast=True, admin={"token": hashed("vp_right_and_long_enough")})
    await page("Network.setExtraHTTPHeaders", headers={"X-Forwarded-For": "198.51.100.7"})
    await page.open(f"{gateway.url}/_proxy/")
    await page.until("document.querySelector('#login')?.checkVisibility()")
    assert await page.text("#exchanges") == ""
    enter = "document.querySelector('#token').value = %s; document.querySelector('#login').requestSubmit()"
    await page.get(enter % "'vp_wrong'")
    await page.until(seen("#login-error", "not the token"))
    assert await page.text("#link") == "waits for the token"
    await page.get(enter % "' vp_right_and_long_enough'")
    await page.until(LIVE)
    assert await page.text("#login") == ""
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "one"})
    await page.until(seen("#exchanges", "one"))
    await page("Page.reload")
    await page.until(LIVE)
    await page.get("document.querySelector('#forget').click()")
    await page.until("document.querySelector('#login')?.checkVisibility()")
    assert await page.text("#exchanges") == ""
    assert [told for told in page.complaints if "401" not in told and "403" not in told] == []
    page.complaints.clear()


async def test_it_goes_on_when_the_proxy_is_there_again(page: Page, start: Start) -> None:
    gateway = await visit(page, start, fast=True)
    await gateway.restart(pause=0.5)
    await page.until("document.querySelector('#link').dataset.state === 'lost'")
    await page.until(LIVE)
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "after"})
    await page.until(seen("#exchanges", "after"))
    page.complaints[:] = [told for told in page.complaints if "ERR_CONNECTION_REFUSED" not in told]


async def test_429s_corrections_and_errors_are_shown(page: Page, start: Start) -> None:
    gateway = await visit(page, start)
    own = {"Cache-Control": "no-store"}
    await gateway.get("/api/v0/ssh/", headers=own)
    gateway.fake.faults.append(Fault(match="GET *", kind="refuse429", form="json_retry_after", retry_after=1.5))
    await gateway.get("/api/v0/ssh/", headers=own)
    await gateway.get("/api/v0/instances/", headers={"Cache-Control": "only-if-cached"})
    await page.until(seen("#errors", "not_cached"))
    assert await page.text("#sum-refused") == "1"
    [limit, *_] = await page.get(ROWS % "limits")
    assert "learned" in limit
    assert "1.01 s (refused)" in limit
    assert "2, 1 refused" in await page.text("#exchanges")


async def test_the_filters_filter(page: Page, start: Start) -> None:
    gateway = await visit(page, start, fast=True)
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "alpha"})
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": "beta"})
    await gateway.get("/api/v0/instances/", headers={"Cache-Control": "only-if-cached", "X-Request-ID": "gamma"})
    await gateway.get("/api/v0/nobody/knows/", headers={"X-Request-ID": "delta"})
    await page.until(seen("#exchanges", "delta"))

    async def shown(text: str = "", status: str = "", cache: str = "") -> str:
        for name, value in (("text", text), ("status", status), ("cache", cache)):
            await page.get(f"document.querySelector('#filter-{name}').value = {json.dumps(value)}")
        await page.get("document.querySelector('#filter-text').dispatchEvent(new Event('input'))")
        rows = await page.get(ROWS % "exchanges")
        return " ".join(row.split()[-1] for row in rows)

    assert await shown() == "delta gamma beta alpha"
    assert await shown(text="SSH") == "beta alpha"
    assert await shown(cache="hit") == "beta"
    assert await shown(status="code") == "gamma"
    assert await shown(status="4") == "delta"
    assert await shown(text="ssh", cache="miss") == "alpha"
    assert await page.text("#filter-count") == "1 of 4"
    assert await shown(text="nothing like it") == ""
    assert await page.text("#exchanges + .none") == "None."


async def test_what_a_client_chose_is_text_on_the_page(page: Page, start: Start) -> None:
    gateway = await visit(page, start, fast=True)
    nasty = "<img/src=x/onerror=document.title='owned'>"
    await gateway.get("/api/v0/ssh/", headers={"X-Request-ID": nasty})
    await page.until(seen("#exchanges", nasty))
    assert await page.get("document.title") == "vast-proxy"
    assert await page.get("document.images.length") == 0


async def test_it_says_when_the_proxy_is_gone_and_comes_back_with_it(page: Page, start: Start) -> None:
    gateway = await visit(page, start)
    await gateway.get("/api/v0/ssh/")
    await page.until("document.querySelector('#sum-requests').innerText === '1'")
    await gateway.restart(pause=1.0)
    await page.until("document.querySelector('#link').dataset.state === 'lost'")
    await page.until(LIVE)
    await page.until("document.querySelector('#sum-requests').innerText === '0'")
    assert await page.text("#exchanges") == "", "they were another process's"
    # The browser's own words about a connection that was closed or refused.
    page.complaints = [text for text in page.complaints if "ERR_" not in text]


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_both_themes_can_be_read(page: Page, start: Start, theme: str) -> None:
    """WCAG 2 AA: 4.5 to 1, for every colour of text on each of the two grounds."""
    await page.look(width=1280, theme=theme)
    await visit(page, start)
    contrasts = await page.get(
        """(() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
          const hex = style.getPropertyValue(name).trim();
          const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
            .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
          return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const pairs = {};
        for (const text of ["--text", "--quiet", "--mark", "--good", "--warn", "--bad"])
          for (const ground of ["--ground", "--sheet"]) {
            const [high, low] = [light(text), light(ground)].sort((a, b) => b - a);
            pairs[`${text} on ${ground}`] = (high + 0.05) / (low + 0.05);
          }
        return pairs;
        })()"""
    )
    assert len(contrasts) == 12
    assert {pair: ratio for pair, ratio in contrasts.items() if ratio < 4.5} == {}
    ground = await page.get("getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) > 127) == (theme == "light")


async def test_a_phone_of_360_pixels_shows_all_of_it_without_scrolling_sideways(page: Page, start: Start) -> None:
    await page.look(width=360, height=740)
    gateway = await visit(page, start, Behaviour(scale=0.5), limits={"scale": 0.5})
    gateway.fake.faults.append(Fault(match="PUT *", kind="refuse429", form="json_retry_after", retry_after=1))
    renting = [
        asyncio.create_task(gateway.put(gateway.offer(number), RENT, headers={"X-Request-ID": "x" * 128}))
        for number in range(2)
    ]
    await gateway.get("/api/v0/" + "very-long-word/" * 6, headers={"X-Request-ID": "y" * 128})
    await page.until(seen("#exchanges", "y" * 128))
    await page.until(seen("#lines", "Waiting"))
    assert await page.get("document.documentElement.scrollWidth") == 360
    outside = await page.get(
        "[...document.querySelectorAll('main *')].filter(node => node.getClientRects().length"
        " && node.getBoundingClientRect().right > 360.5).map(node => node.outerHTML.slice(0, 80))"
    )
    assert outside == []
    for task in renting:
        task.cancel()
    await asyncio.gather(*renting, return_exceptions=True)
