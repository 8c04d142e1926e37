"""The page of a comparison, opened from its folder."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import expect

from ldm_lab.evaluation.compare_page import Cell, Comparison, Heading, Row, write_comparison
from ldm_lab.evaluation.votes import add_up

LABELS = ("base, 250 steps", "base, 2,400 steps", "<i>other</i> model")
WORDS = (
    "a red circle on a blue background",
    'a "hostile" <b>star</b></script>',
    "ein grünes Quadrat 緑",
    "a long " * 30,
)


def make_page(folder: Path, labels=LABELS, count=16, side=64, thumbnail=None) -> Path:
    """Write a page of `count` rows whose pictures all differ; every column has a color."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        cells = []
        for j in range(len(labels)):
            image = Image.new("RGB", (side, side), ((70 * j) % 256, 255 - 12 * i, 40 * j))
            ImageDraw.Draw(image).text((4, 4), f"{i}/{j}", fill="white")
            image.save(folder / "images" / f"{i}-{j}.png")
            shown = f"images/{i}-{j}.png"
            small = min(side, thumbnail or side)
            cells.append(Cell(shown, shown, side, side, small, small, 0.25 + i / 100 - j / 50))
        rows.append(Row(f"{WORDS[i % len(WORDS)]} {i}", i, cells))
    headings = [Heading(label, {"sampler": "ddim", "guidance": f"{j + 1}"}) for j, label in enumerate(labels)]
    write_comparison(folder, Comparison("Base and other", headings, rows, "cosine of picture and prompt", 7))
    return folder / "index.html"


def order_of(page, row: int) -> list[int]:
    """Return the columns as a row shows them, by their pictures' addresses."""
    links = page.locator(f'[data-row="{row}"] a.enlarge').all()
    return [int(link.get_attribute("href").removesuffix(".png").rpartition("-")[2]) for link in links]


def test_all_images_are_shown_and_the_page_is_small(visit, tmp_path):
    page = make_page(tmp_path / "a page & more", labels=[*LABELS, "fourth"])
    assert page.stat().st_size < 200_000
    seen = visit(page)
    assert seen.page.locator(".row img").count() == 64
    assert seen.broken_images() == [] and seen.overflow() == 0
    assert seen.page.locator("b, i").count() == 0
    assert "mean 0.325" in seen.page.locator(".head").text_content()
    seen.page.evaluate("scrollTo(0, 0)")
    seen.shot()
    seen.page.locator("details.panel summary").click()
    assert "guidance" in seen.page.locator(".settings").text_content() and seen.overflow() == 0
    seen.shot("settings")


@pytest.mark.parametrize("count", [1, 2, 13], ids=["one", "two", "thirteen"])
def test_any_number_of_columns(visit, tmp_path, count):
    seen = visit(make_page(tmp_path / "page", labels=[f"guidance {n}" for n in range(count)], count=3, side=128))
    assert seen.overflow() == 0 and seen.broken_images() == []
    assert seen.page.locator("#blind").count() == (count > 1)
    boxes = [image.bounding_box() for image in seen.page.locator(".row img").all()]
    assert all(box["width"] >= 60 for box in boxes)
    seen.page.evaluate("scrollTo(0, 0)")
    seen.shot(f"{count}")
    if count > 1:
        seen.page.locator("#blind").click()
        assert seen.page.locator('[data-row="0"] .vote').count() == count and seen.overflow() == 0
        seen.shot(f"{count}-blind")
        seen.page.locator('[data-row="0"] .vote').last.click()
        assert "1 of 3" in seen.page.locator("#progress").text_content()


def test_the_filter(visit, tmp_path):
    page = (seen := visit(make_page(tmp_path / "page"))).page
    box, rows = page.get_by_label("filter prompts"), page.locator(".row:visible")
    assert rows.count() == 16 and page.locator("[data-count]").text_content() == "16"
    box.fill("RED circle")
    assert rows.count() == 4 and page.locator("[data-count]").text_content() == "4 of 16"
    box.fill("緑 grünes")
    assert rows.count() == 4
    box.fill("</script>")
    assert rows.count() == 4
    box.fill("nothing of the kind")
    assert rows.count() == 0
    box.fill("")
    assert rows.count() == 16 and seen.broken_images() == []


def test_images_enlarge_within_what_is_filtered(visit, tmp_path):
    page = (seen := visit(make_page(tmp_path / "page", side=512, thumbnail=256))).page
    page.get_by_label("filter prompts").fill("circle")
    page.locator('[data-row="4"] a.enlarge').first.click()
    image, caption = page.locator(".lightbox img"), page.locator(".lightbox .caption")
    assert image.get_attribute("src").endswith("4-0.png") and caption.text_content().startswith(LABELS[0])
    seen.shot()
    for key, address in (("Right", "4-1"), ("Down", "8-1"), ("Right", "8-2"), ("Right", "12-0"), ("Left", "8-2")):
        page.keyboard.press(f"Arrow{key}")
        assert image.get_attribute("src").endswith(f"{address}.png"), key
    page.keyboard.press("Escape")
    assert not page.locator(".lightbox").is_visible()


def test_a_long_page_lays_out_what_is_seen_alone_and_has_each_prompt_once(visit, tmp_path):
    cells = [Cell(f"images/{j}.png", f"images/{j}.png", 64, 64, 64, 64, 0.5) for j in range(8)]
    rows = [Row(f"a photograph of house {i} in the hills", i, cells) for i in range(300)]
    path = make_page(tmp_path / "page", labels=[f"model {j}" for j in range(8)], count=1)
    for cell in cells:
        Image.new("RGB", (64, 64)).save(path.parent / cell.image)
    write_comparison(path.parent, Comparison("Long", [Heading(f"model {j}", {}) for j in range(8)], rows, "cosine"))
    text = path.read_text()
    assert text.count("a photograph of house 77 in the hills") == 1 and len(text) < 400 * len(rows) * len(cells)
    page = (seen := visit(path)).page
    laid_out = "row => row.querySelector('figure').checkVisibility({contentVisibilityAuto: true})"
    last = page.locator(".row").last
    assert page.locator(".row").first.evaluate(laid_out) and not last.evaluate(laid_out)
    page.wait_for_function(
        f"scrollTo(0, document.body.scrollHeight) ?? ({laid_out})([...document.querySelectorAll('.row')].at(-1))"
    )
    assert seen.overflow() == 0
    last.locator("a.enlarge").last.click()
    expect(page.locator(".lightbox .caption")).to_have_text("model 7: a photograph of house 299 in the hills")
    expect(page.get_by_label("next image")).to_be_disabled()
    page.keyboard.press("ArrowUp")
    expect(page.locator(".lightbox .caption")).to_have_text("model 7: a photograph of house 298 in the hills")
    page.keyboard.press("Escape")
    page.locator("#blind").click()
    expect(page.locator(".tie:visible").first).to_be_visible()
    page.keyboard.press("1")
    expect(page.locator("#progress")).to_have_text("1 of 300 rows voted")
    expect(page.locator('[data-row="0"] .vote[aria-pressed="true"]')).to_have_count(1)


def test_blind_votes_are_kept_saved_and_added_up(visit, tmp_path):
    path = make_page(tmp_path / "page", count=6)
    page = (seen := visit(path)).page
    assert order_of(page, 0) == [0, 1, 2] and page.locator(".vote:visible").count() == 0
    page.locator("#blind").click()
    orders = [order_of(page, row) for row in range(6)]
    assert len({tuple(order) for order in orders}) > 1 and all(sorted(order) == [0, 1, 2] for order in orders)
    text = page.locator("main").inner_text()
    assert not any(label in text for label in LABELS) and "0.2" not in text
    captions = page.evaluate("[...document.querySelectorAll('a.enlarge')].map(lightbox.caption)")
    assert len(captions) == 18 and not any(label in caption for label in LABELS for caption in captions)
    assert page.locator("#seed").input_value() == "7"
    seen.shot("blind")
    # Column 1 wins four times: by key, by pointer, and by key where it is enlarged; one tie, one vote for column 0.
    page.keyboard.press(str(orders[0].index(1) + 1))
    assert "1 of 6" in page.locator("#progress").text_content()
    page.locator('[data-row="1"] .vote').nth(orders[1].index(1)).click()
    page.locator('[data-row="2"] a.enlarge').first.click()
    page.keyboard.press(str(orders[2].index(1) + 1))
    assert not page.locator(".lightbox").is_visible() and page.locator("#seed").is_disabled()
    page.keyboard.press("0")
    page.keyboard.press(str(orders[4].index(0) + 1))
    page.reload()
    page.locator("#blind").click()
    assert [order_of(page, row) for row in range(6)] == orders
    assert "5 of 6" in page.locator("#progress").text_content()
    page.keyboard.press(str(orders[5].index(1) + 1))
    result = page.locator("#result")
    assert result.is_visible() and page.locator("#blind").get_attribute("aria-pressed") == "false"
    first = page.locator("#result tbody tr").first.locator("td").all_text_contents()
    assert first == [LABELS[1], "4", "80 %"] and "1 without a preference" in result.text_content()
    assert order_of(page, 3) == [0, 1, 2] and seen.overflow() == 0
    seen.shot("result")
    page.locator("#blind").click()
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "votes.json")
    votes = json.loads((tmp_path / "votes.json").read_text())
    assert votes["seed"] == 7 and votes["columns"] == list(LABELS) and votes["votes"][0]["order"] == orders[0]
    tally = add_up([str(tmp_path / "votes.json")])
    assert (tally.wins, tally.ties) == ([1, 4, 0], 1)
    page.reload()
    page.locator("#blind").click()
    page.locator('[data-row="3"] .vote').nth(orders[3].index(2)).click()
    page.locator("#blind").click()
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "later.json")
    tally = add_up([str(tmp_path / "later.json"), str(tmp_path / "votes.json")])
    assert (tally.wins, tally.ties, tally.voters) == ([1, 4, 1], 0, 1)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#clear").click()
    assert "0 of 6" in page.locator("#progress").text_content()
    page.locator("#seed").fill("8")
    page.locator("#seed").blur()
    assert [order_of(page, row) for row in range(6)] != orders


def test_votes_stay_among_the_rows_that_are_shown(visit, tmp_path):
    page = visit(make_page(tmp_path / "page", count=8)).page
    page.locator("#blind").click()
    page.get_by_label("filter prompts").fill("circle")
    page.get_by_label("filter prompts").blur()
    page.keyboard.press("1")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("2")
    page.keyboard.press("9")
    assert "2 of 8" in page.locator("#progress").text_content()
    page.get_by_label("filter prompts").fill("1")
    assert "2 of 8" in page.locator("#progress").text_content()


def test_a_page_that_the_command_has_made(visit, program, tmp_path):
    from test_sample_program import make_checkpoint

    (tmp_path / "model").mkdir()
    checkpoint = make_checkpoint(tmp_path / "model", dropout=0.2)
    (tmp_path / "prompts.txt").write_text("a red fox\n<b>a cat</b>\n")
    words = ("--checkpoint", checkpoint, "--prompts", tmp_path / "prompts.txt", "--guidance", 1, "--guidance", 3)
    more = ("--sampler", "ddim", "--steps", 2, "--device", "cpu", "--out", tmp_path / "page")
    code, _, err = program("ldm_lab.__main__", "compare", *words, *more)
    assert code == 0, err
    seen = visit(tmp_path / "page" / "index.html")
    assert seen.page.locator(".row img").count() == 4 and seen.broken_images() == [] and seen.overflow() == 0
    assert seen.page.locator(".row .score").count() == 4 and seen.page.locator("b").count() == 0
    seen.page.locator("details.panel summary").click()
    assert "ddim" in seen.page.locator("details.panel").text_content()
    seen.shot()
