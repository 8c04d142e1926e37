"""Flags of `evaluate` that would change nothing: whether one has an effect follows from what the metrics need."""

import argparse
import sys
from typing import Literal

from ldm_lab.config.registry import part_info
from ldm_lab.errors import UserError
from ldm_lab.sampling import flat

# What a measurement may need: a flag has no effect where what it belongs to is not needed.
Need = Literal[
    "made pictures", "pictures", "real images", "real features", "embeddings", "inception", "margins",
    "denoiser", "autoencoder", "conditioner", "model",
]  # fmt: skip
# Those that are not here are of sampling, and belong to made pictures.
FLAGS: dict[str, Need] = {
    "images": "pictures", "data": "real images", "features": "real features", "limit": "real images",
    "prompts": "made pictures", "pictures": "made pictures", "seeds": "made pictures", "bootstrap": "margins",
    "clip": "embeddings", "inception": "inception", "autoencoder": "autoencoder", "conditioner": "conditioner",
    "compile": "denoiser", "lora": "denoiser", "offload": "model",
}  # fmt: skip
OF_PASSES = ("batch_size",)  # an option of sampling, too


def check_effects(args: argparse.Namespace) -> None:
    """Look at flags on the command line that would change nothing.

    A number of draws for margins that are not made is only said: scripts give the same one to all that they measure.

    Raises:
        UserError: any other flag without effect, with the reason; what was wanted is not what would be measured.
    """
    words = dict(args._get_kwargs())
    options = [*flat.base_names(), *part_info("model_options", None).options]
    owners: dict[str, Need] = {**FLAGS, **{name: "made pictures" for name in options if name not in FLAGS}}
    needed, idle = needs(args), dict[str, list[str]]()
    for name, need in owners.items():
        if words.get(name) not in (None, []) and name not in OF_PASSES and need not in needed:
            idle.setdefault(reason(need, args), []).append(f"--{name.replace('_', '-')}")
    of_margins = reason("margins", args)
    if idle.pop(of_margins, None):
        print(f"note: --bootstrap: {of_margins}", file=sys.stderr)
    if idle:
        raise UserError("; ".join(f"{', '.join(flags)}: {why}" for why, flags in idle.items()))
    if args.limit is not None and not args.data:
        raise UserError("--limit: belongs to --data, which is not given")


def needs(args: argparse.Namespace) -> frozenset[Need]:
    """Return what the metrics of a command line need."""
    from ldm_lab.metrics import METRICS, WHOLE_MODEL, of_kind

    metrics = {name: METRICS[name] for name in args.metric}
    of_pictures, of_parts = of_kind(metrics, "pictures", "captions"), of_kind(metrics, "data")
    makes = bool(of_pictures and args.checkpoint)
    compares = any(its.kind != "captions" and its.space is not None for its in metrics.values())
    spaces = {its.space for its in metrics.values()}
    parts = {part for its in metrics.values() for part in its.parts} | ({*WHOLE_MODEL} if makes else set())
    is_judge = "embedding" in spaces and bool(args.checkpoint) and not args.clip
    of_captions = makes and not args.prompts
    again = bool(args.images) or (makes and len(args.seeds or [0]) == 1)  # pictures are drawn again
    found: dict[Need, bool] = {
        "pictures": bool(of_pictures),
        "made pictures": makes,
        "real features": compares or of_captions,
        "real images": compares or bool(of_parts) or of_captions,
        "embeddings": "embedding" in spaces,
        "inception": "inception" in spaces,
        "margins": bool(of_pictures and again) or any(metrics[name].is_mean for name in of_parts),
        "denoiser": "denoiser" in parts,
        "autoencoder": "autoencoder" in parts,
        "conditioner": "conditioner" in parts or is_judge,
        "model": bool(args.checkpoint),
    }
    return frozenset(need for need, is_needed in found.items() if is_needed)


def reason(need: Need, args: argparse.Namespace) -> str:
    """Return in words why a flag has no effect, as something is not needed."""
    by = " ".join(f"--metric {name}" for name in args.metric)
    if not args.checkpoint and need in ("made pictures", "denoiser", "autoencoder", "conditioner", "model"):
        return "without effect, as no model is measured: --checkpoint names none"
    by_these = f"{by} with --prompts" if args.prompts else by
    reasons: dict[Need, str] = {
        "made pictures": f"without effect, as no pictures are made for {by}",
        "pictures": f"pictures are not looked at by {by}",
        "real images": f"real images are not looked at by {by_these}",
        "real features": f"without effect, as nothing is compared with real images by {by_these}",
        "embeddings": f"without effect, as no embeddings are compared by {by}",
        "inception": "belongs to --metric fid, kid or rfid",
        "margins": "without effect, as "
        + ("margins are over seeds" if len(args.seeds or [0]) > 1 else f"{by} has no margin"),
    }
    return reasons.get(need, f"without effect, as the {need} is not looked at by {by}")
