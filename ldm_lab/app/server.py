"""The program around the page: from the first request to the signal that ends it."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ldm_lab.app.door import Door
from ldm_lab.app.followers import Followers
from ldm_lab.app.hosts import Hosts, check_listening
from ldm_lab.app.limits import MEBI, Limits
from ldm_lab.app.shelf import Shelf
from ldm_lab.app.store import Store, temporary_folder
from ldm_lab.errors import UserError, install
from ldm_lab.sampling.options import ModelOptions

if TYPE_CHECKING:  # it takes seconds
    from gradio.http_server import Server

HERE = ("127.0.0.1", "localhost", "::1", "[::1]")
# No word of a use goes to anybody, and requests download nothing.
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False",
    "LDM_LAB_OFFLINE": "1",
    "GRADIO_RUN_HISTORY": "False", "GRADIO_ALLOWED_PATHS": "", "GRADIO_MCP_SERVER": "False", "GRADIO_SSR_MODE": "False",
}  # fmt: skip
FOLDERS = {"GRADIO_TEMP_DIR": "files", "GRADIO_EXAMPLES_CACHE": "examples"}
JOBS = "jobs"  # folder of what is being made
VANISHED = 20_000  # milliseconds after which a listener whose machine answers no more counts as gone
ENDING = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]
LOGIN = "The password is the one that this program was started with; any user name will do."


@dataclass(frozen=True)
class Settings:
    """How the program runs.

    Attributes:
        host, port: where it listens.
        password: that is asked for; None asks for none.
        loading: how models are loaded.
        limits: of one request.
        other_hosts: names by which the page is reached besides, such as those of a server in front of it.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None
    loading: ModelOptions = field(default_factory=ModelOptions)
    limits: Limits = field(default_factory=Limits)
    other_hosts: Sequence[str] = ()


@contextmanager
def serving(shelf: Shelf, settings: Settings) -> Iterator[str]:
    """Serve the page for a while; gives its address.

    Raises:
        UserError: the port is taken, or there is no such host.
    """
    before = {name: os.environ.get(name) for name in (*QUIET, *FOLDERS)}
    try:
        with temporary_folder() as folder:
            os.environ.update(QUIET)
            os.environ.update({name: str(folder / inner) for name, inner in FOLDERS.items()})
            for inner in (*FOLDERS.values(), JOBS):
                (folder / inner).mkdir()
            with _page(shelf, settings, folder) as address:
                yield address
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _page(shelf: Shelf, settings: Settings, folder: Path) -> Iterator[str]:
    """Serve the page out of a folder for what comes and goes."""
    from starlette.middleware import Middleware

    from ldm_lab.app.guard import Guard
    from ldm_lab.app.work import Workshop

    check_listening(settings.host)
    gr = gradio()
    from ldm_lab.app import endpoints
    from ldm_lab.app import page as pages
    from ldm_lab.app.line import OTHERS

    limits = settings.limits
    door = None if settings.password is None else Door(settings.password).is_right
    store = Store(folder / FOLDERS["GRADIO_TEMP_DIR"], limits.stored * MEBI)
    workshop = Workshop(shelf, settings.loading, limits, store, folder / JOBS)
    page, line = pages.build(workshop, Followers(), endpoints.add)
    store.waited_for = line.files
    page.queue(api_open=False, max_size=limits.waiting + OTHERS, default_concurrency_limit=4)
    theme = gr.themes.Default(font=pages.FONTS, font_mono=["ui-monospace", "monospace"])
    theme = theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    guard = Middleware(
        Guard, upload=limits.upload * MEBI, endpoints=endpoints.names(), store=store, line=line,
        hosts=Hosts(settings.host, settings.other_hosts), is_locked=settings.password is not None,
    )  # fmt: skip
    try:
        page.launch(
            server_name=settings.host, server_port=settings.port or _free_port(),
            auth=door, auth_message=LOGIN, prevent_thread_lock=True,
            quiet=True, share=False, inbrowser=False, show_error=False, ssr_mode=False,
            enable_monitoring=False, max_file_size=limits.upload * MEBI, allowed_paths=[], footer_links=[],
            theme=theme, css=pages.CSS, app_kwargs={"middleware": [guard]}, run_history=False, mcp_server=False,
            pwa=False, state_session_capacity=200,
        )  # fmt: skip
    except OSError as error:
        raise UserError(
            f"--port {settings.port}: not free; --port 0 takes any free one ({str(error).splitlines()[0][:120]})"
        ) from None
    page.app.user_middleware.sort(key=lambda each: each.cls is not Guard)  # Gradio's own, such as CORS, come after it
    page.app.middleware_stack = page.app.build_middleware_stack()
    _notice_vanished(page.server)
    try:
        yield page.local_url
    finally:
        workshop.close()
        page.close(verbose=False)


def _notice_vanished(server: "Server") -> None:
    """Have a connection end whose other side takes no bytes any more: a laptop that was closed, a cable that is out."""
    if sys.platform != "linux":  # elsewhere the system's own patience decides
        return
    for listening in server.servers:
        for its in listening.sockets:  # connections that are accepted have the options of the listening one
            its.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, VANISHED)


def gradio():  # type: ignore[no-untyped-def]
    """Return the library. Raises UserError in one line if it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the app needs the package {error.name}: {install('app')}") from None
    return gradio


def run(shelf: Shelf, settings: Settings) -> None:
    """Serve the page until SIGINT, SIGTERM, or SIGHUP of a terminal that is closed."""
    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        with serving(shelf, settings) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            while not stop.wait(0.5):
                continue
            print("ending: the job that is under way stops at its next step", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind((HERE[0], 0))
        port: int = trial.getsockname()[1]
    return port
