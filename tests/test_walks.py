"""README and docs as a reader follows them: the commands of a page one after the other, as tests/walks.py says."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_connection, socket
from threading import Thread

import pytest
import warm
from documented import PAGES, PROGRAM, Command
from small_world import Store
from tiny import program_environment
from walks import NEEDS, PORT, Way, ways

WALKED = [page for page in PAGES if any(way.text for way in ways(page))]
SECONDS = 900
SHELL = re.compile(r"[|&;<>`*?]|\$\(")  # what a shell has to read


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


class Walk:
    """A folder in which commands are run, with the servers that some of them start: with a password and without."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.servers = folder, dict[bool, subprocess.Popen]()
        self.ports = {False: free_port(), True: free_port()}
        self.environment = program_environment({"LDM_LAB_CACHE": str(folder / "cache"), "LDM_LAB_OFFLINE": "1"})
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{self.environment['PATH']}"
        self.environment.update({"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "CURL_HOME": str(folder)})
        (folder / ".curlrc").write_text("fail\nshow-error\n")  # else curl ends well whatever a server answers

    def run(self, way: Way) -> str:
        """Run a command; return what it printed. Raises AssertionError."""
        has_password = "password" in way.text or "cookies" in way.text
        text = way.text.replace(str(PORT), str(self.ports[has_password]))
        if " app " in text:
            self.serve(text, has_password)
            return ""
        words = None if SHELL.search(re.sub(r"'[^']*'|\"[^\"]*\"", "", text)) else PROGRAM.search(text)
        if words and text.startswith("python "):
            code, out, err = self.run_warm(way.words)
        else:
            done = subprocess.run(
                ["bash", "-c", text],
                cwd=self.folder,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        found_none = code == 1 and " scores get " in text and "absent" in out  # of the page's hashes in the stand-in
        assert code == 0 or found_none, f"{way.command}\n{text}\n{out[-1500:]}\n{err[-3000:]}"
        assert "Traceback" not in err, f"{way.command}\n{err[-3000:]}"
        if "curl" in text and "/call/" in text:  # a job that fails is answered in a stream that begins well
            assert "event: complete" in out and "event: error" not in out, f"{way.command}\n{out[-3000:]}"
        return out

    def run_warm(self, words: list[str]) -> tuple[int, str, str]:
        """Run one of our commands in a copy of a process that has imported torch."""
        with warm.Program(["-m", "ldm_lab", *words], self.folder, self.environment) as program:
            return program.wait(SECONDS), *program.printed()

    def serve(self, text: str, has_password: bool) -> None:
        """Start a server, in the place of the one of its kind before."""
        self.end(has_password)
        self.servers[has_password] = subprocess.Popen(
            ["bash", "-c", f"exec {text}"], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.servers[has_password].poll() is None:
            try:
                create_connection(("127.0.0.1", self.ports[has_password]), timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        self.end(has_password)
        raise AssertionError(f"{text}: does not answer")

    def end(self, has_password: bool) -> None:
        """End a server, if there is one."""
        if server := self.servers.pop(has_password, None):
            server.terminate()
            said, _ = server.communicate(timeout=60)
            assert server.returncode in (0, 143, -15), said


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def walk(tmp_path) -> Iterator[Walk]:
    begun = Walk(tmp_path)
    yield begun
    begun.end(False)
    begun.end(True)


class Answers(BaseHTTPRequestHandler):
    """What a server may answer to a line of curl."""

    def do_GET(self) -> None:
        """Answer /CODE/... with a status; the last word of a job's address is the event."""
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(f"event: {self.path.split('/')[-1]}\ndata: null\n".encode())

    def log_message(self, *_: str) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def answers() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("200/gradio_api/info", True), ("401/gradio_api/info", False), ("404/gradio_api/info", False),
        ("200/call/sample/complete", True), ("200/call/sample/error", False), ("200/call/sample/generating", False),
        ("500/call/sample/complete", False),
    ],
    ids=str,
)  # fmt: skip
def test_a_line_of_curl_fails_with_what_the_server_answers(walk, answers, path, good):
    command = Command("docs/app.md", 1, "", f"curl -sN {answers}/{path}")
    with nullcontext() if good else pytest.raises(AssertionError, match=r"docs/app\.md:1: curl"):
        walk.run(Way(command, command.text))


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.slow, id=Path(page).stem) for page in WALKED])
def test_the_commands_of_a_page_run_one_after_the_other(store, walk, page):
    store.world(walk.folder, *NEEDS.get(page, ()))
    for way in ways(page):
        begin = time.monotonic()
        if way.text:
            walk.run(way)
        print(f"{time.monotonic() - begin:6.1f} s  {way.command.line}: {way}")
