"""Say what a file of weights is, or how a picture was made, without executing anything in it.

    python -m ldm_lab inspect runs/quickstart/ema.safetensors
    python -m ldm_lab inspect samples/00000.png
    python -m ldm_lab inspect kl-f8 --json

Models, parts and checkpoints of this program, and what others released: checkpoints of cloob-latent-diffusion, networks
of GLIDE and its noised CLIP, CompVis's autoencoders (also zipped), VAEs of diffusers (a file or a folder), CLOOB of
cloob-training and of ml-jku, CLIP of open_clip and OpenAI, LAION's heads on embeddings. Prints the number of
parameters, the step, the config, the frozen parts' checksums and the file's own. Of a picture it prints the settings
that sample.py, A1111's web UI and programs that write the same way have put into it; `sample.py --from PICTURE` makes
it once more.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import yaml

from ldm_lab.checkpoints.files import FORMAT
from ldm_lab.checkpoints.importer import DetectedFile, Section, detect_format
from ldm_lab.checkpoints.sharded import weights_checksum, weights_files
from ldm_lab.commands._arguments import add_imports_argument
from ldm_lab.errors import UserError
from ldm_lab.io.json_files import Json
from ldm_lab.sampling.recorded import SETTINGS, read_recorded, read_texts

PICTURES = ("png", "jpg", "jpeg", "webp", "gif")  # endings
NOT_PARAMETERS = ("latent_mean", "latent_std", "autoencoder_scale")  # buffers with the statistics of latents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    parser.add_argument(
        "file", metavar="FILE", help="a file of weights, a folder of diffusers', a released name, or a picture"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> None:
    """Print the report. Raises UserError if the file cannot be read, or if what it says of itself makes no sense."""
    if is_picture(args.file):
        print(picture_report(args.file, args.json))
        return
    found = detect_format(args.file)
    report, problems = describe(found)
    print(json.dumps(report, indent=2) if args.json else as_text(args.file, report))
    if problems:
        raise UserError(f"{args.file}: {problems[0]}")


def is_picture(name: str) -> bool:
    """Return whether a name is that of an image file that may hold settings."""
    path = Path(name).expanduser()
    return path.is_file() and path.suffix.lower().lstrip(".") in PICTURES


def picture_report(path: str, as_json: bool) -> str:
    """Return the settings in a picture, for people or as JSON. Raises UserError for none, or damaged ones."""
    recorded, texts = read_recorded(path), read_texts(path)
    if not recorded.is_ours:
        if as_json:
            return json.dumps({"file": Path(path).name, "parameters": texts["parameters"]}, indent=2)
        lines = [f"  {_shown(line)}" for line in texts["parameters"].splitlines()]
        return "\n".join([f"{path}: a picture with settings in A1111's notation", *lines])
    entry = json.loads(texts[SETTINGS])
    if as_json:
        return json.dumps(entry, indent=2)
    prompts = entry.pop("prompts")
    lines = [f"{path}: a picture of sample.py"]
    for prompt in prompts:
        said = _shown(str(prompt.get("text", prompt.get("image"))))
        lines.append(f"  {'prompt':<18} {said} : {prompt.get('weight')}")
    return "\n".join([*lines, *(f"  {_quoted(key):<18} {_shown(str(value))}" for key, value in entry.items())])


def describe(found: DetectedFile) -> tuple[Section, list[str]]:
    """Return the report of a file, as plain data, and what is wrong with its config."""
    file, importer = found.file, found.importer
    config, network = importer.config(file), importer.network(file)
    groups = Counter[str]()
    for name, info in file.tensors.items():
        groups[name.partition(".")[0]] += math.prod(info.shape)
    ours = file.metadata.get("format") == FORMAT
    report = {
        "kind": found.kind,
        "what": found.title,
        "file": str(found.path),
        "bytes": sum(path.stat().st_size for path in weights_files(found.path)),
        "sha256": weights_checksum(found.path),
        "parameters": sum(math.prod(info.shape) for name, info in network.items() if name not in NOT_PARAMETERS),
        "tensors": len(file.tensors or network),
        "dtypes": dict(Counter(info.dtype for info in (file.tensors or network).values())),
        "holds": dict(groups) if len(network) < len(file.tensors) else {},
        **importer.facts(file),
        "notes": list(file.notes),
        "metadata": {key: text for key, text in file.metadata.items() if not (ours and key == "config")},
        "config": config,
    }
    kept = {key: value for key, value in report.items() if value not in (None, {}, [])}
    return Section(json.loads(json.dumps(kept, default=str))), importer.problems(config)


def as_text(name: str | Path, report: Section) -> str:
    """Return a report for people. Whatever comes out of the file is quoted: it may hold codes for a terminal."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report.get("dtypes", {}).items())
    lines = [
        f"{name}: {report['what']}",
        f"  size        {report['bytes']:,} bytes",
        f"  sha256      {report['sha256']}",
        f"  parameters  {report['parameters']:,}; the file has {report['tensors']} tensors ({dtypes})",
    ]
    lines += [f"  {key:<11} {_quoted(report[key])}" for key in ("step", "epoch", "latent_std") if key in report]
    for title in ("holds", "frozen", "metadata"):
        entries = report.get(title, {}).items()
        lines += [f"  {title}"] * bool(entries)
        lines += [f"    {_quoted(k)}: {f'{v:,}' if isinstance(v, int) else _quoted(v)}" for k, v in entries]
    if report.get("config"):
        text = yaml.safe_dump(report["config"], sort_keys=False, default_flow_style=None, allow_unicode=False)
        lines += ["  config", *(f"    {line}" for line in text.rstrip().splitlines())]
    return "\n".join(lines)


def _quoted(value: Json) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() else json.dumps(text)


def _shown(text: str) -> str:
    """Return a value out of a picture: in any language, but without codes for a terminal."""
    return text if text.isprintable() else json.dumps(text)
