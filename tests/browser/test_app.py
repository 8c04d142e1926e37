"""The app in the browser: what a user does, and what strangers try."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import requests
import tiny_app
from PIL import Image
from playwright.sync_api import expect

from ldm_lab.app import work

ABORTED = "net::ERR_ABORTED"  # of the page's own streams, which it ends itself


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page with tiny models; a job has slow enough steps to be seen."""
    folder = tiny_app.make_models(tmp_path_factory.mktemp("models"))
    with tiny_app.served(folder) as address:
        yield address


@pytest.fixture
def steps(monkeypatch):
    """The times of all steps, each of them slow."""
    seen, inner = [], work.Job._step

    def step(self, done, total):
        time.sleep(0.05)
        seen.append(time.monotonic())
        inner(self, done, total)

    monkeypatch.setattr(work.Job, "_step", step)
    return seen


@pytest.fixture
def dog(tmp_path):
    Image.effect_noise((96, 64), 90).convert("RGB").save(tmp_path / "dog.png")
    return tmp_path / "dog.png"


@pytest.fixture
def opened(visit, address):
    """Open the page: its `Visit`, ready to be used; streams that the page ends itself are no problems."""
    visits = []

    def call():
        found = visit(address)
        visits.append(found)
        found.page.wait_for_selector("#draw")
        return found

    yield call
    for found in visits:
        found.page.close()
        found.problems[:] = [line for line in found.problems if not ("queue/data" in line and ABORTED in line)]


def fill(page, name, text):
    page.locator(f"#{name} input, #{name} textarea").first.fill(text)


def pick(page, name, words):
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=words, exact=True).click()


def unfold(page, name):
    page.locator(f"#{name} > button").click()


def draw(page, button="draw"):
    """Press a button, wait for its pictures; returns the settings inside of each."""
    before = page.locator("#status p").inner_text()
    page.locator(f"#{button}").click()
    page.wait_for_function(
        "before => { const said = document.querySelector('#status p').innerText;"
        " return /seed/.test(said) && said !== before }",
        arg=before,
    )
    return pictures(page)


def pictures(page):
    """Return the pictures of the page, with their settings, once they are those that the line above them tells of."""
    page.wait_for_selector("#gallery img")
    seed = int(re.search(r"seed (\d+)", page.locator("#status p").inner_text())[1])
    for _ in range(50):
        addresses = page.locator("#gallery img").evaluate_all("images => images.map(image => image.src)")
        made = []
        for source in dict.fromkeys(addresses):
            with Image.open(requests.get(source, stream=True, timeout=60).raw) as image:
                image.load()
                made.append((image, json.loads(image.text["ldm_lab"])))
        if made and made[0][1]["seed"] == seed:
            return made
        page.wait_for_timeout(100)
    raise AssertionError("the pictures are not those of the line above")


def told(page):
    """Return the messages that the page shows, and close them."""
    page.wait_for_selector(".toast-body")
    found = page.locator(".toast-body").all_inner_texts()
    page.evaluate("document.querySelectorAll('.toast-close').forEach(button => button.click())")
    page.wait_for_selector(".toast-body", state="detached")
    return " ".join(found)


def test_a_prompt_becomes_pictures_and_others_with_another_seed(opened, steps):
    visit = opened()
    page = visit.page
    assert visit.overflow() == 0
    fill(page, "prompts", "a red star:2\nblurry:-0.5")
    fill(page, "option-seed", "7")
    fill(page, "option-steps", "12")
    fill(page, "count", "2")
    page.locator("#draw").click()
    page.wait_for_selector("#status progress")
    assert re.fullmatch(r"step \d+ of 12", page.locator("#status p").inner_text())
    assert page.locator("#status").bounding_box()["y"] < page.viewport_size["height"], "progress is in view"
    visit.shot("progress")
    page.wait_for_selector("#gallery img")
    made = pictures(page)
    assert [settings["seed"] for _, settings in made] == [7, 8]
    assert made[0][1]["prompts"] == [{"text": "a red star", "weight": 2.0}, {"text": "blurry", "weight": -0.5}]
    assert "2 pictures, seed 7 to 8" in page.locator("#status").inner_text()
    assert not visit.broken_images()
    visit.shot("pictures", whole=True)
    with page.expect_download() as download:
        page.locator("#archive").click()
    assert download.value.suggested_filename == "pictures.zip"
    fill(page, "prompts", "something else")
    others = draw(page, "again")
    assert others[0][1]["prompts"] == made[0][1]["prompts"], "the same again"
    assert others[0][1]["seed"] != 7 and others[1][1]["seed"] == others[0][1]["seed"] + 1
    assert page.locator("#option-seed textarea").input_value() == str(others[0][1]["seed"])


def test_a_mask_is_painted_and_an_image_is_a_prompt(opened, dog):
    visit = opened()
    page = visit.page
    fill(page, "option-steps", "2")
    unfold(page, "begin-with")
    page.locator("#begin input[type=file]").set_input_files(dog)
    page.wait_for_selector("#begin img")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    middle = place["x"] + place["width"] / 2, place["y"] + place["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=6)
    page.mouse.up()
    page.wait_for_timeout(700)
    visit.shot("painted")
    unfold(page, "image-prompts")
    page.locator("#image-1 input[type=file]").set_input_files(dog)
    page.wait_for_selector("#image-1 img")
    fill(page, "weight-1", "0.5")
    fill(page, "option-size", "96x64")
    ((image, settings),) = draw(page)
    assert settings["prompts"] == [{**settings["prompts"][0], "image": "dog.png", "weight": 0.5}]
    assert settings["init_image"] == "dog.png" and settings["mask"].startswith("mask-")
    with Image.open(dog) as before:
        changed = [
            (x, y)
            for x in range(0, 96, 2)
            for y in range(0, 64, 2)
            if image.getpixel((x, y)) != before.getpixel((x, y))
        ]
    assert changed and (48, 32) in changed
    assert len(changed) < 48 * 32 / 2, "what was not painted on stays"
    visit.shot("inpainted", whole=True)
    assert visit.overflow() == 0


def test_a_dropped_picture_gives_its_settings(opened, tmp_path, address):
    made = tiny_app.ask(
        address, prompts=["a cat: black:2", "fog"], model="tiny", seed=41, steps=3, sampler="ddim", eta=0.5,
        guidance_interval=[0.1, 0.9], clip_denoised=True,
    )  # fmt: skip
    shutil.copy(made["pictures"][0]["path"], tmp_path / "cat.png")
    visit = opened()
    page = visit.page
    pick(page, "model", "other.safetensors")
    unfold(page, "recall")
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "cat.png")
    assert "Its settings are in the controls" in told(page)
    page.wait_for_function("document.querySelector('#prompts textarea').value === 'a cat: black:2\\nfog'")
    assert page.locator("#model input").input_value() == "tiny"
    ((image, settings),) = draw(page)
    with Image.open(tmp_path / "cat.png") as before:
        assert image.tobytes() == before.tobytes()
    assert settings["eta"] == 0.5 and settings["guidance_interval"] == [0.1, 0.9]
    (tmp_path / "words.png").write_text("no picture")
    page.locator("#dropped button[aria-label=Clear]").first.click()
    page.locator("#dropped input[type=file]").set_input_files(tmp_path / "words.png")
    assert "words.png: no settings in this file" in told(page)


def test_what_is_no_image_or_too_large_is_refused_with_a_message(opened, tmp_path):
    Image.new("L", (10_000, 10_000)).save(tmp_path / "bomb.png")
    (tmp_path / "words.png").write_text("no image at all")
    visit = opened()
    page = visit.page
    unfold(page, "image-prompts")
    unfold(page, "begin-with")
    for component in ("image-1", "begin"):
        for name, said in (("bomb.png", "too many pixels"), ("words.png", "not an image that can be read")):
            page.locator(f"#{component} input[type=file]").set_input_files(tmp_path / name)
            assert f"{name}: {said}" in told(page)
            page.wait_for_selector(f"#{component} img", state="detached")
    page.locator("#image-1 input[type=file]").set_input_files(tmp_path / "bomb.png")
    page.get_by_text("bomb.png: too many pixels").wait_for()
    page.wait_for_timeout(600)
    visit.shot("refused")
    fill(page, "option-steps", "99999")
    page.locator("#draw").click()
    page.wait_for_function("/99999 are too many/.test(document.body.innerText)")


def test_mistakes_are_messages_and_text_is_only_text(opened):
    visit = opened()
    page = visit.page
    fill(page, "option-guidance", "<img src=x onerror=alert(1)>")
    page.locator("#draw").click()
    assert "guidance: number or null is needed, not '<img src=x onerror=alert(1)>'" in told(page)
    fill(page, "option-guidance", "")
    fill(page, "option-steps", "2")
    unfold(page, "sampler-options")
    fill(page, "option-eta", "0.5")
    unfold(page, "begin-with")
    fill(page, "option-strength", "0.3")
    ((_, settings),) = draw(page)
    assert not {"eta", "strength"} & set(settings)
    expect(page.locator("#status li")).to_have_text([
        "strength: without effect: belongs to init_image, which is not given",
        "eta: without effect: the sampler unipc has no such option",
    ])  # fmt: skip
    visit.shot("remarks")
    fill(page, "count", "5")
    page.locator("#draw").click()
    assert "5 pictures are too many for one request" in told(page)
    expect(page.locator("#status p")).to_have_text("not drawn")


def test_a_full_queue_is_told(opened, steps, address):
    visit = opened()
    page = visit.page
    working = tiny_app.events(address, tiny_app.begin(address, prompts=["a"], steps=200, sampler="ddim"))
    next(working)
    waiting = [tiny_app.begin(address, prompts=["a"], steps=2, sampler="ddim") for _ in range(8)]
    page.locator("#draw").click()
    expect(page.locator("body")).to_contain_text("8 requests wait already, and no more are taken; try again later")
    visit.shot()
    working.close()
    expect(page.locator("#status p")).to_have_text("not drawn")
    visit.problems[:] = [line for line in visit.problems if "429" not in line]
    for request in waiting:  # until the queue is empty again: the page is the next test's, too
        list(tiny_app.events(address, request))


def test_two_users_at_once(opened, steps):
    first, second = opened(), opened()
    for visit, prompt in ((first, "of the first"), (second, "of the second")):
        fill(visit.page, "prompts", prompt)
        fill(visit.page, "option-steps", "15")
    first.page.locator("#draw").click()
    second.page.locator("#draw").click()
    expect(second.page.locator("#status p")).to_have_text("waiting for its turn")
    second.page.wait_for_timeout(300)
    second.shot("waits")
    for visit, prompt in ((first, "of the first"), (second, "of the second")):
        visit.page.wait_for_selector("#gallery img")
        ((_, settings),) = pictures(visit.page)
        assert [entry["text"] for entry in settings["prompts"]] == [prompt]


def test_closing_the_page_ends_the_job(opened, steps):
    visit = opened()
    fill(visit.page, "option-steps", "400")
    visit.page.locator("#draw").click()
    visit.page.wait_for_selector("#status progress")
    visit.page.close()
    closed = time.monotonic()
    time.sleep(3)
    assert steps and len(steps) < 100 and max(steps) < closed + 2


def test_stop_ends_the_job(opened, steps):
    visit = opened()
    fill(visit.page, "option-steps", "400")
    visit.page.locator("#draw").click()
    visit.page.wait_for_selector("#status progress")
    visit.page.locator("#stop").click()
    visit.page.wait_for_function("/stopped/.test(document.querySelector('#status').innerText)")
    time.sleep(2)
    count = len(steps)
    time.sleep(1)
    assert len(steps) == count < 100


def test_a_wrong_password_is_refused(visit, tmp_path_factory):
    folder = tiny_app.make_models(tmp_path_factory.mktemp("models"))
    with tiny_app.served(folder, password="geheim") as address:
        seen = visit(address)
        page = seen.page
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name="Login").click()
        page.wait_for_function("/Incorrect/i.test(document.body.innerText)")
        seen.shot()
        assert page.locator("#draw").count() == 0
        page.get_by_label("username").fill("me")
        page.get_by_label("password").fill("geheim")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#draw")
        page.close()
        seen.problems[:] = [line for line in seen.problems if not re.search("400|401|ERR_ABORTED", line)]


def test_dark(visit, address):
    seen = visit(address, dark=True)
    seen.page.wait_for_selector("#draw")
    seen.shot()
    seen.page.close()
    assert isinstance(seen.shots, Path)
