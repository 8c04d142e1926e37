"""Draw captioned shapes and serve them over HTTP: the recipes of docs/recipes.md in small, without the internet.

    python examples/serve_shapes.py        # leave it running; Ctrl-C ends it

Writes what the recipes begin with, in the layout of the real files: `cc12m/cc12m.tsv`, lines of url and caption without
a header, and `laion/laion2B-en-aesthetic/*.parquet`. The urls are of this server. As in the real files some are dead,
some lead to no image, some come twice, and some captions begin with a quotation mark. In the place of an aesthetic
score stands how warm the shape's color is, from 2 (black) to 9 (red), with some noise.
"""

import argparse
import io
import random
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a checkout that is not installed

from ldm_lab.curation.store.format import hashes_of
from ldm_lab.data.shapes import Attributes, draw, random_caption
from ldm_lab.errors import UserError, run_program
from ldm_lab.io.atomic import atomic_write

SIZE = 96  # pixels
DEAD = 20  # one of so many urls answers 404
WRONG = 50  # one of so many answers with a web page
TWICE = 25  # one of so many comes a second time
WARMTH = {"black": 2, "blue": 3, "green": 4, "cyan": 5, "white": 6, "yellow": 7, "magenta": 8, "red": 9}


def picture(number: int) -> tuple[bytes, Attributes]:
    """Return the picture behind /NUMBER.jpg, as JPEG, and what it shows."""
    image, attributes = draw(f"serve {number}", SIZE, variety=0.5)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95)
    return stream.getvalue(), attributes


class Handler(BaseHTTPRequestHandler):
    """Answers with pictures, drawn when they are asked for."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/").removesuffix(".jpg")
        number = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else 0
        if number % DEAD == 0:
            self.send_error(404)
            return
        kind, body = "image/jpeg", picture(number)[0]
        if number % WRONG == 1:
            kind, body = "text/html", b"<html><body>This picture has moved.</body></html>"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def write_lists(folder: Path, address: str, count: int) -> list[Path]:
    """Write the lists of the first `count` pictures; return their paths."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    shown = [picture(number)[1] for number in range(1, count + 1)]
    urls = [f"{address}/{number}.jpg" for number in range(1, count + 1)]
    texts = [random_caption(attributes, rng) for attributes in shown]
    texts = [f'"{text[0].upper()}{text[1:]}", as it says' if n % 10 == 0 else text for n, text in enumerate(texts)]
    scores = np.array([WARMTH[attributes.color] for attributes in shown]) + noise.normal(0, 0.3, count)
    order = [*range(count), *range(0, count, TWICE)]
    rng.shuffle(order)

    tsv = folder / "cc12m" / "cc12m.tsv"
    with atomic_write(tsv) as file:
        file.write("".join(f"{urls[n]}\t{texts[n]}\n" for n in order).encode())
    table = pa.table(
        {
            "URL": urls,
            "TEXT": texts,
            "WIDTH": pa.array([SIZE] * count, pa.int32()),
            "HEIGHT": pa.array([SIZE] * count, pa.int32()),
            "similarity": noise.uniform(0.28, 0.4, count),
            "hash": hashes_of(urls, texts),
            "punsafe": noise.beta(1, 12, count).astype(np.float32),
            "pwatermark": noise.beta(1, 4, count).astype(np.float32),
            "aesthetic": scores.astype(np.float32),
        }
    )
    parquet = folder / "laion" / "laion2B-en-aesthetic" / "part-00000.parquet"
    with atomic_write(parquet) as file:
        pq.write_table(table.take(order), file)
    return [tsv, parquet]


def main() -> None:
    """Parse the command line, write the lists, serve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", default="data", metavar="DIR", help="where the lists go (%(default)s)")
    add("--count", type=int, default=4000, metavar="N", help="pictures (%(default)s)")
    add("--port", type=int, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count: at least 1 is needed, not {args.count}")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as error:
        raise UserError(f"--port {args.port}: {error.strerror}; --port 0 takes a free one") from None
    with server:
        address = f"http://127.0.0.1:{server.server_port}"
        for path in write_lists(Path(args.out).expanduser(), address, args.count):
            print(path)
        print(f"serving {args.count:,} pictures at {address}; Ctrl-C ends it", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_program(main)
