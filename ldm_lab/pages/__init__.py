"""Static HTML pages: each is one file with its style and scripts inside, which opens from a folder without a server.

A page is a dataclass; its template in `templates/` extends `base.html`, which brings the look (light and dark, down to
the width of a phone), and shows its fields. Text is escaped wherever it stands; scripts get theirs as JSON, by `data`.

    @dataclass(frozen=True, kw_only=True)
    class Greeting(Page):
        template: ClassVar[str] = "greeting.html"   # {% extends "base.html" %}{% block content %}{{ page.words }} ...
        scripts: ClassVar[Sequence[str]] = ("lightbox.js",)
        words: str

    write_page(Path("out/index.html"), Greeting(title="Greeting", words="<3"))
"""

from ldm_lab.pages.engine import Data, Page, render, write_page

__all__ = ["Data", "Page", "render", "write_page"]
