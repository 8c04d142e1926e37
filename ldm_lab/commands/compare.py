"""Put the pictures of several models beside each other: the same prompts and seeds, on one page.

    python -m ldm_lab compare --checkpoint runs/a --checkpoint runs/b --prompts prompts.txt --out compared
    python -m ldm_lab compare --checkpoint runs/a --prompts prompts.txt --guidance 1 --guidance 3 --out guidance
    python -m ldm_lab compare --checkpoint F --label small --checkpoint G --upsampler H --prompts prompts.txt --out both
    python -m ldm_lab compare --votes votes-*.json

Each checkpoint makes a column; of any family, with the upsamplers that follow it. A flag of sampling that is given
several times makes a column for each of its values. Row i of the page has the seed SEED + i in all columns; it is the
picture that `sample.py` makes of that prompt with these flags, and `sample.py --from` makes it once more.

--out gets index.html, which opens without a server, images/, and comparison.json. What was made before with the same
settings is not made again, so the command goes on where it was stopped, and prompts or columns can be added. The page
has a blind mode: names are hidden, columns are shuffled row by row, votes are cast by key and saved as a file; --votes
adds up such files.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import add_imports_argument, whole_number
from ldm_lab.commands._columns import Column, add_column_arguments, columns_of, tell_left_out
from ldm_lab.commands._flags import given
from ldm_lab.config.registry import part_info
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.io.atomic import writable_folder
from ldm_lab.sampling.options import ModelOptions

if TYPE_CHECKING:  # these import torch, which takes seconds
    from ldm_lab.commands._similarity import Similarity
    from ldm_lab.evaluation.compare_page import Cell, Comparison, Heading
    from ldm_lab.prompts import Prompt
    from ldm_lab.sampling.pipeline import Pipeline
    from ldm_lab.sampling.recorded import Entry
    from ldm_lab.sampling.stages import Stages

IMAGES, THUMBNAILS = "images", "thumbnails"
LARGEST_SHOWN = 384  # pixels of a side; larger pictures have a thumbnail
MANY = 5  # columns are not all named in the title
HIDDEN = ("device", "width", "height")  # of the settings that a page tells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    add_column_arguments(parser)
    add = parser.add_argument
    add("--prompts", metavar="FILE", help="text (UTF-8), a prompt on each line")
    add("--out", metavar="DIR", help="folder of the page and its images")
    add("-n", type=whole_number(1), default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add("--title", metavar="TEXT", help="of the page (default: the columns' names)")
    add(
        "--clip", nargs="+", default=[], metavar="KEY=VALUE",
        help="score the pictures by this CLIP: model, pretrained, weights (default: by the first model's conditioner)",
    )  # fmt: skip
    add("--no-scores", action="store_true", help="do not score the pictures")
    add(
        "--blind-seed",
        type=whole_number(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the order of columns in blind mode (default: 0)",
    )
    add("--wandb", choices=("none", "offline", "online"), default="none", help="send a table, too (%(default)s)")
    add("--project", default="ldm_lab", metavar="NAME", help="of wandb (%(default)s)")
    add("--entity", metavar="NAME", help="team or user at wandb (default: the account's)")
    add("--votes", nargs="+", default=[], metavar="FILE", help="add up votes that pages have saved; nothing is made")


def run(args: argparse.Namespace) -> None:
    """Make the pictures that are missing, and the page; or add up votes."""
    if args.votes:
        return add_up_votes(args)
    if args.clip and args.no_scores:
        raise UserError("--clip: says what scores pictures, and --no-scores leaves scores out; give one of them")
    missing = [flag for flag in ("checkpoint", "prompts", "out") if not dict(args._get_kwargs())[flag]]
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(f'--{flag}' for flag in missing)}")
    columns = columns_of(args)
    if any(column.options.seed < 0 for column in columns):
        raise UserError("--seed -1: all models begin from the same noise; give a seed, from 0 on")
    tell_left_out(args)

    from ldm_lab.evaluation.compare_page import write_comparison
    from ldm_lab.sampling.needs import announce_models

    loading = ModelOptions(**given(args, part_info("model_options", None).options))
    rows = prompt_rows(args, columns[0].options.seed)
    needs = {(id(c.model), c.options.clip_guidance is None, c.options.aesthetic): c for c in columns}
    if args.clip:
        check_clip(args.clip)
    for column in needs.values():
        announce_models(column.model.checkpoint, column.model.upsamplers, loading, column.options)
    folder = writable_folder(args.out, "--out")
    grid = Grid(folder, columns, rows, args.title, args.blind_seed)
    if args.no_scores:
        grid.shown = ""
    scorer = None
    for _, group in groupby(columns, key=lambda column: id(column.model)):
        with told_in_one_line(lambda: "loading the model and making pictures", "less than --batch-size, --offload"):
            found = make_columns(list(group), grid, loading)
        scorer = scorer or found
        write_comparison(folder, grid.comparison())
    if not args.no_scores:
        score(args, grid, scorer, loading)
    it = grid.comparison()
    write_comparison(folder, it)
    grid.tell_unused()
    if args.wandb != "none":
        send(args, folder, it)
    print(f"{it.made} pictures ({grid.made} new) of {len(it.columns)} columns: {folder / 'index.html'}")


def add_up_votes(args: argparse.Namespace) -> None:
    """Print what files of votes say together. Raises UserError for flags that have no place beside --votes."""
    from ldm_lab.evaluation.votes import add_up

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    words = dict(args._get_kwargs())
    alone = dict(parser.parse_args(["--votes", *args.votes])._get_kwargs())
    others = [name for name in alone if words.get(name, alone[name]) != alone[name]]
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}" for name in others)
        raise UserError(f"--votes: adds up files, and no pictures are made: {flags} cannot stand beside it")
    print("\n".join(add_up(args.votes).lines()))


def check_clip(words: list[str]) -> None:
    """Raise UserError if --clip is none, or names a file that is not there; nothing is loaded."""
    from ldm_lab.checkpoints.parts import part_downloads
    from ldm_lab.embed import clip_config

    part_downloads("conditioner", clip_config(words, None), "--clip")


@dataclass(frozen=True)
class AskedRow:
    """A prompt and a seed."""

    prompt: "Prompt"
    written: str
    seed: int


def prompt_rows(args: argparse.Namespace, seed: int) -> list[AskedRow]:
    """Return the rows: each line of the file -n times, with seeds that count on as those of `sample.py`."""
    from ldm_lab.prompts import parse_prompt, read_prompts

    lines = [line for line in read_prompts(args.prompts) for _ in range(args.n)]
    return [AskedRow(parse_prompt(line), line, seed + i) for i, line in enumerate(lines)]


class Grid:
    """What is there so far: pictures in the folder, and a page of them."""

    def __init__(
        self, folder: Path, columns: Sequence[Column], rows: Sequence[AskedRow], title: str | None, blind_seed: int
    ) -> None:
        from ldm_lab.evaluation.compare_page import earlier_scores

        self.folder, self.columns, self.rows, self.blind_seed = folder, columns, rows, blind_seed
        labels = ", ".join(column.label for column in columns)
        self.title = title or (labels if len(columns) < MANY else f"Comparison of {len(columns)} columns")
        self.cells: list[list[Cell | None]] = [[None] * len(columns) for _ in rows]
        self.headings: list[Heading] = []
        self.made = 0
        self.shown, self.known = earlier_scores(folder)

    @property
    def done(self) -> int:
        """How many columns are complete."""
        return len(self.headings)

    def comparison(self) -> "Comparison":
        """Return what is there."""
        from ldm_lab.evaluation.compare_page import Comparison, Heading, Row, Score, Scored

        scores = self.known.get(self.shown, {})
        cells = [[cell and replace(cell, score=scores.get(cell.image)) for cell in row] for row in self.cells]
        rows = [Row(row.written, row.seed, its) for row, its in zip(self.rows, cells, strict=True)]
        rest = [Heading(column.label, {}) for column in self.columns[self.done :]]
        known = [Scored(scorer, [Score(*pair) for pair in its.items()]) for scorer, its in self.known.items()]
        return Comparison(self.title, [*self.headings, *rest], rows, self.shown, self.blind_seed, known)

    def tell_unused(self) -> None:
        """Say how many pictures in the folder are of other settings."""
        used = {cell.image for row in self.cells for cell in row if cell is not None}
        there = [file for file in (self.folder / IMAGES).glob("*.png") if f"{IMAGES}/{file.name}" not in used]
        if there:
            print(f"note: {len(there)} pictures in {self.folder / IMAGES} are of other settings; they stay there")


@dataclass(frozen=True)
class Scorer:
    """A model whose conditioner compares images and texts: its checkpoint, and in words which conditioner it is."""

    checkpoint: str
    conditioner: str


def make_columns(columns: Sequence[Column], grid: Grid, loading: ModelOptions) -> Scorer | None:
    """Make the missing pictures of a model's columns; return the model if its conditioner can score pictures."""
    from ldm_lab.checkpoints.embedders import describe
    from ldm_lab.sampling import Pipeline, Stage, Stages

    model = columns[0].model
    pipelines = [Pipeline.from_checkpoint(model.checkpoint, loading)]
    for file in model.upsamplers:
        pipelines.append(Pipeline.from_checkpoint(file, loading.of_upsampler(), pipelines))
    frozen = frozen_sums(pipelines, loading.guide_model)
    for column in columns:
        stages = Stages(
            [Stage(pipelines[0], column.options), *map(Stage, pipelines[1:], column.upsampling)],
        )
        try:
            make_column(column, grid, stages, frozen)
        except UserError as error:
            raise UserError(f"{column.label}: {error}") from None
    loaded = pipelines[0].model
    if loaded.embed_width is None or loaded.conditioner.is_unconditional:
        return None
    embedder = loaded.embedder()
    return Scorer(model.checkpoint, describe(embedder) if embedder else f"the conditioner of {model.name(True)}")


def frozen_sums(pipelines: "Sequence[Pipeline]", guide_model: str | Path | None) -> "Entry":
    """Return the checksums of what models take from other files, under names such as `autoencoder_sha256`."""
    from ldm_lab.sampling.loading import frozen_sha256, locate_model
    from ldm_lab.sampling.names import checksum
    from ldm_lab.sampling.recorded import Entry

    by_model = [frozen_sha256(pipeline.model) for pipeline in pipelines]
    roles = dict.fromkeys(role for sums in by_model for role in sums)
    found = Entry({f"{role}_sha256": [sums.get(role) for sums in by_model] for role in roles})
    return (
        found if guide_model is None else Entry({**found, "guide_model_sha256": [checksum(locate_model(guide_model))]})
    )


def make_column(column: Column, grid: Grid, stages: "Stages", frozen: "Entry") -> None:
    """Make the missing pictures of one column, and note what they were made with; `frozen` are other files' sums."""
    from ldm_lab.commands.sample import Steps, asked
    from ldm_lab.evaluation.compare_page import Heading
    from ldm_lab.sampling.output import write_picture
    from ldm_lab.sampling.recorded import Entry
    from ldm_lab.sampling.settings import caption, described, parameters, prompt_entry

    mixes, seeds = [[row.prompt] for row in grid.rows], [row.seed for row in grid.rows]
    plan = stages.check(mixes, seeds=seeds)
    settings = described(asked(column.words), column.options, plan.base, stages.base.pipeline.model.device.type)
    sizes = [list(request.latent_size) for request in (plan.base, *plan.upsampling)]
    entries = [Entry({"prompts": [prompt_entry(mix[0], plan.base)], "seed": seed}) for mix, seed in zip(mixes, seeds)]
    names = [_name(Entry({**entry, **settings, "sizes": sizes, "frozen": frozen})) for entry in entries]
    number = grid.done
    for i, name in enumerate(names):
        grid.cells[i][number] = cell_of(grid.folder, name)
    missing = [i for i, row in enumerate(grid.cells) if row[number] is None]
    if missing:
        bar = Steps(f"{column.label} ({number + 1} of {len(grid.columns)}), {len(missing)} pictures")
        batches = stages.samples([mixes[i] for i in missing], seeds=[seeds[i] for i in missing], progress=bar)
        for i, row in zip(missing, (row for batch in batches for row in batch)):
            image = row[-1].image
            told = {**row[0].image.info, "batch": list(row[0].batch), "width": image.width, "height": image.height}
            entry = Entry({"file": f"{names[i]}.png", **entries[i], **told, **settings})
            as_others_read = parameters(mixes[i], plan.base, settings, seeds[i])
            write_picture(grid.folder / IMAGES / f"{names[i]}.png", image, caption(mixes[i][0]), entry, as_others_read)
            grid.cells[i][number] = cell_of(grid.folder, names[i])
            grid.made += 1
    grid.headings.append(Heading(column.label, _in_words(Entry({**settings, **frozen}))))


def _name(entry: "Entry") -> str:
    """Return what a picture of these settings is called, wherever it is made."""
    said = {key: value for key, value in entry.items() if key != "device"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


def _in_words(settings: "Entry") -> dict[str, str]:
    """Return the settings that the page tells."""
    told = {key: value for key, value in settings.items() if key not in HIDDEN and not key.endswith("_sha256")}
    lists = {key: value if isinstance(value, list) else [value] for key, value in told.items()}
    words = {key: [f"{v:g}" if isinstance(v, float) else str(v) for v in values] for key, values in lists.items()}
    return {**{key: ", ".join(its) for key, its in words.items()}, **_short_sums(settings)}


def _short_sums(settings: "Entry") -> dict[str, str]:
    """Return the beginnings of files' checksums; that of the checkpoint is called "file"."""
    sums = {key.removesuffix("_sha256"): its for key, its in settings.items() if key.endswith("_sha256")}
    words = {
        key: ", ".join(str(one or "none")[:12] for one in (its if isinstance(its, list) else [its]))
        for key, its in sums.items()
    }
    return {"file" if key == "checkpoint" else f"{key}_file": f"sha256 {text}" for key, text in words.items()}


def size_of_thumbnail(path: Path) -> tuple[int, int] | None:
    """Return the width and height of a thumbnail, pixels; None if there is none, or it is damaged."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None


def cell_of(folder: Path, name: str) -> "Cell | None":
    """Return the picture of a name with its thumbnail, made where that is missing or damaged; None without one."""
    from PIL import Image

    from ldm_lab.evaluation.compare_page import Cell
    from ldm_lab.io.atomic import atomic_write

    path = folder / IMAGES / f"{name}.png"
    try:
        with Image.open(path) as image:
            width, height = image.size
            if max(width, height) <= LARGEST_SHOWN:
                image.load()
                return Cell(f"{IMAGES}/{name}.png", f"{IMAGES}/{name}.png", width, height, width, height)
            small = folder / THUMBNAILS / f"{name}.jpg"
            side = size_of_thumbnail(small)
            if side is not None:
                image.verify()  # its checksums, in a tenth of the time that it takes to make it small
            else:
                image.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN))
                side = image.size
                with atomic_write(small) as file:
                    image.convert("RGB").save(file, "JPEG", quality=88)
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError, Image.DecompressionBombError):  # damaged: it is made anew
        return None
    return Cell(f"{IMAGES}/{name}.png", f"{THUMBNAILS}/{name}.jpg", width, height, *side)


# ------------------------------------------------------------------------------------------------- scores and tables


def score(args: argparse.Namespace, grid: Grid, scorer: Scorer | None, loading: ModelOptions) -> None:
    """Score the pictures that have no score of the same kind from an earlier page."""
    from ldm_lab.commands._similarity import by_clip, by_conditioner

    similarity: Similarity | None = None
    if args.clip:
        which, similarity = by_clip(args.clip, loading.device)
        name = f"cosine of picture and prompt by {which}"
    elif scorer is not None:
        name = f"cosine of picture and prompt by {scorer.conditioner}"
    else:
        print("note: no scores: no model's conditioner compares images and texts; --clip names one that does")
        grid.shown = ""
        return
    known = grid.known.setdefault(name, {})
    todo = [(row.prompt, i, j) for i, row in enumerate(grid.rows) for j in range(len(grid.columns))]
    missing = [(prompt, cell) for prompt, i, j in todo if (cell := grid.cells[i][j]) and cell.image not in known]
    if missing:
        similarity = similarity or by_conditioner(scorer.checkpoint if scorer else "", loading)
        known |= _scores(grid.folder, missing, similarity)
    grid.shown = name


def _scores(folder: Path, missing: "list[tuple[Prompt, Cell]]", similarity: "Similarity") -> dict[str, float]:
    from PIL import Image

    from ldm_lab.progress import Bar

    found: dict[str, float] = {}
    bar = Bar("scores", "picture", len(missing))
    for prompt, cell in missing:
        with Image.open(folder / cell.image) as image:
            found[cell.image] = similarity(image.convert("RGB"), prompt)
        bar.update(1)
    bar.close()
    return found


def send(args: argparse.Namespace, folder: Path, it: "Comparison") -> None:
    """Send the page's pictures and scores to wandb as a table."""
    from ldm_lab.training.tables import PictureTable, send_table

    labels = [column.label for column in it.columns]
    scores = [f"{label}: similarity" for label in labels] if it.scorer else []
    rows = []
    for row in it.rows:
        pictures = [None if cell is None else folder / cell.image for cell in row.cells]
        values = [None if cell is None else cell.score for cell in row.cells] if it.scorer else []
        rows.append([row.prompt, row.seed, *pictures, *values])
    table = PictureTable("comparison", ["prompt", "seed", *labels, *scores], rows)
    send_table(
        table, mode=args.wandb, folder=folder, run=folder.resolve().name, project=args.project, entity=args.entity
    )
