"""Make pictures with a trained model.

    python sample.py --checkpoint runs/quickstart "a red star on a blue background"
    python sample.py --checkpoint F "a lighthouse:3" "watercolor:1.5" "blurry:-0.5" -n 16   one mix of three, 16 times
    python sample.py --checkpoint F --prompts configs/demo_prompts.txt                      a picture for each line
    python sample.py --checkpoint F "in the snow" --images fox.jpg:2 --sampler ddim --steps 100 --eta 0.5
    python sample.py --checkpoint F --images fox.jpg -n 9                                   variations of a picture
    python sample.py --checkpoint F "a fox" --init-image dog.jpg --strength 0.6             image to image
    python sample.py --checkpoint F "a hat" --init-image dog.jpg --mask hat.png             inpainting
    python sample.py --checkpoint F "a fox" "a dog" --interpolate 16                        from one to the other
    python sample.py --checkpoint F "a fox" --upsampler G                                   small pictures, then large
    python sample.py --from samples/00003.png                                               a picture once more

Prompts on the command line, texts and images alike, are mixed with each other. The lines of a --prompts file are
pictures of their own; prompts on the command line are then mixed into each of them.

A prompt may have a weight, written text:weight; without one it has that of --guidance. Weight 1 is the plain model,
more exaggerates, less than 0 steers away. What follows the last colon is a weight if it is a finite number; a backslash
before the colon makes it text, as in "meet at 12\\:30". A model without a conditioner takes "" with --guidance 1.

Picture i has the seed SEED + i and depends on that, its own prompts and the settings alone, not on the batch size. It
is written as 00000.png, 00001.png, ... with its settings as metadata; samples.json lists them all, grid.png shows them.
In a folder that has pictures already, numbers and list go on, and the grid is named after its first picture: nothing is
overwritten. With an --upsampler each picture is kept at both sizes, as 00000_base.png and 00000.png.

With --captions each picture has its prompt in a .txt beside it, as `score`, `evaluate` and data of folders read them:
the texts that it is guided toward, without their weights, joined by commas; what is steered away from and image prompts
are left out. There is no grid then: it would be read as a picture.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import add_imports_argument, whole_number
from ldm_lab.commands._flags import FlagParser, add_flags, given, words_of
from ldm_lab.commands._repeat import Repeat, fill_in, seeds
from ldm_lab.commands._sampling_flags import (
    add_upsampler_flags,
    base_options,
    fill_in_stages,
    numbered,
    upsampler_options,
)
from ldm_lab.config.registry import add_imports, infos, part_info
from ldm_lab.errors import UserError, told_in_one_line
from ldm_lab.sampling import flat
from ldm_lab.sampling.aliases import our_flag
from ldm_lab.sampling.options import (
    NOT_INTERPOLATED,
    ModelOptions,
    SamplingOptions,
)

if TYPE_CHECKING:  # these import torch, which takes seconds
    from ldm_lab.prompts import Prompt
    from ldm_lab.sampling.output import SampleFolder
    from ldm_lab.sampling.request import Request
    from ldm_lab.sampling.settings import Given

EACH = "--upsampler.2.steps 40 is of the second upsampler alone, and so with all flags that begin with --upsampler-."
STEPS = """Of a model with timesteps, --steps also takes which of them are visited: fast27, ddim50, 10,10,3,2,2, ...
`python train.py --parts` tells the defaults."""


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line, make the pictures."""
    words = sys.argv[1:] if words is None else words
    add_imports(_imports(words))
    return run(parser(numbered(words)).parse_words(words))


def run(args: argparse.Namespace) -> int:
    """Make the pictures that a parsed command line asks for."""
    fill_in_stages(args)
    repeat = fill_in(args)
    options = base_options(args)
    upsampling = upsampler_options(args, options.batch_size)
    loading = ModelOptions(**given(args, part_info("model_options", None).options))
    check_together(args, options)

    from ldm_lab.sampling.needs import announce_models  # not before: it imports torch, which takes seconds
    from ldm_lab.sampling.output import SampleFolder

    folder = SampleFolder(Path(args.out))
    mixes = keyframes(args) if args.interpolate else prompt_mixes(args, repeat)
    announce_models(args.checkpoint, args.upsampler, loading, options)
    less = (
        f"less than --batch-size {options.batch_size}, --offload, --precision bf16-mixed or --tile-denoiser need less"
    )
    with told_in_one_line(lambda: "loading the model and drawing pictures", less):
        if args.interpolate:
            return draw_film(args, folder, mixes, options, loading)
        return draw_pictures(args, folder, mixes, options, upsampling, loading, repeat)


# ------------------------------------------------------------------------------------------------- the command line


def parser(upsamplers: Sequence[int] = ()) -> FlagParser:
    """Return the command line's description; with the flags of single upsamplers, by their numbers."""
    p = FlagParser(prog="sample.py", description=__doc__, hint=our_flag)
    whole = {"type": whole_number(1), "metavar": "N"}
    add = p.add_argument
    add("texts", nargs="*", metavar="PROMPT", help="text or text:weight; several are mixed")
    add("--checkpoint", metavar="FILE", help="a run's folder, ema.safetensors, or .ckpt; a released name")
    add(
        "--from", dest="repeat", metavar="PICTURE",
        help="make this picture of sample.py's once more; what is given beside it is changed",
    )  # fmt: skip
    add("--prompts", metavar="FILE", help="text (UTF-8), a picture for each line; only blank lines are dropped")
    add(
        "--images", nargs="+", default=[], metavar="IMAGE", help="image prompts: paths, http(s) addresses; also :weight"
    )
    add("-n", **whole, help="pictures of the mix, or of each line of --prompts (default: 4, or 1; with --from 1)")
    add("--interpolate", **whole, help="N pictures on the way from each PROMPT to the next; strip.png, film.gif")
    add("--out", default="samples", metavar="DIR", help="where the pictures go (default: samples)")
    add("--captions", action="store_true", help="write prompts as captions, a .txt beside each picture; and no grid")
    add_imports_argument(p)
    sampling = part_info("sampling", None).options
    add_flags(p.add_argument_group("how pictures are made"), sampling)
    add_flags(
        p.add_argument_group("options of samplers", f"{', '.join(infos('sampler'))}. {STEPS}"), flat.sampler_names()
    )
    group = p.add_argument_group(
        "models in a row", f"A base model's pictures, enlarged by one or more upsamplers. {EACH}"
    )
    group.add_argument(
        "--upsampler", action="append", default=[], metavar="FILE",
        help="enlarge the pictures with this model; all sizes are kept; may be given again",
    )  # fmt: skip
    group.add_argument(
        "--stages", metavar="FILE", help="a YAML with the list `stages`: checkpoint and options of each, the base first"
    )
    group.add_argument("--only-last", action="store_true", help="write the pictures of the last stage alone")
    add_upsampler_flags(group, upsamplers)
    add_flags(p.add_argument_group("the model"), part_info("model_options", None).options)
    return p


def check_together(args: argparse.Namespace, options: SamplingOptions) -> None:
    """Raise UserError for flags that do not go together."""
    if "noised_clip" in args and options.clip_guidance is None:
        raise UserError("--noised-clip belongs to --clip-guidance")
    if not args.interpolate:
        return
    unfit = [name for name in NOT_INTERPOLATED if name in options.given()]
    unfit += ["upsampler"] if args.upsampler else []
    unfit += ["captions"] if args.captions else []
    if args.n or unfit:
        flag = "-n" if args.n else "--" + unfit[0].replace("_", "-")
        raise UserError(f"--interpolate does not go with {flag}")


def _imports(words: Sequence[str]) -> list[str]:
    """Return the modules of --imports: they may bring samplers, whose options are flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--imports", action="append", default=[])
    return early.parse_known_args(list(words))[0].imports


# --------------------------------------------------------------------------------------------------------- prompts


def prompt_mixes(args: argparse.Namespace, repeat: Repeat | None) -> list[list["Prompt"]]:
    """Return the prompts of each picture. Raises UserError without any."""
    from ldm_lab.prompts import parse_prompt, read_prompts

    common = command_line_prompts(args)
    if args.prompts:
        lines = read_prompts(args.prompts)
        return [[parse_prompt(line), *common] for line in lines for _ in range(args.n or 1)]
    if not common and repeat is not None:
        return [repeat.prompts()] * (repeat.batch[1] if repeat.batch else args.n or 1)
    if not common:
        raise UserError("no prompt: give a text, --images IMAGE or --prompts FILE (--help explains)")
    return [common] * (args.n or (4 if repeat is None else 1))


def keyframes(args: argparse.Namespace) -> list[list["Prompt"]]:
    """Return the keyframes of an interpolation, a prompt each."""
    from ldm_lab.prompts import parse_prompt, read_prompts

    lines = read_prompts(args.prompts) if args.prompts else []
    return [[prompt] for prompt in [*map(parse_prompt, lines), *command_line_prompts(args)]]


def command_line_prompts(args: argparse.Namespace) -> list["Prompt"]:
    """Return the texts and images of the command line."""
    from ldm_lab.prompts import parse_image_prompt, parse_prompt

    prompts = [parse_prompt(text) for text in args.texts]
    for number, image in enumerate(args.images):
        try:
            prompts.append(parse_image_prompt(image))
        except UserError as error:
            hint = "" if number == 0 else "; texts go before --images, which takes all that follows"
            raise UserError(f"{error}{hint}") from None
    return prompts


# -------------------------------------------------------------------------------------------------------- pictures


def draw_pictures(
    args: argparse.Namespace,
    folder: "SampleFolder",
    mixes: "list[list[Prompt]]",
    options: SamplingOptions,
    upsampling: Sequence[SamplingOptions],
    loading: ModelOptions,
    repeat: Repeat | None = None,
) -> int:
    """Make a picture of each mix, of several stages all sizes, and a grid."""
    from ldm_lab.sampling import Pipeline, Stage, Stages
    from ldm_lab.sampling.settings import described, keep, training_caption

    files = [args.checkpoint, *args.upsampler]
    pipelines = [Pipeline.from_checkpoint(files[0], loading)]
    for file in args.upsampler:
        pipelines.append(Pipeline.from_checkpoint(file, loading.of_upsampler(), pipelines))
    stages = Stages([Stage(pipelines[0], options), *map(Stage, pipelines[1:], upsampling)])
    base = stages.check(mixes, seeds=seeds(repeat, options.seed)).base
    settings = described(asked(args), options, base, pipelines[0].model.device.type)
    if repeat is not None:
        repeat.tell_differences(settings)
    bar, order, captioned = Steps(f"{len(mixes)} pictures"), enumerate(mixes), 0
    for batch in stages.samples(mixes, seeds=base.seeds, progress=bar):
        for row, (i, mix) in zip(batch, order):
            if repeat is not None and not repeat.keeps(i):
                continue
            text = training_caption(mix, base.guidance) if args.captions else None
            keep(folder, row, mix, base, settings, args.only_last, text)
            captioned += bool(text)
        folder.write_list()
    if args.captions:
        tell_captions(folder, captioned, _seed(options, base))
        return 0
    each = args.n or 1
    grid = folder.add_grid(each if args.prompts and each > 1 else None)  # a row for each line of the file
    print(
        f"{len(folder.images)} pictures from {folder.name(0)} on and {grid.name} in {folder.path}{_seed(options, base)}"
    )
    return 0


def tell_captions(folder: "SampleFolder", captioned: int, seed: str) -> None:
    """Say which pictures are in the folder, and what in it would be read amiss."""
    without = len(folder.images) - captioned
    for name in folder.grids:
        print(f"note: {folder.path / name} was there before; who reads the folder's images takes it for a picture")
    if without:
        print(f"note: {without} pictures have no text that they are guided toward, and no caption")
    print(f"{len(folder.images)} pictures from {folder.name(0)} on and {captioned} captions in {folder.path}{seed}")


def draw_film(
    args: argparse.Namespace,
    folder: "SampleFolder",
    mixes: "list[list[Prompt]]",
    options: SamplingOptions,
    loading: ModelOptions,
) -> int:
    """Make pictures on the way from each prompt to the next, side by side and as a film."""
    from ldm_lab.sampling import Pipeline, interpolation
    from ldm_lab.sampling.recorded import Entry
    from ldm_lab.sampling.settings import caption, described, prompt_entry

    pipeline = Pipeline.from_checkpoint(args.checkpoint, loading)
    request = interpolation.check(pipeline, mixes, args.interpolate, options)
    settings = described(asked(args), options, request, pipeline.model.device.type)
    prompts = [prompt_entry(mix[0], request) for mix in mixes]
    ends = f"{caption(mixes[0][0])} ... {caption(mixes[-1][0])}"
    bar = Steps(f"{args.interpolate} pictures")
    with_seed = replace(options, seed=request.seeds[0])
    for batch in interpolation.interpolate(pipeline, mixes, args.interpolate, with_seed, bar):
        for sample in batch:
            frame = len(folder.images)
            told = Entry(seed=sample.seed, frame=frame, frames=args.interpolate)
            entry = Entry({"prompts": prompts, **told, **settings})
            folder.add([sample.image], f"{ends}, {frame}", entry)
    folder.write_list()
    strip, gif = folder.add_film()
    print(
        f"{len(folder.images)} pictures from {folder.name(0)} on, {strip.name} and {gif.name} in {folder.path}"
        f"{_seed(options, request)}"
    )
    return 0


def asked(args: argparse.Namespace) -> "Given":
    """Return what the command line asks for, as it is told in the pictures."""
    from ldm_lab.sampling.settings import Given

    words = words_of(args)
    loras, towers = words.get("lora") or (), words.get("noised_clip") or ()
    return Given(args.checkpoint, args.upsampler, list(map(str, loras)), words, list(map(str, towers)))


def _seed(options: SamplingOptions, request: "Request") -> str:
    return f" (seed {request.seeds[0]})" if options.seed == -1 else ""


class Steps:
    """A progress bar that appears with the first step: a request that is refused shows none."""

    def __init__(self, title: str) -> None:
        self.title, self.bar = title, None

    def __call__(self, done: int, total: int) -> None:
        """Show how many steps are done."""
        from ldm_lab.progress import Bar

        if self.bar is None:
            self.bar = Bar(self.title, "step", total)
        self.bar.advance(done)
        if done == total:
            self.bar.close()
