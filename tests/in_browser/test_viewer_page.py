"""The page of `headwise inspect` as people use it: pointer, slider, search, keyboard, dark screens, long texts."""

from __future__ import annotations

import time

import numpy as np
import pytest

import chatty
import headwise
from headwise.viewer.holdings import Holdings
from headwise.viewer.page_file import write_page
from headwise.viewer.recording import Recording, record


@pytest.fixture(scope="module")
def recordings():
    model, tokenizer = chatty.model(), chatty.tokenizer()
    ids = tokenizer(chatty.TEXT, return_tensors="pt")["input_ids"]
    policies = headwise.Auto(ratio=0.4, window=4, choose_every=8), headwise.FastGen(0.5)
    caches = [lambda p=p: headwise.HeadwiseCache(model, p, tokenizer=tokenizer) for p in policies]
    return [record(model, tokenizer, ids, make, 20, 4) for make in caches]


@pytest.fixture(scope="module")
def path(recordings, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "heads.html"
    write_page(recordings, "a model", path)
    return path


@pytest.fixture
def page(path, visit):
    page = visit(path)
    page.wait_for_selector(".head")
    return page


def strengths(panel):
    """Class of every token of a panel, without what marks choices and finds."""
    return panel.evaluate("p => [...p.querySelectorAll('[data-token]')].map(e => e.className.split(' ')[0])")


def head(panel, cell):
    return panel.locator(f'.head[data-cell="{cell}"]')


def test_both_policies_are_there_with_what_they_hold(page, recordings):
    panels = page.locator(".panel").all()
    assert [panel.locator("h2").inner_text() for panel in panels] == [found.policy for found in recordings]
    for panel, found in zip(panels, recordings, strict=True):
        assert panel.locator(".head").count() == 4
        share = (found.moments[0].held != 0).mean()
        assert f"{100 * share:.0f} % of the rows held" in panel.locator(".figures").inner_text()
        assert panel.locator("[data-token]").count() == len(found.pieces)
        holders = (found.moments[0].held != 0).sum(axis=0)
        shown = strengths(panel)
        assert shown[: found.prompt] == [f"s{-(-10 * int(count) // 4)}" for count in holders]
        assert set(shown[found.prompt :]) == {"later"}


def test_a_head_shows_the_tokens_that_it_holds_and_how(page, recordings):
    panel = page.locator(".panel").first
    head(panel, 2).click()
    assert head(panel, 2).get_attribute("aria-selected") == "true"
    held = recordings[0].moments[0].held[2]
    shown = strengths(panel)[: recordings[0].prompt]
    assert [name == "s0" for name in shown] == (held == 0).tolist()
    # As many strengths as there are ways, and the same way is always shown alike.
    ways = dict(zip(held.tolist(), shown, strict=True))
    assert len(set(ways.values())) == len(ways) > 2 and shown == [ways[how] for how in held.tolist()]
    said = panel.locator(".said").inner_text()
    assert f"{100 * recordings[0].attention[0][2]:.0f} % of the attention" in said
    assert (
        said.startswith("Layer 1, head 0 (scored)") and f"{(held != 0).sum()} of {recordings[0].prompt} tokens" in said
    )
    # The other policy shows the same head.
    assert head(page.locator(".panel").nth(1), 2).get_attribute("aria-selected") == "true"
    head(panel, 2).click()
    assert panel.locator(".said").inner_text() == "All heads."


def test_a_token_shows_the_heads_that_hold_it(page, recordings):
    panel, found = page.locator(".panel").first, recordings[0].moments[0].held
    token = int(np.flatnonzero((found != 0).sum(axis=0) == 2)[0])
    panel.locator(f'[data-token="{token}"]').click()
    without = panel.evaluate("p => [...p.querySelectorAll('.head')].map(e => e.classList.contains('without'))")
    assert without == (found[:, token] == 0).tolist()
    assert f"Token {token}, " in panel.locator(".said").inner_text()
    assert "held by 2 of 4 heads" in panel.locator(".said").inner_text()


def test_the_slider_goes_through_the_answer(page, recordings):
    panel, found = page.locator(".panel").first, recordings[0]
    head(panel, 1).click()
    for moment, held in enumerate(found.moments):
        page.locator("#moment").fill(str(moment))
        expected = (held.held[1] == 0).tolist()
        assert [name == "s0" for name in strengths(panel)[: held.seen]] == expected
        assert strengths(panel)[held.seen :] == ["later"] * (len(found.pieces) - held.seen)
    assert page.locator("#moment-said").inner_text() == "after 19 tokens of the answer"


def test_words_are_found_and_gone_through(page, recordings):
    # Wherever they are, however near to one another.
    page.locator("#find").fill("o")
    assert page.locator("#found").inner_text() == f"1 of {''.join(recordings[0].pieces).lower().count('o')}"
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("WHERE")
    assert page.locator("#found").inner_text() == "1 of 1"
    for panel in page.locator(".panel").all():
        assert "where" in "".join(panel.locator(".found").all_inner_texts()).lower()
    page.locator("#find").fill("the ")
    assert page.locator("#found").inner_text() == "1 of 5"
    page.keyboard.press("Enter")
    assert page.locator("#found").inner_text() == "2 of 5"
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#found").inner_text() == "5 of 5"
    page.locator("#find").fill("nowhere to be found")
    assert page.locator("#found").inner_text() == "not found"
    page.keyboard.press("Escape")
    assert page.locator("#find").input_value() == "" and page.locator(".found").count() == 0


def test_everything_can_be_done_by_keys(page):
    panel = page.locator(".panel").first
    head(panel, 0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert panel.locator(".said").inner_text().startswith("Layer 1, head 1")
    assert page.evaluate("document.activeElement.dataset.cell") == "3"
    page.keyboard.press("]")
    assert page.locator("#moment").input_value() == "1"
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert page.locator("#moment").input_value() == "0"
    panel.locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert panel.locator(".chosen").get_attribute("data-token") == "1"
    page.keyboard.press("Escape")
    assert panel.locator(".said").inner_text() == "All heads."


def test_heads_are_coloured_by_what_is_asked_for(page, recordings):
    second = page.locator(".panel").nth(1)
    colours = "p => [...p.querySelectorAll('.head')].map(e => e.style.background)"
    seen = set()
    for by in ("bytes", "kept", "bits", "attention", "rule"):
        page.locator("#by").select_option(by)
        seen.add(tuple(second.evaluate(colours)))
    assert len(seen) >= 4
    rules, now = recordings[1].moments[0].rules, second.evaluate(colours)
    assert len(set(rules)) == len(set(now)) and dict(zip(rules, now, strict=True)).keys() == set(rules)
    assert all(rule in second.locator(".legend").first.inner_text() for rule in rules)


def test_a_dark_screen_gets_a_dark_page(path, visit):
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = (visit(path, color_scheme=scheme).evaluate(ground) for scheme in ("light", "dark"))
    assert light == "rgb(255, 255, 255)" and dark == "rgb(20, 23, 28)"


def test_eight_thousand_tokens_and_ninety_heads_do_not_stall(visit, tmp_path):
    rng, tokens, heads = np.random.default_rng(0), 8192, 90
    cells = [(layer, head) for layer in range(30) for head in range(3)]
    sizes, shares = [100] * heads, [0.5] * heads
    moments = [
        Holdings(
            tokens, rng.integers(0, 4, (heads, tokens), dtype=np.uint8), sizes, [400] * heads, ["scored"] * heads, 1, 4
        )
        for _ in range(6)
    ]
    pieces = [f" word{i}" + ("\n" if i % 20 == 0 else "") for i in range(tokens)]
    formats = [("float32", 32.0), ("K8V8", 8.0), ("K4V4", 4.0)]
    big = Recording("Auto()", formats, cells, pieces, tokens, moments, [shares] * 6)
    write_page([big, big], "big", tmp_path / "big.html")
    page = visit(tmp_path / "big.html")
    began = time.monotonic()
    page.wait_for_selector(".head")
    loaded = time.monotonic() - began
    took = []
    for act in (
        lambda: head(page.locator(".panel").first, 44).click(),
        lambda: page.locator("#moment").fill("3"),
        lambda: page.locator("#find").fill("word77"),
        lambda: page.keyboard.press("Escape"),
    ):
        began = time.monotonic()
        act()
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        took.append(time.monotonic() - began)
    # A fifth of a second each on a quiet machine; tests share theirs.
    assert loaded < 10 and max(took) < 2, (loaded, took)
