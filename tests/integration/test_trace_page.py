"""The page of `treecast trace` in a real browser, made of a real mesh's rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from treecast.client import AsyncClient, Result, SamplingParams
from treecast.tracepage import render_page

from ..browser import Page, open_browser
from .toy_mesh import byte_mesh

HOSTILE = (
    "</script><img src=x onerror=\"window.hacked=1\"><svg onload='hacked=1'>\u202e{{ 7*7 }}&amp;"
)
PHONE, DESKTOP = (390, 844), (1280, 900)


async def _generate() -> Result:
    sampling = SamplingParams(temperature=0.9, seed=5, max_tokens=40, ignore_eos=True)
    async with byte_mesh() as address, AsyncClient(address) as client:
        return await client.generate(HOSTILE, sampling, report_rounds=True).result()


def _with_hostile_tokens(result: Result) -> Result:
    """The same, as if each token's text were an attack, and so were every name."""
    rounds = []
    for report in result.rounds:
        drafts = tuple(replace(draft, proposers=(HOSTILE,)) for draft in report.round.drafts)
        texts = (HOSTILE,) * len(report.node_texts)
        one = replace(report.round, drafts=drafts)
        rounds.append(
            replace(report, round=one, text=HOSTILE, node_texts=texts, bonus_text=HOSTILE)
        )
    [sample] = result.samples
    text = HOSTILE * len(rounds)
    return replace(
        result,
        model=HOSTILE,
        request_id=HOSTILE,
        samples=(replace(sample, rounds=tuple(rounds), text=text),),
    )


@pytest.fixture(scope="module")
def result() -> Result:
    return asyncio.run(_generate())


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.complaints.clear()
    browser.requests.clear()
    return browser


@pytest.fixture(scope="module")
def file(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "trace.html"
    file.write_text(render_page(HOSTILE, result, {"temperature": "0.9"}))
    return file


def count(page: Page, selector: str) -> int:
    number = page.evaluate(f"document.querySelectorAll({selector!r}).length")
    assert isinstance(number, int)
    return number


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_the_page_is_whole_when_opened(page, file, result, size, scheme):
    page.open(file, *size, scheme)
    assert count(page, "article.round") == result.usage.steps
    assert count(page, ".piece") == result.usage.steps
    assert count(page, "article.round:not([hidden])") == 1
    nodes = sum(len(report.round.tree) for report in result.rounds)
    assert count(page, ".pill") == nodes + 2 * result.usage.steps  # and start and bonus
    assert count(page, ".pill.accepted") == result.usage.accepted
    assert count(page, ".pill.bonus") == result.usage.steps
    # Wide trees scroll in boxes of their own, never the page.
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(250, 249, 246)", "dark": "rgb(17, 20, 27)"}[scheme]
    assert page.complaints == []
    assert set(page.requests) == {file.as_uri()}


def test_rounds_are_walked_through_when_keys_are_pressed(page, file, result):
    last = result.usage.steps
    page.open(file, *DESKTOP, "light")
    page.evaluate("document.querySelector('#previous').focus()")
    for _ in range(last):
        page.press("ArrowLeft")
    assert page.evaluate("position.textContent") == f"1 of {last}"
    assert page.evaluate("document.querySelector('#previous').disabled") is True
    page.press("ArrowRight")
    assert page.evaluate("document.querySelector('article:not([hidden])').id") == "round-2"
    assert page.evaluate("location.hash") == "#round-2"
    assert page.evaluate("document.querySelector('[aria-current]').dataset.round") == "2"
    # The pieces of text are links: each can be reached by Tab and shows its round.
    page.evaluate("document.querySelectorAll('.piece')[2].focus()")
    assert page.evaluate("position.textContent") == f"3 of {last}"
    page.press("Tab")
    assert page.evaluate("document.activeElement.dataset.round") == "4"
    assert page.evaluate("position.textContent") == f"4 of {last}"
    assert page.complaints == []


def test_a_piece_shows_its_round_when_it_is_tapped(page, file):
    page.open(file, *PHONE, "light")
    page.evaluate("document.querySelectorAll('.piece')[1].scrollIntoView({block: 'center'})")
    box = page.evaluate(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        "(document.querySelectorAll('.piece')[1].getClientRects()[0])"
    )
    point = {"x": box[0], "y": box[1]}
    page.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
    page.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    page.evaluate("new Promise(done => setTimeout(done))")
    shown = "document.querySelector('article:not([hidden])').id"
    for _ in range(200):
        if page.evaluate(shown) == "round-2":
            break
    assert page.evaluate(shown) == "round-2"


def test_all_rounds_are_shown_when_scripts_are_off(page, file, result):
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open(file, *PHONE, "light")
        assert count(page, "article.round:not([hidden])") == result.usage.steps
        assert page.evaluate("document.querySelector('nav.steps').hidden") is True
    finally:
        page.send("Emulation.setScriptExecutionDisabled", value=False)


def test_hostile_texts_stay_texts_when_shown(page, result, tmp_path):
    file = tmp_path / "hostile.html"
    file.write_text(render_page(HOSTILE, _with_hostile_tokens(result), {HOSTILE: HOSTILE}))
    page.open(file, *DESKTOP, "light")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert count(page, "img") == 0
    assert count(page, "script") == 1
    assert count(page, "[onerror], [onload]") == 0
    shown = HOSTILE.replace("\u202e", "<202e>")
    assert page.evaluate("document.querySelector('h1').textContent") == shown
    assert page.evaluate("document.querySelector('.piece').textContent") == shown
    assert page.complaints == []


def test_an_injected_script_does_not_run_when_one_got_in(page, file, tmp_path):
    """Second line of defence: the page's own policy names its one script by hash."""
    injected = tmp_path / "injected.html"
    attack = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"
    injected.write_text(file.read_text().replace("</main>", f"{attack}</main>"))
    page.open(injected, *DESKTOP, "light")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
