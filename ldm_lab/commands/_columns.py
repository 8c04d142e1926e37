"""Columns of a comparison: each checkpoint with each combination of the values that its flags are given."""

import argparse
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from ldm_lab.commands._arguments import Taking
from ldm_lab.commands._flags import add_flags
from ldm_lab.commands._sampling_flags import (
    add_upsampler_flags,
    base_options,
    of_other_samplers,
    tell_owners,
    upsampler_options,
)
from ldm_lab.config.reading import Option
from ldm_lab.config.registry import infos, part_info
from ldm_lab.errors import UserError
from ldm_lab.sampling import flat
from ldm_lab.sampling.names import model_name
from ldm_lab.sampling.options import UPSAMPLER, SamplingOptions

OF_ALL = ("seed", "batch_size")  # what all columns have in common


@dataclass
class ComparedModel:
    """A checkpoint, and what follows it on the command line.

    Attributes:
        checkpoint: as it was given.
        upsamplers: that enlarge its pictures.
        label: what it is to be called; None: after its file.
    """

    checkpoint: str
    upsamplers: list[str] = field(default_factory=list)
    label: str | None = None

    def name(self, with_file: bool) -> str:
        """Return what it is called; with the file's name where that of its run does not tell it from the others."""
        if self.label is not None:
            return self.label
        name, stem = model_name(self.checkpoint), Path(self.checkpoint).stem
        name = name.removesuffix(".safetensors").removesuffix(".ckpt")
        return " + ".join([f"{name} {stem}" if with_file and stem != name else name, *map(model_name, self.upsamplers)])


@dataclass(frozen=True)
class Choice:
    """One of the values that an option is given.

    Attributes:
        name: of the option.
        place: of the value among those that are given.
        written: in words.
        is_told: whether there are others, from which it tells its columns.
    """

    name: str
    place: int
    written: str
    is_told: bool


@dataclass(frozen=True)
class Column:
    """A model and how it is asked.

    Attributes:
        model: the checkpoint.
        words: the flags, as those of `sample.py` that makes the same pictures.
        options: of the base model.
        upsampling: of each upsampler.
        label: tells it from the other columns.
    """

    model: ComparedModel
    words: argparse.Namespace
    options: SamplingOptions
    upsampling: Sequence[SamplingOptions]
    label: str


class _Checkpoint(Taking):
    """Begins a model."""

    def take(self, namespace: argparse.Namespace, values: Sequence[str]) -> None:
        namespace.checkpoint = [*namespace.checkpoint, *map(ComparedModel, values)]


class _OfModel(Taking):
    """Says something of the model before it."""

    def take(self, namespace: argparse.Namespace, values: Sequence[str]) -> None:
        if not namespace.checkpoint:
            raise argparse.ArgumentError(self, "belongs behind the --checkpoint that it is about")
        model: ComparedModel = namespace.checkpoint[-1]
        if self.dest == "upsampler":
            model.upsamplers.extend(values)
        elif model.label is not None:
            raise argparse.ArgumentError(self, f"is given twice for {model.checkpoint}")
        else:
            (model.label,) = values


def add_column_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of models and of how they are asked."""
    add = parser.add_argument
    add(
        "--checkpoint", action=_Checkpoint, default=[], metavar="FILE",
        help="a model: a run's folder, ema.safetensors, .ckpt, a released name; may be given again",
    )  # fmt: skip
    add(
        "--label", action=_OfModel, default=SUPPRESS, metavar="TEXT",
        help="what the checkpoint before it is called (default: after its file)",
    )  # fmt: skip
    add(
        "--upsampler", action=_OfModel, default=SUPPRESS, metavar="FILE",
        help="enlarge the pictures of the checkpoint before it with this model; may be given again",
    )  # fmt: skip
    swept, of_all = _options()
    add_flags(parser.add_argument_group("of all columns"), of_all)
    add_flags(
        parser.add_argument_group("how pictures are made", "Given again, each value makes a column."), swept,
        repeated=True,
    )  # fmt: skip
    add_flags(
        parser.add_argument_group("options of samplers", ", ".join(infos("sampler"))),
        flat.sampler_names(),
        repeated=True,
    )
    add_upsampler_flags(parser.add_argument_group("of all upsamplers"), [])
    add_flags(parser.add_argument_group("the models"), part_info("model_options", None).options)


def _options() -> tuple[dict[str, Option], dict[str, Option]]:
    """Return the options of sampling that may differ from column to column, and those that may not."""
    options = part_info("sampling", None).options
    return {k: v for k, v in options.items() if k not in OF_ALL}, {k: v for k, v in options.items() if k in OF_ALL}


def columns_of(args: argparse.Namespace) -> list[Column]:
    """Return the columns that a parsed command line asks for, model by model.

    Raises:
        UserError: options that do not go together, two columns that nothing tells apart.
    """
    models: list[ComparedModel] = args.checkpoint
    names = Counter(model.name(False) for model in models)
    swept = _swept(args)
    found: dict[str, Column] = {}
    for model in models:
        name = model.name(names[model.name(False)] > 1)
        for combination in product(*swept):
            chosen = _known_to(combination, swept)
            told = [choice.written for choice in chosen if choice.is_told]
            label = " ".join([*([name] if len(models) > 1 else []), *told]) or name
            its = _words_for(args, model, chosen)
            try:
                options = base_options(its)
                column = Column(model, its, options, upsampler_options(its, options.batch_size), label)
            except UserError as error:
                raise UserError(f"{error} (column {label})" if told else str(error)) from None
            if label not in found:
                found[label] = column
            elif found[label].model is not model:
                raise UserError(f"two columns are called {label!r}; --label behind a --checkpoint tells them apart")
    return list(found.values())


def _swept(args: argparse.Namespace) -> list[list[Choice]]:
    """Return the options that are given, each with its distinct values, in the order of the command line's help."""
    words = dict(args._get_kwargs())
    swept = []
    for name in (name for name in [*_options()[0], *flat.sampler_names()] if isinstance(words.get(name), list)):
        values = words[name]
        places = [i for i, value in enumerate(values) if value not in values[:i]]
        shown = "" if name == "sampler" else name.replace("_", " ") + " "
        written = ["-".join(map(str, values[i])) if isinstance(values[i], list) else f"{values[i]}" for i in places]
        texts = [text.removesuffix(".0") for text in written]
        swept.append([Choice(name, i, shown + text, len(places) > 1) for i, text in zip(places, texts, strict=True)])
    return swept


def _samplers(args: argparse.Namespace) -> list[str]:
    return [name for name in dict(args._get_kwargs()).get("sampler") or () if name in infos("sampler")]


def _known_to(chosen: Sequence[Choice], swept: Sequence[Sequence[Choice]]) -> list[Choice]:
    """Return the choices without options of samplers that this one has not, but another of the sweep has."""
    names = [choice.written for choices in swept for choice in choices if choice.name == "sampler"]
    (own,) = [choice.written for choice in chosen if choice.name == "sampler"] or [""]
    others = of_other_samplers(own, names)
    return [choice for choice in chosen if choice.name not in others]


def _words_for(args: argparse.Namespace, model: ComparedModel, chosen: Sequence[Choice]) -> argparse.Namespace:
    """Return the words of one column as those of `sample.py`."""
    words = dict(args._get_kwargs())
    values = {choice.name: words[choice.name][choice.place] for choice in chosen}
    swept = {choice.name for choices in _swept(args) for choice in choices}
    elsewhere = not model.upsamplers and any(other.upsamplers for other in args.checkpoint)
    kept = {
        name: value
        for name, value in words.items()
        if value is not None and name not in swept and not (elsewhere and name.startswith(UPSAMPLER))
    }
    return argparse.Namespace(**{**kept, **values, "checkpoint": model.checkpoint, "upsampler": model.upsamplers})


def tell_left_out(args: argparse.Namespace) -> None:
    """Say which options of samplers do not hold for all samplers that are compared."""
    given = (choices[0].name for choices in _swept(args) if choices[0].name in flat.sampler_names())
    tell_owners(given, _samplers(args))
