"""Pages in a real browser, at the width of a desktop and of a phone: `make test-browser`."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).resolve().parents[2]
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
HERE = ("127.0.0.1", "localhost", "[::1]")
SECONDS = 20


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder need the browser."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass
class Visit:
    """A page in the browser, and what went wrong in it: `page` is playwright's.

    Attributes:
        page: see https://playwright.dev/python/docs/api/class-page.
        size: "desktop" or "phone".
        shots: folder of screenshots.
        name: of the test, for their names.
        problems: errors in the console, failed requests, uncaught exceptions, requests to other machines; a test that
            provokes one takes it out.
    """

    page: "object"
    size: str
    shots: Path
    name: str
    problems: list[str] = field(default_factory=list)

    def shot(self, name: str = "", whole: bool = False) -> Path:
        """Save a screenshot to look at, of the window or of the whole page, and return its path."""
        path = self.shots / f"{self.name}{name and '-' + name}-{self.size}.png"
        self.page.screenshot(path=path, full_page=whole)
        return path

    def broken_images(self) -> list[str]:
        """Return the addresses of images that are not shown, after scrolling to each of them."""
        broken = []
        for image in self.page.locator("img:visible").all():
            image.scroll_into_view_if_needed()
            image.evaluate("image => image.decode().catch(() => {})")
            if not image.evaluate("image => image.complete && image.naturalWidth > 0"):
                broken.append(image.get_attribute("src") or "(no address)")
        return broken

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window: 0 where nothing has to be scrolled sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture(scope="session")
def browser() -> Iterator["object"]:
    """One Chromium for all tests; without one they fail."""
    import chromium
    from playwright.sync_api import sync_playwright

    found = chromium.find()
    if found is None:
        pytest.fail("no Chromium: `make test-browser` sets one up", pytrace=False)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=found, args=arguments, env=chromium.environment(found), timeout=60000
        )
        yield started
        started.close()


@pytest.fixture(params=SIZES)
def visit(request: pytest.FixtureRequest, browser: "object") -> Iterator[Callable[..., Visit]]:
    """Open a page: `visit(file or address, dark=False)` -> Visit. At the end nothing may have gone wrong in it.

    Each test runs twice, at the width of a desktop and of a phone. Requests to other machines are stopped, and fail.
    """
    size = request.param
    width, height = SIZES[size]
    shots = Path(os.environ.get("SCREENSHOTS", ROOT / "out" / "browser"))
    shots.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.originalname.removeprefix("test_")).strip("-")
    contexts, visits = [], []

    def call(target: str | Path, dark: bool = False) -> Visit:
        phone = size == "phone"
        context = browser.new_context(
            viewport={"width": width, "height": height}, device_scale_factor=2 if phone else 1, has_touch=phone,
            is_mobile=phone, color_scheme="dark" if dark else "light", reduced_motion="reduce", accept_downloads=True,
        )  # fmt: skip
        contexts.append(context)
        context.set_default_timeout(SECONDS * 1000)
        visit = Visit(context.new_page(), size, shots, name)
        visits.append(visit)
        watch(visit)
        address = target.resolve().as_uri() if isinstance(target, Path) else target
        visit.page.goto(address, wait_until="load")
        return visit

    yield call
    for context in contexts:
        context.close()
    problems = [problem for visit in visits for problem in visit.problems]
    assert not problems, "\n".join(problems)


def watch(visit: Visit) -> None:
    """Collect what goes wrong in a page."""

    def other_machine(route) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("http", "https", "ws", "wss") and address.hostname not in HERE:
            visit.problems.append(f"asks another machine: {route.request.url}")
            route.abort()
        else:
            route.continue_()

    def failed(request) -> None:
        if (
            request.failure != "net::ERR_ABORTED"
        ):  # which the page itself gave up, such as an image on the way to the next
            visit.problems.append(f"failed: {request.url}: {request.failure}")

    page, problems = visit.page, visit.problems
    page.route("**/*", other_machine)
    page.on("console", lambda said: problems.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(f"exception: {error}"))
    page.on("requestfailed", failed)
