"""Names of other programs' options and samplers, and what they are called here. For messages alone."""

import re
from collections.abc import Iterable

# Flags as diffusers, the CompVis and Stability programs, ComfyUI, A1111, InvokeAI and GLIDE's write them.
FLAGS = {
    **dict.fromkeys(
        ["cfg", "cfg-scale", "scale", "guidance-scale", "unconditional-guidance-scale", "cond-scale"],
        "--guidance",
    ),
    **dict.fromkeys(["negative-prompt", "neg-prompt", "neg", "uncond"], "--negative"),
    **dict.fromkeys(["cfg-rescale", "rescale-cfg"], "--guidance-rescale"),
    **dict.fromkeys(
        ["width", "height", "w", "h", "image-size", "resolution", "res"],
        "--size, as in --size 384x256 (width x height)",
    ),
    **dict.fromkeys(
        [
            "num-images",
            "num-images-per-prompt",
            "n-samples",
            "n-iter",
            "num-samples",
            "samples",
            "batch-count",
            "count",
        ],
        "-n",
    ),
    **dict.fromkeys(["denoising-strength", "denoise", "image-strength", "init-strength"], "--strength"),
    **dict.fromkeys(["ckpt", "ckpt-path", "model", "model-path", "model-id", "weights", "load"], "--checkpoint"),
    **dict.fromkeys(["num-inference-steps", "sampling-steps", "ddim-steps", "timestep-respacing"], "--steps"),
    **dict.fromkeys(["scheduler", "sampling-method", "sample-method", "sampler-name"], "--sampler"),
    "karras": "--spacing karras",
    "ddim-eta": "--eta",
    **dict.fromkeys(["outdir", "out-dir", "output", "output-dir", "outpath", "save-path"], "--out"),
    **dict.fromkeys(
        ["init-img", "init", "input-image", "img"], "--init-image to begin with an image, --images for one as a prompt"
    ),
    "image": "--images for an image as a prompt, --init-image to begin with one",
    **dict.fromkeys(["mask-image", "mask-img"], "--mask"),
    **dict.fromkeys(["mask-invert", "inpainting-mask-invert", "invert"], "--invert-mask"),
    **dict.fromkeys(["mask-blur-factor", "blur", "feather"], "--mask-blur"),
    **dict.fromkeys(["resize-mode", "init-image-resize"], "--resize crop, pad or stretch"),
    **dict.fromkeys(["from-file", "prompt-file", "prompts-file", "caption-file"], "--prompts"),
    **dict.fromkeys(["prompt", "text", "caption"], 'no flag at all: sample.py --checkpoint FILE "a red star"'),
    **dict.fromkeys(["vae", "vae-path", "first-stage"], "--autoencoder"),
    **dict.fromkeys(["text-encoder", "clip-path", "clip-model"], "--conditioner"),
    **dict.fromkeys(["lowvram", "medvram", "low-memory", "cpu-offload", "sequential-offload"], "--offload"),
    **dict.fromkeys(["fp16", "half"], "--precision 16-mixed"),
    "bf16": "--precision bf16-mixed",
    "dtype": "--precision",
    **dict.fromkeys(["bs", "batch"], "--batch-size"),
    **dict.fromkeys(["upscaler", "upscale", "sr-model", "super-resolution"], "--upsampler"),
    **dict.fromkeys(["upsample-temp", "upsample-temperature"], "--upsampler-temperature"),
    **dict.fromkeys(["tiled-vae", "vae-tiling", "tiling"], "--tile"),
    **dict.fromkeys(["autoguidance", "gnet", "bad-model"], "--guide-model"),
    **dict.fromkeys(["clamp", "static-thresholding", "clip-sample"], "--clip-denoised"),
    "no-clamp": "--no-clip-denoised",
    **dict.fromkeys(["clip-guidance-scale", "clip-scale"], "--clip-guidance"),
    **dict.fromkeys(["best-of", "candidates"], "--rerank"),
    **dict.fromkeys(["gpu", "cuda"], "--device cuda"),
    "cpu": "--device cpu",
}

ANCESTRAL = "--sampler ddpm, the ancestral one, or --sampler euler --churn 1"
# Letters and digits of a sampler's name, with "pp" for "++" and without a leading "k" or "sample" -> ours.
SAMPLERS = {
    **dict.fromkeys(["euler", "eulerdiscrete"], "--sampler euler"),
    **dict.fromkeys(["eulera", "eulerancestral", "eulerancestraldiscrete", "dpm2a", "dpm2ancestral"], ANCESTRAL),
    **dict.fromkeys(["heun", "heundiscrete", "dpm2"], "--sampler heun"),
    **dict.fromkeys(["dpmpp2m", "dpmsolverpp", "dpmsolver", "dpmsolvermultistep", "dpmpp"], "--sampler dpmpp_2m"),
    **dict.fromkeys(["dpmpp2msde", "dpmpp3msde", "dpmppsde", "dpmpp2sa", "dpmpp2sancestral"], "--sampler dpmpp_2m_sde"),
    **dict.fromkeys(["unipc", "unipcmultistep"], "--sampler unipc"),
    **dict.fromkeys(["lms", "lmsdiscrete"], "--sampler iplms"),
    **dict.fromkeys(["pndm", "plms"], "--sampler plms"),
    "ddim": "--sampler ddim",
    "ddpm": "--sampler ddpm",
    **dict.fromkeys(["p", "psample", "ancestral"], "--sampler ddpm"),
}
WITH_SPACING = {f"--sampler {name}" for name in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc")}
# What other programs read in a prompt and this one does not: a pattern -> what it is meant to do there.
SYNTAX = {
    r"\([^()]*:\s*\d*\.?\d+\s*\)": "a weight inside a prompt",
    r"\([^()]*\)(?:\d*\.\d+|\d+|\++|-+)(?!\w)": "a weight inside a prompt",
    r"\(\(.*?\)\)": "stress",
    r"\{\{.*?\}\}": "stress",
    r"\[[^\[\]]*:[^\[\]]*:?\s*\d*\.?\d+\s*\]": "a prompt that changes on the way",
    r"\[[^\[\]]*\|[^\[\]]*\]": "prompts in turn",
    r"\[+[^\[\]:|]+\]+": "less stress",
    r"<(?:lora|lyco|hypernet|ti|embedding)\s*:[^<>]*>": "an addition to the model",
    r"\bembedding:[\w.-]+": "a learned word",
    r"__[\w/*-]+__": "a word from a list",
    r"\{[^{}]*(?:\||\$\$)[^{}]*\}": "one of several words",
    r"\bBREAK\b": "a new part of a prompt",
    r"\bAND\b": "several prompts in one",
    r"(?<=\w\w)(?:\+\+|--)(?=[\s,.]|$)": "a weight inside a prompt",
    r"(?<!\S)--(?:ar|v|no|s|q|c|iw|niji|seed|style|stylize|chaos|quality|stop|tile|weird|sref|cref"
    r"|prompt|negative_prompt|steps|cfg_scale|sampler_name|width|height|batch_size|n_iter)\b.*": "options",
    r"\w\s*::\s*-?\d*\.?\d*(?=\s|$)": "weights of parts",
}
MORE_LETTERS = {"BREAK", "AND"}  # words in a text of capitals alone
SHOWN = 60  # characters of what is quoted
LOOKED_AT = 2000  # characters of a prompt: the patterns take the square of that


def our_flag(flag: str) -> str | None:
    """Return what the flag of another program is called here, in words; None for one that is not known."""
    ours = FLAGS.get(flag.lstrip("-").lower().replace("_", "-"))
    return None if ours is None else f"{flag}: here it is {ours}"


def our_sampler(name: str) -> str | None:
    """Return what another program's sampler is called here, in words; None for one that is not known."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))
    letters = re.sub(r"^(k|sample)(?=[a-z])|scheduler$", "", letters)
    letters = re.sub("(exponential|sgmuniform)$", "", letters)
    spaced, karras = re.subn("karras$", "", letters)
    if spaced not in SAMPLERS:
        return None
    spacing = " --spacing karras" if karras and SAMPLERS[spaced] in WITH_SPACING else ""
    return f"--sampler {name!r}: here it is {SAMPLERS[spaced]}{spacing}"


def syntax_hints(texts: Iterable[str]) -> list[str]:
    """Return lines about what other programs read in a prompt and this one takes as words: one of each kind."""
    hints: dict[str, str] = {}
    for text in texts:
        for pattern, meaning in SYNTAX.items():
            match = None if meaning in hints else re.search(pattern, text[:LOOKED_AT])
            if match is None or (match[0] in MORE_LETTERS and text.isupper()):
                continue
            found = match[0].strip()
            shown = found if len(found) <= SHOWN else found[:SHOWN] + "..."
            hints[meaning] = f"prompt: {shown} ({meaning}, in other programs) is taken as plain words{_our_way(found)}"
    return list(hints.values())


def _our_way(found: str) -> str:
    """Return how what was found is written here."""
    weighted = re.fullmatch(r"\(([^()]+):\s*([\d.]+)\s*\)", found)
    if weighted:
        return f"; here a whole prompt has a weight: {f'{weighted[1].strip()}:{weighted[2]}'!r}"
    if found.startswith(("<", "embedding", "__", "{", "--")) and not found.startswith("{{"):
        return ""
    return "; here several prompts are given, each perhaps with a weight: 'a red car:3' 'rain:1.5'"
