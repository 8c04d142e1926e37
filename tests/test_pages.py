"""Pages: one file, everything escaped, no script but its own; the browser tests (tests/browser) look at them."""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from jinja2 import DictLoader, UndefinedError

from ldm_lab.pages import Data, Page, engine, render, write_page
from ldm_lab.pages.engine import json_text

sys.path.append(str(Path(__file__).parent / "browser"))
HOSTILE = "</script></title><img src=x onerror='a()'>\"&\u2028\udcff\0"


@dataclass(frozen=True, kw_only=True)
class Plain(Page):
    template: ClassVar[str] = "base.html"
    styles: ClassVar[Sequence[str]] = ("lightbox.css",)
    scripts: ClassVar[Sequence[str]] = ("lightbox.js",)


@dataclass(frozen=True, kw_only=True)
class Value(Data):
    value: str | Sequence[str | float] | Mapping[str, Sequence[str | float | None]]


def test_a_page_is_one_file_with_its_style_and_scripts(tmp_path):
    write_page(tmp_path / "new" / "page.html", Plain(title=HOSTILE))
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text and text.count("</script>") == 1 and "dialog.lightbox" in text
    loads = re.findall(r"<(?:img|link|script|iframe)[^>]* (?:src|href)=[^>]*", text)
    assert loads == ['<link rel="icon" href="data:,"']
    assert "@import" not in text and "url(" not in text


@pytest.mark.parametrize(
    "value",
    [HOSTILE, "<!--<script>", {HOSTILE: [HOSTILE, None, 1.5, True]}, ["\ud800", "é", "\u2029"]],
    ids=["text", "comment", "nested", "unicode"],
)
def test_json_for_scripts_is_safe_and_the_same_value(value):
    text = json_text(Value(value=value))
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == {"value": value}
    assert f'id="data-it">{text}</script>' in render(Plain(title="t", data={"it": Value(value=value)}))


def test_what_is_not_finite_reaches_scripts_as_null():
    assert json.loads(json_text(Value(value=[float("nan"), -float("inf"), 0.5]))) == {"value": [None, None, 0.5]}


def test_only_the_page_s_own_script_may_run():
    text = render(Plain(title="t"))
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    assert f"script-src 'sha256-{digest}'" in policy and "http" not in policy


def test_a_template_that_asks_for_what_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(engine._environment(), "loader", DictLoader({"base.html": "{{ page.nothing }}"}))
    engine._environment().cache.clear()
    with pytest.raises(UndefinedError, match="nothing"):
        render(Plain(title="t"))
    engine._environment().cache.clear()


def test_the_last_line_says_what_was_left_out(pytester):
    pytester.makeini("[pytest]\nmarkers = slow\n  browser")
    pytester.makeconftest(
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom left_out import LeftOut\n"
        "def pytest_configure(config):\n    config.pluginmanager.register(LeftOut())\n"
    )
    marked = "import pytest\ndef test_a(): pass\n@pytest.mark.slow\ndef test_b(): pass\n"
    pytester.makepyfile(marked + "@pytest.mark.browser\n@pytest.mark.parametrize('n', [1, 2])\ndef test_c(n): pass")
    line = "left out: 1 slow test (make test-all), 2 browser tests (make test-browser)"
    chosen = ("-m", "not slow and not browser")
    for processes in ([], ["-n1"]):
        ended = pytester.runpytest_inprocess(*chosen, *processes)
        assert ended.ret == 0 and ended.outlines[-1] == line
    for words in ((), ("-k", "test_a")):
        assert "left out" not in "\n".join(pytester.runpytest_inprocess(*words).outlines)


def test_without_a_browser_its_tests_fail_and_say_why(monkeypatch, capsys):
    import chromium

    monkeypatch.setattr(chromium, "TOOLS", Path("/nowhere"))
    monkeypatch.setattr(chromium.shutil, "which", lambda name: None)
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert chromium.find() is None
    with pytest.raises(chromium.NoBrowserError, match="no Chromium on the path, and no npm"):
        chromium.set_up()
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(chromium.NoBrowserError, match="CHROMIUM=/nowhere/chromium: no such program"):
        chromium.set_up()


def test_a_list_of_packages_is_brought_up_to_date_when_it_has_to_be(monkeypatch):
    import chromium

    commands = []

    def run(command, **options):
        commands.append(command[:2])
        if len(commands) == 1:
            raise chromium.NoBrowserError("Unable to locate package")

    monkeypatch.setattr(chromium, "run", run)
    chromium.from_debian()
    assert commands == [["apt-get", "install"], ["apt-get", "update"], ["apt-get", "install"]]
