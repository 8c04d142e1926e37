"""Weighted prompts, prompts files, image prompts from files and from a web server."""

import http.server
import io
import threading

import pytest
from PIL import Image

from ldm_lab.errors import UserError
from ldm_lab.io import images
from ldm_lab.io.images import open_image, save_png
from ldm_lab.prompts import Prompt, parse_image_prompt, parse_prompt, read_prompts
from ldm_lab.sampling.options import SamplingOptions


@pytest.mark.parametrize(
    ("written", "text", "weight"),
    [
        ("a cat", "a cat", None),
        ("a cat:2", "a cat", 2.0),
        ("a cat:-1.5", "a cat", -1.5),
        ("a cat:0", "a cat", 0.0),
        ("a cat: 2 ", "a cat", 2.0),
        ("a cat:1e1", "a cat", 10.0),
        ("a:b:2", "a:b", 2.0),
        (":2", "", 2.0),
        ("", "", None),
        ("12:30", "12", 30.0),
        ("a photo: of a cat", "a photo: of a cat", None),
        ("a cat:", "a cat:", None),
        ("a cat:two", "a cat:two", None),
        ("https://example.org/i.png", "https://example.org/i.png", None),
        ("https://example.org/i.png:0.5", "https://example.org/i.png", 0.5),
        ("http://localhost:8080/i.png", "http://localhost:8080/i.png", None),
        ("http://localhost:8080/i.png:2", "http://localhost:8080/i.png", 2.0),
        ("https://user:pw@example.org/i.png", "https://user:pw@example.org/i.png", None),
        ("C:\\pics\\i.png", "C:\\pics\\i.png", None),
        ("C:\\pics\\i.png:2", "C:\\pics\\i.png", 2.0),
        ("meet at 12\\:30", "meet at 12:30", None),
        ("meet at 12:30:1", "meet at 12:30", 1.0),
        ("the ratio\\:nan", "the ratio:nan", None),
    ],
)
def test_parse_prompt(written, text, weight):
    assert parse_prompt(written) == Prompt(text, weight)


@pytest.mark.parametrize("written", ["a cat:nan", "a cat:inf", "a cat:-inf", "a cat:1e999"])
def test_a_weight_is_finite(written):
    with pytest.raises(UserError, match="a weight must be finite"):
        parse_prompt(written)


def test_a_prompt_is_shown_as_it_is_written():
    assert [str(parse_prompt(text)) for text in ("a cat", "a cat:2", "a cat:-0.50")] == [
        "a cat",
        "a cat:2",
        "a cat:-0.5",
    ]


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat:2\r\n\r\n\ufeff  # not a comment  \n\nein Bär\u2028im Wald".encode())
    assert read_prompts(path) == ["a cat:2", "# not a comment", "ein Bär\u2028im Wald"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_files_of_other_programs(tmp_path, encoding, end):
    path = tmp_path / "prompts.txt"
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    path.write_bytes((mark + end.join(["a cat:2", "", "ein Bär", "猫", ""])).encode(encoding))
    assert read_prompts(path) == ["a cat:2", "ein Bär", "猫"]


def test_comments_in_a_prompts_file_are_prompts_which_is_said(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n# colors\n")
    assert read_prompts(path) == ["a cat", "# colors"]
    assert "no comments in a prompts file: '# colors' is a prompt" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat\n".encode("utf-16-le"), "this one has zero bytes in it; save it as UTF-8"),
        (b"\xff\xfea cat", r"what its byte order mark says \(UTF-16\); this one is not"),
        (None, "no such prompts file"),
        (b"", "no prompt in this file"),
        (b" \n\t\n", "no prompt in this file"),
        (b"caf\xe9\n", "UTF-8 text; this one is not"),
    ],
)
def test_unusable_prompts_files(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_image_prompt_from_a_file_stands_upright(tmp_path):
    path = tmp_path / "a:b.jpg"
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    path.write_bytes(encoded(Image.new("RGB", (20, 10), "red"), "JPEG", exif=exif))
    prompt = parse_image_prompt(f"{path}:-0.5")
    assert (prompt.text, prompt.weight, prompt.image.size) == (str(path), -0.5, (10, 20))


def test_unusable_image_prompts(tmp_path, monkeypatch):
    picture = encoded(Image.effect_noise((64, 64), 50))
    files = {"text.png": b"no image", "cut.png": picture[: len(picture) // 2], "empty.png": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a readable image"):
            open_image(str(tmp_path / name))
    with pytest.raises(UserError, match="no such image file"):
        open_image(str(tmp_path / "missing.png"))
    with pytest.raises(UserError, match="cannot be read"):
        open_image(str(tmp_path))
    for address in ("file:///etc/hostname", "ftp://example.org/a.png"):
        with pytest.raises(UserError, match=r"a path or an http\(s\) address"):
            open_image(address)
    (tmp_path / "large.png").write_bytes(picture)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="not a readable image: Image size"):
        open_image(str(tmp_path / "large.png"))


@pytest.fixture
def server():
    picture = encoded(Image.new("L", (7, 5), 128))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/i.png" else 404)
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *args):
            """Keep the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_image_prompt_from_the_web(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    prompt = parse_image_prompt(f"{server}/i.png:2")
    assert (prompt.text, prompt.weight, prompt.image.size) == (f"{server}/i.png", 2.0, (7, 5))
    assert open_image(f"{server}/i.png".replace("http", "HTTP")).size == (7, 5)
    with pytest.raises(UserError, match="cannot be fetched: HTTP 404 Not Found"):
        open_image(f"{server}/other.png")
    with pytest.raises(UserError, match="cannot be fetched"):
        open_image("http://127.0.0.1:1/i.png")
    monkeypatch.setattr(images, "URL_LIMIT", 10)
    with pytest.raises(UserError, match="cannot be fetched: more than"):
        open_image(f"{server}/i.png")


def test_prompts_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_prompts("configs/quickstart_prompts.txt")) > 4
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart_prompts.txt").write_text("mine")
    assert read_prompts("configs/quickstart_prompts.txt") == ["mine"]


def test_bytes_that_are_no_text_are_refused_before_anything_is_drawn(tmp_path):
    """A picture could not hold them: also a negative prompt, and what Python and the page give as prompts."""
    for make in (
        lambda: parse_prompt("red\udcff"),
        lambda: Prompt("red\udcff", 2.0),
        lambda: SamplingOptions(negative="red\udcff"),
        lambda: SamplingOptions.from_values({"negative": "\ud800"}),
    ):
        with pytest.raises(UserError, match="text in UTF-8"):
            make()
    named = Prompt("a\udcff.jpg", image=Image.new("RGB", (4, 4)))  # a file's name may be so
    save_png(tmp_path / "a.png", Image.new("RGB", (4, 4)), {"prompts": str(named)})
    assert Image.open(tmp_path / "a.png").text["prompts"] == "a\\udcff.jpg"
