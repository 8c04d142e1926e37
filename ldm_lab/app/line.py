"""The queue of those who wait for pictures: how long it may be, who still waits in it, and whose turn a job is."""

import time
from pathlib import Path

import gradio as gr
from gradio.context import LocalContext
from gradio.queueing import Event

from ldm_lab.app.followers import Followers, Following
from ldm_lab.app.store import named_files

QUEUE = "pictures"  # whatever makes some waits in this one
OTHERS = 64  # places for what is done at once, such as looking at an upload
CALLS, JOIN = "/gradio_api/call/", "/gradio_api/queue/join"


class Line:
    """The queue of a page."""

    def __init__(self, page: gr.Blocks, most: int, followers: Followers) -> None:
        """Take the queue of a page, which may be built yet.

        Args:
            page: the page.
            most: requests that wait at once.
            followers: who follows what.
        """
        self.page, self.most, self.followers = page, most, followers

    async def refusal(self, path: str, number: int | None) -> str:
        """Return why a request is not taken into the queue; "" if it is, or if it wants no pictures.

        Those that nobody follows any more leave the queue first.

        Args:
            path: where the request is sent.
            number: of the function that it names.
        """
        if not self._wants_pictures(path, number):
            return ""
        for event in self._waiting():
            if self._following(event).is_over:
                await self.page._queue.clean_events(event_id=event._id)
        if len(self._waiting()) < self.most:
            return ""
        return f"{self.most} requests wait already, and no more are taken; try again later"

    def of_this_job(self) -> Following:
        """Return who follows the job of the event that is being worked on in this thread."""
        name = LocalContext.event_id.get(None)
        event = self.page._queue.event_ids_to_events.get(name or "")
        if event is None:  # cancelled meanwhile
            return Following(self.followers, (), time.monotonic() - self.followers.patience)
        return self._following(event)

    def files(self) -> list[Path]:
        """Return the files that those name who wait for pictures, or whose turn it is."""
        events = list(self.page._queue.event_ids_to_events.values())
        bodies = [event.data.data for event in events if event.concurrency_id == QUEUE and event.data is not None]
        return [Path(path) for body in bodies for _, path in named_files(body)]

    def _following(self, event: Event) -> Following:
        return Following(self.followers, (event._id, event.session_hash), event.enqueue_time)

    def _waiting(self) -> list[Event]:
        queue = self.page._queue.event_queue_per_concurrency_id.get(QUEUE)
        return [] if queue is None else list(queue.queue)

    def _wants_pictures(self, path: str, number: int | None) -> bool:
        path, function = path.rstrip("/"), None
        if path.startswith(CALLS):
            function = next((its for its in self.page.fns.values() if its.api_name == path.rpartition("/")[2]), None)
        elif path == JOIN and number is not None:
            function = self.page.fns.get(number)
        return function is not None and function.concurrency_id == QUEUE
