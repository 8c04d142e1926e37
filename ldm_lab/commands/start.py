"""From a folder of images of your own to a run: look at them, write a config that fits, say what to do next.

    python -m ldm_lab start photos
    python -m ldm_lab start photos --memory 12gb --captions use --out mine.yaml
    python -m ldm_lab start photos --offline

Says how many images lie there, how large they are, where captions are and which files are no use; then writes a YAML
with comments, made of the recipe that fits the memory at hand, and prints the commands to train, watch, sample and
share. On a terminal it asks what it is not told. Where the released weights are not on this machine and cannot be
downloaded, it first trains a small autoencoder on the images; interrupted, the same command goes on.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import whole_number
from ldm_lab.errors import UserError

if TYPE_CHECKING:
    from ldm_lab.own_images.choosing import Machine, Names, Recipe
    from ldm_lab.own_images.looking import FolderFacts
    from ldm_lab.own_images.weights import ReleasedWeights

ENOUGH = 23.0  # dB, of the small autoencoder, best on images that it has not seen
CAPTIONS = ("use", "ignore")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="of images, in any depth; or of tar shards")
    add("--memory", metavar="SIZE", help="of the GPU to train on, such as 8gb; cpu for none (default: this machine's)")
    add("--captions", choices=CAPTIONS, help="train on captions or not (default: use them beside a released CLIP)")
    add("--out", type=Path, metavar="YAML", help="where the config goes (default: here, under the folder's name)")
    add("--overwrite", action="store_true", help="replace a config that is there")
    add("--offline", action="store_true", help="do without released weights that would have to be downloaded")
    add("--write-only", action="store_true", help="write the configs alone; train no autoencoder now")
    add("--steps", type=whole_number(1), metavar="N", help="of the small autoencoder's training, optimizer steps")


def run(args: argparse.Namespace) -> int:
    """Look, choose, write, and train the small autoencoder if there has to be one. Returns the exit code."""
    from ldm_lab.data.samples import as_utf8
    from ldm_lab.own_images.belonging import check_cache, check_run
    from ldm_lab.own_images.looking import look  # not before: torch takes seconds, and --help needs none
    from ldm_lab.own_images.weights import released_weights
    from ldm_lab.own_images.writing import (
        config_text,
        fitted,
        loaded,
        names_of,
        refuse_other_encodings,
        refuse_overwriting,
        summary,
        write,
    )

    refuse_other_encodings(args.folder)
    names = names_of(args.folder, args.out)
    if not args.overwrite:
        refuse_overwriting(names.config)
    facts = look(args.folder)
    print(as_utf8("\n".join(facts.in_words())))
    check_run(facts, names)
    machine = machine_for(args.memory)
    print(f"to be trained on: {machine.in_words()}")
    weights = released_weights(args.offline)
    recipe = recipe_for(facts, machine, names, weights, args.captions)
    fit = fitted(recipe, machine)
    if fit.said:
        print(f"{machine.in_words()}: {fit.said}")
    check_cache(loaded(recipe.body))
    if args.steps is not None and not recipe.road.has_own_autoencoder:
        print("--steps: without effect: no small autoencoder is trained; trainer.max_steps in the config is the run's")
    if recipe.road.has_own_autoencoder and (code := make_autoencoder(facts, names, args)):
        return code
    write(names.config, config_text(fit, facts, names, machine))
    print(f"{names.config}: written, after configs/{recipe.origin}.yaml: {summary(fit.cost, recipe, facts)}")
    print(as_utf8("\n".join(next_steps(recipe, facts, names, trains_autoencoder=args.write_only))))
    return 0


def asks() -> bool:
    """Return whether somebody is there who can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def answer_to(question: str) -> str:
    """Return what is typed behind a question; "" for the default, also where the input ends (Ctrl-D)."""
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""


def machine_for(memory: str | None) -> "Machine":
    """Return what is trained on: as said, as answered, or this machine's own device. Raises UserError."""
    from ldm_lab.own_images.choosing import machine_at_hand, machine_of

    if memory is not None:
        return machine_of(memory)
    here = machine_at_hand()
    if not asks():
        return here
    answer = answer_to(f"Train on {here.in_words()}? Enter, or another GPU's memory, such as 12gb: ")
    return machine_of(answer) if answer and answer.lower() not in ("y", "yes") else here


def recipe_for(
    facts: "FolderFacts", machine: "Machine", names: "Names", weights: "ReleasedWeights", captions: str | None
) -> "Recipe":
    """Return the recipe, and say what it rests on. Raises UserError for captions that are asked for and not there."""
    from ldm_lab.own_images.choosing import captions_alone, released, small

    count = facts.captions.images
    if captions == "use" and not count:
        raise UserError(f"--captions use: none of the {facts.images:,} images has a caption that is found")
    if weights.are_to_be_had:
        if weights.missing:
            print(f"released weights, downloaded at the first start: {weights.in_words()}")
        use = bool(count) and captions != "ignore"
        print(f"captions: {'trained on' if use else 'not needed'}; prompts are texts or images")
        return released(facts, machine, names, use)
    print(f"no released weights: {weights.why_not}. Left out: {weights.in_words()}")
    if count and captions is None and asks():
        question = "have captions. Train a small GLIDE on them, prompted with text? [y/N] "
        answer = answer_to(f"{count:,} of {facts.images:,} images {question}")
        captions = "use" if answer.lower() in ("y", "yes") else "ignore"
    if captions == "use":
        print("captions: a small GLIDE of 32 px, from captions alone; prompts are texts like them")
        return captions_alone(facts, machine, names)
    print("instead: a small autoencoder of your images, and the CLOOB that comes along, which knows drawn shapes and")
    print("their colors, and no photographs: only image prompts (--images photo.jpg) mean something to this model.")
    if count:
        print(f"For text prompts train on the captions of your {count:,} images: --captions use makes a small GLIDE.")
    return small(facts, names)


def make_autoencoder(facts: "FolderFacts", names: "Names", args: argparse.Namespace) -> int:
    """Write the small autoencoder's config, train it unless that is for later, measure it. Returns the exit code."""
    from ldm_lab.own_images.autoencoder import (
        STEPS,
        autoencoder_text,
        measured_psnr,
        measures_unseen,
        train,
        write_lists,
    )
    from ldm_lab.own_images.belonging import check_autoencoder_run, write_checksum
    from ldm_lab.own_images.writing import refuse_overwriting, write

    path, steps = names.autoencoder_config, args.steps or STEPS
    text = autoencoder_text(facts, names, steps)
    if not args.overwrite and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        refuse_overwriting(path)
    check_autoencoder_run(facts, names)
    if not facts.shards:
        write_lists(facts, names)
    write_checksum(facts, names)
    write(path, text)
    print(f"{path}: written")
    if args.write_only:
        return 0
    print(f"training the autoencoder for {steps:,} steps; Ctrl-C saves, and the same command goes on")
    if code := train(path):
        return code
    reached, count = measured_psnr(Path(names.autoencoder_file), facts)
    verdict = "" if reached >= ENOUGH else f"; {ENOUGH:g} dB are good, --steps {2 * steps} --overwrite trains longer"
    which = "that it was not trained on" if measures_unseen(facts) else "that it was trained on; no others are there"
    print(f"{names.autoencoder_file}: {reached:.1f} dB PSNR on {count:,} images {which}{verdict}")
    return 0


def next_steps(recipe: "Recipe", facts: "FolderFacts", names: "Names", trains_autoencoder: bool) -> list[str]:
    """Return the commands that come next, a line each."""
    from ldm_lab.own_images.choosing import Road

    program, config, folder = "python -m ldm_lab", shlex.quote(str(names.config)), f"runs/{names.run}"
    steps = []
    if recipe.road is Road.SMALL and trains_autoencoder:
        steps.append(("first", f"{program} train --config {shlex.quote(str(names.autoencoder_config))}"))
    example = shlex.quote(str(facts.path / facts.names[0])) if facts.names else "photo.jpg"
    prompt = f"--images {example}" if recipe.road is Road.SMALL else '"a prompt"'
    steps += [
        ("try it out", f"{program} train --config {config} --check"),
        ("train", f"{program} train --config {config}"),
        ("go on", f"{program} train --config {config} resume.checkpoint=last"),
        ("watch", f"{folder}/index.html, in a browser, and all runs: {program} runs"),
        ("sample", f"{program} sample --checkpoint {folder} {prompt} -n 4 --out samples/{names.run}"),
        ("play", f"{program} app --checkpoint {folder}"),
        ("share", f"{program} export {folder} --hub-folder shared/{names.run}"),
    ]
    return ["", *(f"{what:<12}{command}" for what, command in steps)]
