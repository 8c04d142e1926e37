"""Share a model: one folder that others sample from offline, with a model card.

    python -m ldm_lab export runs/quickstart --hub-folder shared/shapes --prompts configs/quickstart_prompts.txt
    python -m ldm_lab export runs/quickstart --hub-folder shared/shapes --license mit --overwrite
    python -m ldm_lab export runs/glide_quickstart --upsampler runs/glide_quickstart_upsampler --hub-folder shared/glide
    python -m ldm_lab export runs/quickstart --diffusers shared/shapes_diffusers
    python sample.py --checkpoint shared/shapes "a red star"

The folder holds all that sampling needs: the network, its autoencoder and conditioner, config.json, and README.md, a
model card as the Hugging Face Hub reads it. Whatever is not known, the card says is not recorded; names of folders and
users of this machine are nowhere in it. Upload it as it is; `--checkpoint hf://OWNER/NAME` samples from there.

--diffusers writes a folder that needs torch, diffusers and its own files alone, and gives the same pictures.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_lab.commands._arguments import add_imports_argument
from ldm_lab.errors import UserError

if TYPE_CHECKING:  # these import torch, which takes seconds
    from collections.abc import Sequence

    from ldm_lab.sampling.options import ModelOptions
    from ldm_lab.sharing.checks import SourceModel
    from ldm_lab.sharing.hub import Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    add = parser.add_argument
    add("checkpoint", metavar="F", help="a run's folder, ema.safetensors, or .ckpt; a released name")
    add("--hub-folder", type=Path, metavar="DIR", help="the folder to sample from by this program")
    add("--diffusers", type=Path, metavar="DIR", help="a folder for diffusers: ccld_unet, glide_unet, if_unet")
    add("--upsampler", action="append", default=[], metavar="FILE",
        help="a model that enlarges its pictures, which is shared with it; may be given again")  # fmt: skip
    add("--name", metavar="NAME", help="of the model, in its card (default: that of the folder)")
    add(
        "--license",
        metavar="ID",
        help="of your weights, as the Hub calls it, such as cc-by-4.0 (default: not recorded)",
    )
    add("--prompts", type=Path, metavar="FILE",
        help="text, a prompt a line, for the card's samples (default: the run's own; at most 16)")  # fmt: skip
    add("--evaluation", type=Path, metavar="JSON", help="results of `evaluate` about this model, for the card")
    add("--half", action="store_true", help="store the networks in float16, at half the size")
    add("--autoencoder", metavar="FILE", help="its weights, if not where the checkpoint says")
    add("--conditioner", metavar="FILE", help="its weights, if not where the checkpoint says")
    add("--overwrite", action="store_true", help="replace what an earlier export has written to DIR")


def run(args: argparse.Namespace) -> None:
    """Check all that is asked for, write the folders, and say what is in them."""
    if args.hub_folder is None and args.diffusers is None:
        raise UserError("--hub-folder DIR, --diffusers DIR, or both: where does it go?")
    for_hub = {"--half": args.half, "--name": args.name, "--prompts": args.prompts, "--evaluation": args.evaluation}
    if args.hub_folder is None and (given := [flag for flag, value in for_hub.items() if value]):
        raise UserError(f"{', '.join(given)}: of --hub-folder DIR; --diffusers has nothing of the kind")
    from ldm_lab.sampling.options import ModelOptions
    from ldm_lab.sharing.checks import check_folders, read_models
    from ldm_lab.sharing.hub import check_license, check_license_id

    check_license_id(args.license)
    loading = ModelOptions(autoencoder=args.autoencoder, conditioner=args.conditioner)
    models = read_models(args.checkpoint, args.upsampler, loading)
    check_license(args.license, models[0])
    for_diffusers = None if args.diffusers is None else args.diffusers.expanduser()
    hub_folder = None if args.hub_folder is None else args.hub_folder.expanduser()
    check_folders([out for out in (hub_folder, for_diffusers) if out is not None], models)
    if for_diffusers is not None:
        check_for_diffusers(for_diffusers, models, args.overwrite)
    prepared = None if hub_folder is None else prepare_for_hub(args, hub_folder, models, loading)
    if for_diffusers is not None:
        export_to_diffusers(for_diffusers, models, loading, args.license)
    if prepared is not None:
        export_to_hub(prepared)


def prepare_for_hub(
    args: argparse.Namespace, out: Path, models: "Sequence[SourceModel]", loading: "ModelOptions"
) -> "Prepared":
    """Check what is asked for of the folder to sample from by this program."""
    from ldm_lab.prompts import read_prompts  # these import torch, which takes seconds
    from ldm_lab.sharing.evaluation import Measured
    from ldm_lab.sharing.hub import Export, prepare

    asked = Export(
        out=out,
        name=args.name,
        license=args.license,
        prompts=None if args.prompts is None else read_prompts(args.prompts),
        evaluation=None if args.evaluation is None else Measured.read(args.evaluation.expanduser()),
        half=args.half,
        overwrite=args.overwrite,
        loading=loading,
    )
    return prepare(asked, models)


def export_to_hub(prepared: "Prepared") -> None:
    """Write the folder to sample from by this program."""
    from ldm_lab.sharing.hub import export

    shared = export(prepared)
    size = sum((shared.path / name).stat().st_size for name in shared.files)
    print(f"{shared.path}: {', '.join(shared.files)} ({size / 1e6:,.1f} MB), config.json, README.md")
    print(f'python sample.py --checkpoint {shared.path} "..." samples from it')


def check_for_diffusers(out: Path, models: "Sequence[SourceModel]", overwrite: bool) -> None:
    """Raise UserError for models that a folder of diffusers' cannot have, or a folder that must stay."""
    from ldm_lab.sharing.diffusers_folder import check, check_out

    check_out(out, overwrite)
    for model in models:
        check(model.config)


def export_to_diffusers(
    out: Path, models: "Sequence[SourceModel]", loading: "ModelOptions", license: str | None
) -> None:
    """Write the folder for diffusers."""
    from ldm_lab.sampling.options import ModelOptions
    from ldm_lab.sharing.diffusers_folder import Exported, write

    base = Exported.load(models[0], loading)
    upsamplers = [Exported.load(model, ModelOptions(), i) for i, model in enumerate(models[1:], start=1)]
    write(out, base, upsamplers, license)
    print(f'{out}: DiffusionPipeline.from_pretrained("{out}", trust_remote_code=True) loads it')
