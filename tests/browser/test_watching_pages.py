"""The page of a run and of several, from the file system: curves, zoom, values, pictures over time, what is odd."""

from pathlib import Path

import pytest
from playwright.sync_api import expect
from run_folders import write_run

from ldm_lab.__main__ import main

ROWS = 3000  # of steps 50, 100, ... 150,000: more than there are buckets


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs, one of them with a name that is hard to link, and the page of both."""
    folder = tmp_path_factory.mktemp("pages") / "runs"
    write_run(folder / "first", rows=ROWS, pictures=5)
    write_run(folder / "it's #2 & 100%?", rows=ROWS // 2, pictures=2, lr=3e-4, seed=1)
    main(["runs", str(folder)])
    return folder


COLORS = """title => {
  const boxes = [...document.querySelectorAll(".chart")];
  const canvas = boxes.find(box => box.querySelector("h3").textContent === title).querySelector("canvas");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, found = new Set();
  for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) found.add(pixels.slice(i, i + 3).join(" "));
  return [...found];
}"""


def colors(page, title: str) -> set[str]:
    """Return the colors in a chart, as far as they are opaque, as #rrggbb."""
    return {"#" + bytes(map(int, color.split())).hex() for color in page.evaluate(COLORS, title)}


def chart(page, title: str):
    return page.locator(".chart").filter(has=page.get_by_role("heading", name=title, exact=True))


def test_a_run_s_page_shows_all_there_is(visit, runs):
    page = (seen := visit(runs / "first" / "index.html")).page
    assert seen.broken_images() == [] and seen.overflow() == 0
    assert page.locator(".chart").count() == 11
    assert "#2f7ed8" in colors(page, "Loss"), "the line is drawn"
    assert "#b3261e" in colors(page, "Loss"), "a NaN is marked"
    assert "1 NaN, first at step 120,050" in chart(page, "Loss").locator(".odd").text_content()
    assert "highest 35.25 at step 90,050" in chart(page, "Loss").text_content()
    assert "1 started, 1 resumed, 1 ended, 3 left out, 1 rolled back" in page.content()
    assert page.locator("b").all_text_contents() == ["demo", "enlargements"], "hostile names stay texts"
    page.get_by_text("config.yaml").click()
    assert "</script><b>hostile</b>" in page.locator("#config pre").text_content()
    seen.shot(whole=True)


def test_pictures_over_time(visit, runs):
    page = (seen := visit(runs / "first" / "index.html")).page
    figure = page.locator("figure").filter(has_text="demo")
    slider, image = figure.get_by_role("slider"), figure.locator("img")
    slider.scroll_into_view_if_needed()
    shown = []
    for at in range(5):
        slider.evaluate("(slider, at) => { slider.value = at; slider.dispatchEvent(new Event('input')) }", at)
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 160
        shown.append(image.get_attribute("src"))
        assert f"{at + 1} of 5" in figure.text_content()
    assert shown == [f"demo/step%3D{1 + ROWS * 10 * at:08d}.png" for at in range(5)]
    figure.get_by_label("earlier").click()
    assert image.get_attribute("src") == shown[3]
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert image.get_attribute("src") == shown[2] and "step 60,001" in figure.text_content()
    seen.shot()
    image.click()
    assert page.locator("dialog.lightbox img").get_attribute("src").endswith(shown[2])
    assert page.locator("dialog.lightbox .caption").text_content() == "demo, step 60,001"


def test_values_zoom_and_scales(visit, runs):
    page = (seen := visit(runs / "first" / "index.html")).page
    loss = chart(page, "Loss")
    canvas, tip = loss.locator("canvas"), loss.locator(".tip")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.6, middle)
    assert "steps about" in tip.text_content() and "smoothed" in tip.text_content() and tip.is_visible()
    seen.shot("values")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=4)
    page.mouse.up()
    whole, range_ = page.get_by_role("button", name="whole run"), page.locator("[data-charts=range]")
    expect(range_).to_contain_text("steps ")
    expect(whole).to_be_enabled()
    numbers = [int(word.replace(",", "")) for word in range_.text_content().split() if word[0].isdigit()]
    assert 70_000 < numbers[0] < numbers[1] < 135_000, "all charts are zoomed to the steps that were dragged over"
    seen.shot("zoomed")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    page.get_by_role("button", name="log scale").click()
    page.wait_for_timeout(100)
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    assert page.get_by_role("button", name="log scale").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="outliers").click()
    page.locator("[data-charts=smooth]").fill("0")
    whole.click()
    expect(whole).to_be_disabled()
    seen.shot("log")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    assert "steps about" in tip.text_content() and "smoothed" not in tip.text_content()
    page.reload()
    assert page.get_by_role("button", name="log scale").get_attribute("aria-pressed") == "true", "kept in this browser"


def test_a_legend_hides_lines(visit, runs):
    page = visit(runs / "first" / "index.html").page
    title = "Loss by noise level, t from 0 (data) to 1 (noise)"
    assert "#e4572e" in colors(page, title)
    chart(page, title).get_by_role("button", name="t from 0.25").click()
    page.wait_for_timeout(100)
    assert "#e4572e" not in colors(page, title) and "#2ca02c" in colors(page, title)
    chart(page, "Seconds of an optimizer step").get_by_role("button", name="loss").click()
    page.wait_for_timeout(100)
    assert "#2f7ed8" in colors(page, "Loss"), "another line of that name stays"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_several_runs(visit, runs, dark):
    page = (seen := visit(runs / "index.html", dark=dark)).page
    assert seen.overflow() == 0 and page.locator("#runs tbody tr").count() == 2
    assert {"#2f7ed8", "#e4572e"} <= colors(page, "Loss"), "a line for each run"
    seen.shot("dark" if dark else "light", whole=True)
    page.get_by_label("show first in the charts").click()
    page.wait_for_timeout(100)
    assert not {"#2f7ed8"} & colors(page, "Loss") and "#e4572e" in colors(page, "Loss")
    first = page.locator("#runs tbody tr").nth(0)
    assert "first" in first.text_content()
    page.get_by_role("button", name="steps").click()
    assert "it's #2 & 100%?" in first.text_content(), "sorted by the number of steps"
    page.get_by_role("button", name="steps").click()
    assert "first" in first.text_content()
    folded = page.locator("details").first
    folded.locator("summary").click()
    page.wait_for_timeout(100)
    assert "#e4572e" in colors(page, "t from 0.00")
    assert "0.0003" in page.locator("#differences + div").text_content()
    page.get_by_role("link", name="it's #2 & 100%?").click()
    assert page.title() == "it's #2 & 100%?" and seen.broken_images() == []
