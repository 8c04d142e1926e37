"""Several models, or folders of pictures, measured in the same way: one table."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldm_lab.checkpoints.importer import Section
from ldm_lab.conditioners.embedding import EmbeddingConditioner
from ldm_lab.data.file_facts import digest, facts_of
from ldm_lab.data.jobs import PassOptions
from ldm_lab.data.passes import run_pass
from ldm_lab.data.work_items import WorkItem, file_batches
from ldm_lab.embed import Encoder
from ldm_lab.errors import UserError
from ldm_lab.evaluation.asked import Asked
from ldm_lab.evaluation.checks import (
    check_asked,
    check_measured,
    check_pictures,
    check_real,
    checked_models,
    scored_rows,
)
from ldm_lab.evaluation.feature_files import PictureRows
from ldm_lab.evaluation.features import EmbeddingFeatures, Features, InceptionFeatures
from ldm_lab.evaluation.jobs import FeatureJob, FilesJob, PicturesItem, PicturesJob, rows_of_items
from ldm_lab.evaluation.metrics import CLIP_SCORE, RealSet, Value, few_images, over_seeds, picture_value
from ldm_lab.evaluation.model_parts import PartsJob, lpips_network, part_values
from ldm_lab.evaluation.origin import data_told, origin_of
from ldm_lab.evaluation.own_files import STEM, is_plot, listed_pictures
from ldm_lab.evaluation.real_images import FILE, RealImages, real_rows
from ldm_lab.evaluation.settings import Models, Setting, check_prompts, picture_seeds
from ldm_lab.evaluation.tables import Row, Table
from ldm_lab.metrics import METRICS, of_kind, spaces_of
from ldm_lab.progress import print_line
from ldm_lab.prompts import Prompt
from ldm_lab.sampling import ModelOptions
from ldm_lab.sampling.names import public_name


class Comparison:
    """Measures what is asked, in passes that several processes share and that go on where they were interrupted."""

    def __init__(self, asked: Asked, loading: ModelOptions, options: PassOptions) -> None:
        """Find the real images and load what looks at pictures.

        Args:
            asked: what is measured.
            loading: how models are loaded.
            options: of the passes.

        Raises:
            UserError: what is missing, or cannot be measured.
        """
        check_asked(asked)
        self.asked, self.options, self.models = asked, options, Models(loading)
        self.made_of, self.of_data = asked.of_pictures, of_kind(asked.metrics, "data")
        self.real = None if asked.data is None else RealImages.open(asked.data, asked.limit)
        self.networks = self.load_networks()
        self.settings = checked_models(asked, self.models)
        self.lpips = lpips_network() if "lpips" in self.of_data else None
        self.remarks: list[str] = []
        self.is_first = True  # of several processes
        self.tells = True  # what the data are; once is enough

    def load_networks(self) -> list[Features]:
        """Return the networks whose features are compared."""
        found: list[Features] = []
        for space in spaces_of(self.asked.metrics):
            found.append(InceptionFeatures(self.asked.inception) if space == "inception" else self.embedding())
        return found

    def embedding(self) -> EmbeddingFeatures:
        """Return the network whose embeddings are compared. Raises UserError for a model that has none."""
        if self.asked.clip is not None:
            encoder = Encoder(self.asked.clip)
            return EmbeddingFeatures(encoder.conditioner, encoder.embedder)
        names = [name for name in self.asked.metrics if METRICS[name].space == "embedding"]
        if not self.asked.checkpoints:
            raise UserError(f"--metric {names[0]}: --clip has to say whose embeddings are compared, as no model does")
        checkpoint = self.asked.checkpoints[0]
        model = self.models.pipeline(checkpoint, torch.device("cpu")).model
        embedder = model.embedder()
        if not isinstance(model.conditioner, EmbeddingConditioner) or embedder is None:
            raise UserError(
                f"--metric {names[0]}: {checkpoint} has no embeddings of images (its conditioner is "
                f"{model.conditioner.part_name}): --clip says whose are to be compared"
            )
        return EmbeddingFeatures(model.conditioner, embedder)

    def run(self) -> Table | None:
        """Measure all; return the table, in other processes than the first None. Raises UserError.

        Pictures are made last: what could end the evaluation is found before (`checks`).
        """
        asked = self.asked
        real = self.real_set()
        prompts = self.prompts(real) if asked.makes_pictures else []
        parts = {its: self.parts(name, its) for name, its in asked.named_models if self.of_data}
        named = zip(asked.names.folders, asked.images, strict=True)
        folders = {name: self.folder_pictures(name, folder) for name, folder in named}
        made = self.made_pictures(prompts) if asked.makes_pictures else []
        if not self.is_first:
            return None
        values = {
            checkpoint: part_values(self.of_data, real, its, asked.bootstrap) for checkpoint, its in parts.items()
        }
        rows = [self.made_row(setting, real, its, values.get(setting.checkpoint, {})) for setting, its in made]
        if not made:
            rows = [Row(name, values=values[its]) for name, its in asked.named_models if its in values]
        rows += [self.folder_row(name, real, its) for name, its in folders.items()]
        used = next((len(its) for its in parts.values()), None) if real is None else len(real.rows)
        self.remark(self.of_data, {"real images": used or 0} if parts else {})
        data = data_told(self.real, asked.features, used)
        origin = origin_of(asked.named_models, self.models, data, prompts, asked.prompts is None)
        return Table(rows, self.facts(real), list(dict.fromkeys(self.remarks)), origin)

    def run_pass(self, job: FeatureJob, items: Sequence[WorkItem], what: str, max_skipped: float = 1.0) -> None:
        """Do what is not done yet of a pass; note what was skipped of what, and whether this is the first process."""
        report = run_pass(job, items, replace(self.options, max_skipped=max_skipped))
        self.is_first = report is not None
        if report is not None and report.counts.skipped:
            self.remarks.append(f"{what}: {report.counts}")

    # ------------------------------------------------------------------------------------------------- the real images

    def real_set(self) -> RealSet | None:
        """Return the features of the real images; None where nothing is compared with them."""
        asked, needed = self.asked, [name for name in self.asked.metrics if METRICS[name].kind != "captions"]
        of_pictures = [name for name in needed if METRICS[name].space is not None]
        own_captions = asked.makes_pictures and asked.prompts is None
        if not of_pictures and not own_captions:
            return None
        path, self.tells = asked.features or asked.out / FILE, False
        rows, unusable = real_rows(self.real, self.networks, path, asked.features is None, self.options)
        if unusable is not None:
            self.remarks.append(f"real images: {' '.join(unusable.split())}")
        check_real(needed, rows)
        return RealSet(rows)

    def prompts(self, real: RealSet | None) -> list[Prompt]:
        """Return the prompts of pictures: those given, or captions of the real images, evenly spread."""
        asked = self.asked
        if asked.prompts is not None:
            if asked.pictures < len(asked.prompts):
                self.remarks.append(f"prompts: the first {asked.pictures:,} of {len(asked.prompts):,}, one a picture")
            return asked.prompts
        texts = real.rows.texts if real else []
        captions = [text for text in texts if text.strip()]
        if not captions:
            raise UserError("--prompts: has to be given, as the real images have no captions")
        if len(captions) < len(texts):
            self.remarks.append(
                f"prompts: captions of {len(captions):,} of {len(texts):,} real images; others have none"
            )
        count = min(asked.pictures, len(captions))
        found = [Prompt(captions[number * len(captions) // count]) for number in range(count)]
        for its in self.settings:
            check_prompts(self.models.pipeline(its.checkpoint, torch.device("cpu")), found, its.options)
        return found

    # --------------------------------------------------------------------------------------------------- made pictures

    def made_pictures(self, prompts: Sequence[Prompt]) -> list[tuple[Setting, list[PictureRows]]]:
        """Return what is seen on the pictures of each model and choice, seed by seed."""
        settings = self.settings
        items = [[self.items(i, its, seed, prompts) for seed in self.asked.seeds] for i, its in enumerate(settings)]
        job = PicturesJob(self.networks, self.models, settings, prompts)
        self.run_pass(job, [item for of_seeds in items for of_seed in of_seeds for item in of_seed], "pictures")
        return [(its, list(map(rows_of_items, of_seeds))) for its, of_seeds in zip(settings, items, strict=True)]

    def made_row(
        self, setting: Setting, real: RealSet | None, made: Sequence[PictureRows], parts: dict[str, Value]
    ) -> Row:
        """Return the row of a model and a choice: values of its pictures, and those of its parts."""
        asked = setting.guidance, setting.sampler, setting.steps
        row = Row(setting.model, *asked, self.asked.seeds, self.asked.pictures, settings=Section(setting.told))
        values = {name: self.value(name, real, made, row.label()) for name in self.made_of}
        self.remark(self.made_of, counts_of(real, made[0]))
        judge = next((its.embedder for its in self.networks if isinstance(its, EmbeddingFeatures)), None)
        if judge is not None and setting.embedder not in (None, judge):
            self.remarks.append(
                f"{setting.model}: its own conditioner is another one than that whose embeddings are compared"
            )
        return replace(row, values={**values, **parts})

    def items(self, number: int, setting: Setting, seed: int, prompts: Sequence[Prompt]) -> list[PicturesItem]:
        """Return the work items of one seed's pictures, a batch each."""
        seeds, size, key = picture_seeds(seed, self.asked.pictures), self.options.batch_size, setting.key(prompts)
        networks = "-".join(network.key for network in self.networks)
        folder = self.asked.out / "parts" / f"pictures-{key}-{networks}" / f"seed={seed}"
        return [
            PicturesItem(
                folder / f"{first:07d}",
                number,
                key,
                tuple(seeds[first : first + size]),
                tuple(place % len(prompts) for place in range(first, min(first + size, len(seeds)))),
            )
            for first in range(0, len(seeds), size)
        ]

    def value(self, name: str, real: RealSet | None, made: Sequence[PictureRows], label: str) -> Value:
        """Return the value of a metric over seeds; of one seed with a margin by bootstrap.

        A model whose pictures are not finite has NaN, with a remark: the others' numbers are not lost with it.
        """
        try:
            if len(made) == 1:
                return picture_value(name, real, made[0], self.asked.bootstrap)
            return over_seeds([picture_value(name, real, rows, 0).value for rows in made])
        except UserError as error:
            self.remarks.append(f"{label}: {error}")
            return Value(math.nan)

    # ----------------------------------------------------------------------------------------- pictures that are there

    def folder_pictures(self, name: str, folder: str) -> PictureRows:
        """Return what is seen on the pictures in a folder. Raises UserError for what cannot be measured."""
        networks = "-".join(network.key for network in self.networks)
        found = file_batches(folder, self.asked.out, is_plot)
        files = facts_of(found[0].folder.files())
        listed = listed_pictures(Path(folder), [its for item in found for its in item.names])
        # Other pictures under the same names are looked at anew.
        facts = [os.path.abspath(folder), digest(files), digest(files, times=True), *sorted(listed or ())]
        place = hashlib.sha256("\n".join(facts).encode(errors="surrogateescape")).hexdigest()[:12]
        target = self.asked.out / "parts" / f"folder-{public_name(folder)}-{place}-{networks}"
        items = [replace(its, target=target / its.target.name) for its in found]
        if plot := next(filter(is_plot, Path(folder).rglob(f"{STEM}.png")), None):
            print_line(f"--images {folder}: {plot} is the plot of an evaluation, and none of the pictures")
        self.run_pass(FilesJob(self.networks, listed=listed), items, name)
        made = rows_of_items(items)
        if listed is not None:
            self.remarks.append(f"{name}: where samples.json lists pictures these alone, without grids")
        check_pictures(folder, self.made_of, made)
        return made

    def folder_row(self, name: str, real: RealSet | None, made: PictureRows) -> Row:
        """Return the row of a folder of pictures."""
        values = {}
        for metric in self.made_of:
            rows = made
            if METRICS[metric].kind == "captions":
                rows = made.taken(scored_rows(made.tensors[CLIP_SCORE]))
                if len(rows) < len(made):
                    self.remarks.append(
                        f"{name}: {metric} of {len(rows)} of {len(made)} pictures: others have no caption"
                    )
            values[metric] = picture_value(metric, real, rows, self.asked.bootstrap)
        self.remark(self.made_of, counts_of(real, made))
        return Row(name, pictures=len(made), values=values)

    # ------------------------------------------------------------------------------------------------- a model's parts

    def parts(self, name: str, checkpoint: str) -> PictureRows:
        """Return what is measured of a model's parts on the real images."""
        assert self.real is not None, "it is looked at when the comparison is made"
        model, identity = self.models.pipeline(checkpoint, torch.device("cpu")).model, self.models.identity(checkpoint)
        networks = [its for its in self.networks if its.space in spaces_of(self.of_data)]
        job = PartsJob(model, identity, self.of_data, networks, self.real.source, self.lpips, self.tells)
        self.tells = False
        key = "-".join([identity[:12], *sorted(self.of_data), self.real.key(networks)])
        items = self.real.items(self.asked.out / "parts" / f"model-{key}")
        self.run_pass(job, items, "real images", self.real.source.max_skipped)
        measured = rows_of_items(items)
        self.remarks += check_measured(name, self.of_data, measured)
        return measured

    # ------------------------------------------------------------------------------------------------------- the table

    def remark(self, names: Sequence[str], counts: Mapping[str, int]) -> None:
        """Note what has to be said of few images, by whose they are, for some metrics."""
        if counts:
            self.remarks += few_images(names, counts, {network.space: network.width for network in self.networks})

    def facts(self, real: RealSet | None) -> dict[str, str]:
        """Return what the numbers are of."""
        facts = {"real images": f"{len(real.rows):,}"} if real is not None else {}
        return facts | {network.space: network.describe() for network in self.networks}


def counts_of(real: RealSet | None, made: PictureRows) -> dict[str, int]:
    """Return how many images are compared, by whose they are."""
    return {"pictures": len(made)} | ({"real images": len(real.rows)} if real is not None else {})
