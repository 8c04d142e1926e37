"""What all pages have: the look, hostile texts, images that enlarge; and the harness itself finds what is wrong."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from jinja2 import ChoiceLoader, DictLoader, FileSystemLoader
from PIL import Image

from ldm_lab.pages import Data, Page, engine, write_page

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&<b>\u2028"
TEMPLATE = """{% extends "base.html" %}{% block content %}
<p id="words" title="{{ page.words }}">{{ page.words }}</p>
{% for row in range(2) %}{% for column in range(2) %}
<a class="enlarge" href="{{ row }}{{ column }}.png" data-column="{{ column }}"
data-caption="{{ row }}{{ column }} {{ page.words }}">
<img src="{{ row }}{{ column }}.png" width="100" height="100" alt=""></a>
{% endfor %}{% endfor %}{% endblock %}"""


@dataclass(frozen=True, kw_only=True)
class Words(Data):
    words: Sequence[str | float]


@dataclass(frozen=True, kw_only=True)
class Pictures(Page):
    template: ClassVar[str] = "pictures.html"
    styles: ClassVar[Sequence[str]] = ("lightbox.css",)
    scripts: ClassVar[Sequence[str]] = ("lightbox.js",)
    words: str


@pytest.fixture
def pictures(monkeypatch, tmp_path) -> Path:
    """A page of four images with hostile words."""
    loaders = [DictLoader({"pictures.html": TEMPLATE}), FileSystemLoader(engine.FOLDER)]
    monkeypatch.setattr(engine._environment(), "loader", ChoiceLoader(loaders))
    for row in range(2):
        for column in range(2):
            Image.new("RGB", (64, 64), (200 * row, 200 * column, 90)).save(tmp_path / f"{row}{column}.png")
    write_page(
        tmp_path / "index.html",
        Pictures(title=HOSTILE, words=HOSTILE, data={"words": Words(words=[HOSTILE, float("nan")])}),
    )
    return tmp_path / "index.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_hostile_words_stay_words(visit, pictures, dark):
    page = (seen := visit(pictures, dark)).page
    assert page.title() == HOSTILE and page.locator("#words").text_content() == HOSTILE
    assert page.locator("#words").get_attribute("title") == HOSTILE and page.locator("b").count() == 0
    assert page.evaluate("data('words').words") == [HOSTILE, None]
    assert seen.broken_images() == [] and seen.overflow() == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) is dark
    seen.shot("dark" if dark else "light")


def test_injected_scripts_do_not_run(visit, pictures):
    """Even where a text got into the page unescaped, its scripts would not run."""
    seen = visit(pictures)
    seen.page.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x.png onerror=\"window.ran = 1\">`)")
    seen.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 2'}))"
    )
    seen.page.wait_for_timeout(300)
    assert seen.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in problem for problem in seen.problems)
    seen.problems.clear()


def test_images_enlarge_by_pointer_keys_and_touch(visit, pictures):
    page = (seen := visit(pictures)).page
    box, image = page.locator("dialog.lightbox"), page.locator("dialog.lightbox img")
    assert not box.is_visible()
    links = page.locator("a.enlarge")
    links.nth(0).tap() if seen.size == "phone" else links.nth(0).click()
    assert box.is_visible() and image.get_attribute("src").endswith("00.png")
    assert page.locator(".lightbox .caption").text_content() == f"00 {HOSTILE}"
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
    seen.shot()
    for key, shown in (("Right", "01"), ("Down", "11"), ("Left", "10"), ("Up", "00"), ("Up", "00")):
        page.keyboard.press(f"Arrow{key}")
        assert image.get_attribute("src").endswith(f"{shown}.png"), key
    assert page.get_by_label("previous image").is_disabled()
    page.get_by_label("next image").click()
    assert image.get_attribute("src").endswith("01.png")
    if seen.size == "phone":
        for start, end, shown in ((300, 60, "10"), (60, 300, "01"), (200, 220, "01")):
            swipe(page, start, end)
            assert image.get_attribute("src").endswith(f"{shown}.png"), (start, end)
    page.keyboard.press("Escape")
    assert not box.is_visible()
    links.nth(3).focus()
    page.keyboard.press("Enter")
    assert box.is_visible() and page.get_by_label("next image").is_disabled()
    page.get_by_label("close").click()
    assert not box.is_visible()
    assert page.evaluate("document.activeElement.dataset.caption").startswith("11")


def test_an_image_opened_right_after_another_was_left_stays(visit, pictures):
    """What closing does is done before the next image is opened: no event of the old one comes later."""
    page = visit(pictures).page
    left = page.evaluate(
        """async () => {
            const links = document.querySelectorAll("a.enlarge"), box = document.querySelector("dialog.lightbox");
            links[0].click();
            box.querySelector("[aria-label=close]").click();
            links[3].click();
            const focus = document.activeElement;
            await new Promise((done) => setTimeout(done, 200));
            return [box.open, box.querySelector("img").getAttribute("src") ?? "", focus === document.activeElement];
        }"""
    )
    assert left[0] and left[1].endswith("11.png") and left[2], left


def swipe(page, start: int, end: int) -> None:
    """Draw a finger from one place to another, sideways."""
    session = page.context.new_cdp_session(page)
    for kind, points in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
        touches = [{"x": x, "y": 300} for x in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    session.detach()


def test_the_harness_finds_what_goes_wrong(visit, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<title>x</title><img src=gone.png><img src=https://example.org/a.png><div style='width: 5000px'>wide</div>"
        "<script>console.error('said'); setTimeout(() => { throw new Error('thrown') })</script>"
    )
    seen = visit(broken)
    seen.page.wait_for_timeout(300)
    found = "\n".join(seen.problems)
    for words in ("console: said", "thrown", "gone.png", "asks another machine: https://example.org/a.png"):
        assert words in found
    assert len(seen.broken_images()) == 2 and seen.overflow() > 1000
    seen.problems.clear()
