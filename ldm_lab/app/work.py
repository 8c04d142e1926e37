"""One job at a time: from a request to a folder of pictures, in a thread that nobody else enters the models from."""

import gc
import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from ldm_lab.app.choices import Kind as Ask
from ldm_lab.app.choices import base_choices, upsampler_choices
from ldm_lab.app.folders import without_folders
from ldm_lab.app.followers import Following
from ldm_lab.app.limits import Limits
from ldm_lab.app.shelf import Kind, Shelf
from ldm_lab.app.store import Store
from ldm_lab.downloads import raise_refusals
from ldm_lab.errors import NotFiniteError, UserError, told_in_one_line
from ldm_lab.prompts import Prompt, parse_prompt
from ldm_lab.sampling import flat
from ldm_lab.sampling.loras import applied_loras, split_weight
from ldm_lab.sampling.needs import option_downloads
from ldm_lab.sampling.options import IMAGE_FILES, MODEL_FILES, OF_LOADING, ModelOptions, OptionValues, SamplingOptions
from ldm_lab.sampling.output import SampleFolder
from ldm_lab.sampling.pipeline import Pipeline
from ldm_lab.sampling.settings import Given, described, keep
from ldm_lab.sampling.stages import Stage, Stages

SHORT = 0.05  # seconds
PULSE = 0.5  # seconds between two signs of life of a job; so often it is seen whether somebody still waits for it
LESS = "fewer pictures at once (batch_size), or smaller ones, need less"


@dataclass(frozen=True)
class ImagePrompt:
    """An image to be mixed into the picture: an uploaded file, and its weight; None is the guidance."""

    path: Path
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks for.

    Attributes:
        model: a name of the shelf's.
        upsamplers: names of the shelf's, in the order in which they work.
        loras: names of the shelf's, each perhaps with `:0.8` after it.
        prompts: texts, as they are written with their weights; they are mixed.
        images: image prompts, mixed with them.
        count: how many pictures.
        values: options under flat names; those that are images as paths of uploaded files.
        remarks: what was set and is left out, a line each.
    """

    model: str
    upsamplers: tuple[str, ...] = ()
    loras: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    images: tuple[ImagePrompt, ...] = ()
    count: int = 1
    values: OptionValues = field(default_factory=OptionValues)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        doing: in words.
        done, total: steps; both 0 before the first one.
    """

    doing: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Pictures:
    """What a job has made.

    Attributes:
        folder: the job's, with all files; it is gone when the job's words are asked for again.
        files: of the largest size of each picture, in this folder.
        seeds: one of each.
        remarks: what its user should know, a line each.
    """

    folder: Path
    files: list[Path]
    seeds: list[int]
    remarks: list[str]


class Ended(Exception):
    """Nobody waits for the job any more."""


class Workshop:
    """The models in memory, and the one door to them."""

    def __init__(self, shelf: Shelf, loading: ModelOptions, limits: Limits, store: Store, folder: Path) -> None:
        """Begin without a model.

        Args:
            shelf: what is offered.
            loading: how models are loaded, and where they run.
            limits: of one request.
            store: of uploaded files.
            folder: in which each job has one of its own for as long as it takes.
        """
        self.shelf, self.loading, self.limits = shelf, loading, limits
        self.store, self.folder = store, folder
        self._door = threading.Lock()
        self._loaded: tuple[_State, ...] = ()
        self._pipelines: list[Pipeline] = []
        self._jobs: set[Job] = set()

    def work(self, request: Request, following: Following) -> Iterator[Progress | Pictures]:
        """Yield how far the job is, at least every `PULSE` seconds, and in the end its pictures.

        A job begins when somebody follows it. It ends at its next step where nobody does so any more, or where a caller
        stops listening (closes the iterator).

        Raises:
            UserError: what cannot be made; nothing is loaded for what is wrong in itself.
        """
        job = Job(self, request, following)
        self._jobs.add(job)
        job.thread.start()
        try:
            while True:
                said = job.next_word()
                if isinstance(said, UserError | NotFiniteError):
                    raise UserError(without_folders(str(said))) from None
                if following.is_over or isinstance(said, Ended):
                    raise UserError(f"ended: nobody has followed it for {following.followers.patience:g} seconds")
                if isinstance(said, Exception):
                    raise said
                if said is not None:
                    yield said
                if isinstance(said, Pictures):
                    break
        finally:  # nothing here may take long: Gradio closes iterators where it serves everybody
            job.ended.set()
            job.leave()
            self._jobs.discard(job)
        self.store.make_room()

    def close(self, patience: float = 30.0) -> None:
        """End all jobs at their next steps, and wait for that."""
        jobs = list(self._jobs)
        for job in jobs:
            job.ended.set()
        for job in jobs:
            job.thread.join(patience)

    def pipelines(self, files: Sequence[Path]) -> list[Pipeline]:
        """Return the models of some files, loaded unless they are those of last time."""
        wanted = tuple(map(_state, files))
        if wanted != self._loaded:
            self._loaded, self._pipelines = (), []  # not two sets of models at once
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            pipelines = [Pipeline.from_checkpoint(files[0], self.loading)]
            for file in files[1:]:
                pipelines.append(Pipeline.from_checkpoint(file, self.loading.of_upsampler(), pipelines))
            self._loaded, self._pipelines = wanted, pipelines
        return self._pipelines


class Job:
    """A request on its way to pictures, in a thread of its own."""

    def __init__(self, workshop: Workshop, request: Request, following: Following) -> None:
        self.workshop, self.request, self.following = workshop, request, following
        self.folder = Path(tempfile.mkdtemp(dir=workshop.folder))
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="pictures", daemon=True)
        self._words: queue.SimpleQueue[Progress | Pictures | Exception] = queue.SimpleQueue()
        self._last: Progress | None = None
        self._inside, self._door = 2, threading.Lock()  # the thread, and who listens to it

    def leave(self) -> None:
        """Say that the job's files are not needed any more; the last one to say so deletes them."""
        with self._door:
            self._inside -= 1
        if not self._inside:
            shutil.rmtree(self.folder, ignore_errors=True)

    def next_word(self) -> Progress | Pictures | Exception | None:
        """Return the newest thing to tell, waiting a little for it; the last one again where there is none."""
        try:
            word = self._words.get(timeout=PULSE)
            while isinstance(word, Progress) and not self._words.empty():
                word = self._words.get_nowait()
        except queue.Empty:
            return self._last
        if isinstance(word, Progress):
            self._last = word
        return word

    def _run(self) -> None:
        try:
            files = self.workshop.store.holding(_uploads(self.request))
            with files, told_in_one_line(lambda: "drawing pictures", LESS):
                self._words.put(self._made())
        except Exception as error:  # told where it is waited for
            self._words.put(error)
        finally:
            self.leave()

    def _made(self) -> Pictures:
        request, shop = self.request, self.workshop
        asked = _Asked.of(request, shop)
        self._say("waiting for its turn")
        while not self.following.is_followed:
            self._step_over()
            time.sleep(SHORT)
        with shop._door:
            self._say("loading the model")
            pipelines = shop.pipelines(asked.files)
            self._say("preparing")
            applied = applied_loras(pipelines[0].model, asked.loras) if asked.loras else nullcontext()
            with _remarks() as said, applied:
                return self._draw(asked, pipelines, said)

    def _draw(self, asked: "_Asked", pipelines: Sequence[Pipeline], said: "_Remarks") -> Pictures:
        stages = Stages([Stage(pipelines[0], asked.options), *map(Stage, pipelines[1:], asked.upsampling)])
        mixes = [asked.mix] * self.request.count
        plan = stages.check(mixes)
        last = plan.upsampling[-1] if plan.upsampling else plan.base
        downscale = pipelines[-1].model.autoencoder.downscale
        self.workshop.limits.check_size(*(side * downscale for side in last.latent_size))
        self.workshop.limits.check_work(plan.work)
        settings = described(asked.given, asked.options, plan.base, pipelines[0].model.device.type)
        out = SampleFolder(self.folder)
        files: list[Path] = []
        for batch in stages.samples(mixes, seeds=plan.base.seeds, progress=self._step):
            for row in batch:
                files.append(self.folder / out.name(len(out.images)))
                keep(out, row, asked.mix, plan.base, settings)
            self._step_over()
        out.write_list()
        lines = dict.fromkeys([*self.request.remarks, *plan.remarks, *said.lines])
        return Pictures(self.folder, files, list(plan.base.seeds), list(map(without_folders, lines)))

    def _say(self, doing: str) -> None:
        self._step_over()
        self._words.put(Progress(doing))

    def _step(self, done: int, total: int) -> None:
        self._step_over()
        self._words.put(Progress(f"step {done} of {total}", done, total))

    def _step_over(self) -> None:
        """Leave where nobody waits any more."""
        if self.ended.is_set() or self.following.is_over:
            raise Ended


@dataclass(frozen=True)
class _Asked:
    """A request whose names are files, whose texts are prompts, and whose options are checked each for itself."""

    files: list[Path]
    loras: list[str]
    mix: list[Prompt]
    options: SamplingOptions
    upsampling: list[SamplingOptions]
    given: Given

    @classmethod
    def of(cls, request: Request, shop: Workshop) -> "_Asked":
        """Return what a request asks for. Raises UserError for names that are not offered, and for what is too much."""
        shelf, limits = shop.shelf, shop.limits
        limits.check_files(request.loras, request.upsamplers)
        model = shelf.path(Kind.MODEL, request.model)
        upsamplers = [shelf.path(Kind.UPSAMPLER, name) for name in request.upsamplers]
        named = [_split(name, shelf.names(Kind.LORA)) for name in request.loras]
        loras = [f"{shelf.path(Kind.LORA, name)}:{weight!r}" for name, weight in named]
        values = _with_files(request.values, shelf)
        options = flat.base_options(values, str)
        upsampling = flat.upsampler_options(values, len(upsamplers), options.batch_size, str)
        for each in (options, *upsampling):
            limits.check_options(each)
        limits.check_count(request.count, options.rerank)
        limits.check_texts([*request.prompts, *(image.path.name for image in request.images)])
        limits.check_texts([options.negative or ""])
        for key in IMAGE_FILES:
            if values.get(key) is not None:
                limits.open_upload(Path(str(values[key])))
        needed = option_downloads(options, "")
        raise_refusals([f"{file.name}: is not on this machine, and requests download nothing" for file in needed])
        mix = [parse_prompt(text) for text in request.prompts]
        images = limits.open_uploads([image.path for image in request.images])
        mix += [Prompt(str(image.path), image.weight, opened) for image, opened in zip(request.images, images)]
        if not mix:
            raise UserError("no prompt: a text or an image is needed; a model without a conditioner takes an empty one")
        words = OptionValues({**_of_loading(shop.loading), **values})
        towers = list(map(str, shop.loading.noised_clip or ()))
        given = Given(str(model), list(map(str, upsamplers)), loras, words, towers)
        return cls([model, *upsamplers], loras, mix, options, upsampling, given)


class _State(NamedTuple):
    """A file as it is now: one that is replaced has another inode, one that is written anew another time or size."""

    path: Path
    inode: int
    changed: int
    size: int


def _state(path: Path) -> _State:
    """Return how a file of a model is now. Raises UserError if it is not there any more."""
    try:
        found = path.stat()
    except OSError:
        raise UserError(f"{path.name}: is not there any more; choose another model") from None
    return _State(path, found.st_ino, found.st_mtime_ns, found.st_size)


def _uploads(request: Request) -> list[Path]:
    """Return the uploaded files that a request works on."""
    named = [request.values[key] for key in IMAGE_FILES if request.values.get(key) is not None]
    return [*(image.path for image in request.images), *(Path(str(name)) for name in named)]


def _of_loading(loading: ModelOptions) -> OptionValues:
    """Return how models are loaded here, as far as it changes pictures and is not at its default."""
    values = asdict(loading)
    told = [field.name for field in fields(loading) if field.name in (*OF_LOADING, *MODEL_FILES)]
    return OptionValues({name: values[name] for name in told if values[name] not in (None, ModelOptions.precision)})


def _split(written: str, names: Sequence[str]) -> tuple[str, float]:
    """Return the name of a LoRA and its strength."""
    return (written, 1.0) if written in names else split_weight(written)


def _with_files(values: OptionValues, shelf: Shelf) -> OptionValues:
    """Return options with the files that they name by what is offered. Raises UserError for any other name."""
    named = {choice.name for choice in (*base_choices(), *upsampler_choices()) if choice.kind is Ask.FILE}
    return OptionValues(
        {name: shelf.path(Kind.RATINGS, str(value)) if name in named else value for name, value in values.items()}
    )


class _Remarks(logging.Handler):
    """Collects what is logged in the thread that has made it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        if record.thread == self._thread:
            self.lines.append(record.getMessage())


@contextmanager
def _remarks() -> Iterator[_Remarks]:
    """Collect what is logged in this thread for a while."""
    handler, logger = _Remarks(), logging.getLogger("ldm_lab")
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
