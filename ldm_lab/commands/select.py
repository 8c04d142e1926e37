"""Select rows of metadata by rules, for img2dataset to download: LAION's releases, img2dataset's own tables, TSV.

    python -m ldm_lab select --config configs/select/laion_aesthetic.yaml input='laion2B-en-aesthetic/*.parquet' out=art
    python -m ldm_lab select --config configs/select/laionide_v2.yaml input=laion400m-meta rules.slurs.file=slurs.txt \\
        out=subset
    python -m ldm_lab select --config configs/select/laion_art.yaml input=... out=... engine.name=spark

Writes Parquet files with the columns URL and TEXT, which img2dataset takes as they are, and _report.json: how many rows
broke which rule. The printed table says the same: rows that break a rule, those that break it alone, those that it
removed from what the rules above it left. Tables may be larger than memory: engine.memory_limit=4GB.
"""

import argparse
import json
import re
import shlex

from ldm_lab.commands._arguments import add_imports_argument
from ldm_lab.config import build, read
from ldm_lab.errors import UserError
from ldm_lab.rules.names import ASK, Names

RESERVED = {"url", "caption", "text", "sha256", "md5", "sha512"}  # img2dataset's own in any case, or taken otherwise
OWN = {"key", "status", "error_message", "exif", "width", "height", "original_width", "original_height"}

CAPTIONS = ("text", "caption")
DOWNLOADED = ("url", "caption")  # what img2dataset writes under names of its own
NO_URL = "it has no column URL, so there is nothing to download"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_imports_argument(parser)
    parser.add_argument("--config", required=True, metavar="YAML", help="such as configs/select/laion_aesthetic.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the YAML's")


def run(args: argparse.Namespace) -> None:
    """Select; print the report and what to do next."""
    try:
        selection = build("selection", read(args.config, args.overrides))
    except UserError as error:
        raise UserError(re.sub(r"(?m)^(\s*)selection\.", r"\1", str(error))) from None
    report = selection.run()
    print(report)
    command = img2dataset(str(selection.out), report.output)
    print(f"written to {selection.out}; " + (f"to download it:\n  {command}" if command else NO_URL))
    names = [
        (quantity, name)
        for quantity, name in selection.names.given
        if name in report.output and quantity not in DOWNLOADED
    ]
    if command and names:
        words = " ".join(Names(ask=f"data.{ASK}").answer(quantity, name) for quantity, name in names)
        print(f"for the same rules in training, by the same columns:\n  {words}")


def img2dataset(folder: str, columns: list[str]) -> str | None:
    """Return the command that downloads a selection; None for one without addresses."""
    additional = [name for name in columns if name.lower() not in RESERVED and name not in OWN]
    url, caption = (next((one for one in columns if one.lower() in names), None) for names in (("url",), CAPTIONS))
    if url is None:
        return None
    command = ["img2dataset", "--url_list", folder, "--input_format", "parquet", "--url_col", url]
    command += ["--caption_col", caption] if caption else []
    command += ["--output_format", "webdataset", "--output_folder", f"{folder}_images", "--image_size", "256"]
    command += ["--resize_mode", "keep_ratio", "--save_additional_columns", json.dumps(additional)]
    return shlex.join(command)
