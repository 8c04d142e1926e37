"""The loader against webdataset with torchvision's transforms, and against itself with everything done by Pillow.

    python benchmarks/loader.py

Shards of JPEGs are drawn into a temporary folder: photographs would not differ in what they cost. Both sides of a pair
read the same shards, shuffled, in the same number of loader processes, and give the same float batches in [-1, 1]. They
run in turn, several times, and the median of the pairs' ratios counts, by the clock and by the processor time of all
processes: where other programs run besides, the latter says more.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # to run from a checkout that is not installed

from ldm_lab.config import build  # noqa: E402
from ldm_lab.data.datamodule import DataModule  # noqa: E402
from ldm_lab.data.tar import read_shard, write_shard  # noqa: E402
from ldm_lab.io.squares import read_square  # noqa: E402

BUFFER = 200  # undecoded samples of the shuffle buffer, on both sides
SHARDS = 4
SMALL, LARGE = (340, 256), (1152, 864)  # as img2dataset's keep_ratio stores them at 256 pixels; a megapixel

Batches = Callable[[list[str], int, argparse.Namespace], Iterator[Tensor]]  # shards, pixels -> [B, 3, S, S] each


class Case(NamedTuple):
    """A pair that is compared: sources of a size, the square's side, the other side of the pair, the ratio demanded."""

    name: str
    source: tuple[int, int]
    size: int
    other: str
    least: float | None


CASES = (
    Case("64 px", SMALL, 64, "webdataset, Pillow", 2.2),
    Case("256 px", SMALL, 256, "webdataset, Pillow", 1.5),
    Case("1 megapixel", LARGE, 256, "resize: exact", 3.0),
    Case("1 megapixel", LARGE, 256, "webdataset, Pillow", None),
    Case("64 px", SMALL, 64, "webdataset, tensors", None),
    Case("256 px", SMALL, 256, "webdataset, tensors", None),
    Case("1 megapixel", LARGE, 256, "webdataset, tensors", None),
)


def photo(number: int, width: int, height: int) -> bytes:
    """Return a JPEG of soft colors with grain, lying or standing, about as large as photographs of its size."""
    random = np.random.RandomState(number)
    if number % 3 == 0:
        width, height = height, width
    coarse = random.randint(0, 256, (height // 32 + 2, width // 32 + 2, 3)).astype(np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    grain = random.randint(-8, 9, (height, width, 1))
    stream = io.BytesIO()
    Image.fromarray((soft + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def draw(folder: Path, source: tuple[int, int], images: int) -> list[str]:
    """Return the paths of shards of JPEGs, written to a folder."""
    paths = [folder / f"{source[0]}_{shard:05d}.tar" for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        numbers = range(shard * images // SHARDS, (shard + 1) * images // SHARDS)
        write_shard(path, ((f"{n:09d}", {"jpg": photo(n, *source), "txt": b"a photograph"}) for n in numbers))
    return [str(path) for path in paths]


def ours(road: str) -> Batches:
    """Return what makes the batches of `data.name: webdataset` by a road."""

    def batches(shards: list[str], size: int, args: argparse.Namespace) -> Iterator[Tensor]:
        section = {"name": "webdataset", "shards": shards, "image_size": size, "resize": road, "workers": args.workers}
        section |= {"batch_size": args.batch, "shuffle_buffer": BUFFER}
        data = DataModule(build("data", section), seed=0)
        with contextlib.redirect_stdout(io.StringIO()):  # what was found
            data.setup()
        for batch in data.train_dataloader():
            data.consumed(batch)
            yield batch.require_image("compare")

    return batches


def theirs(tensors: bool) -> Batches:
    """Return what makes the batches of webdataset: Pillow's images, or torchvision's own decoder and tensors."""

    def batches(shards: list[str], size: int, args: argparse.Namespace) -> Iterator[Tensor]:
        import webdataset as wds
        from torchvision.transforms import v2

        lanczos = v2.InterpolationMode.LANCZOS
        first = [] if tensors else [v2.PILToTensor()]
        prepare = v2.Compose(
            [v2.Resize(size, lanczos), v2.CenterCrop(size), *first, v2.ToDtype(torch.float32, scale=True)]
            + [v2.Normalize([0.5] * 3, [0.5] * 3)]
        )
        read = wds.WebDataset(shards, shardshuffle=SHARDS, seed=0).repeat().shuffle(BUFFER)
        decoded = read.decode(wds.handle_extension("jpg", _decoded)) if tensors else read.decode("pil")
        data = decoded.to_tuple("jpg", "txt").map_tuple(prepare, str).batched(args.batch)
        for image, _ in wds.WebLoader(data, batch_size=None, num_workers=args.workers):
            yield image

    return batches


def _decoded(data: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)  # [3, H, W]


SIDES: dict[str, Batches] = {
    "ldm_lab": ours("fast"),
    "resize: exact": ours("exact"),
    "webdataset, Pillow": theirs(tensors=False),
    "webdataset, tensors": theirs(tensors=True),
}


class Cost(NamedTuple):
    """What an image costs, in milliseconds: by the clock, and of all processes' processor time."""

    clock: float
    processor: float


def cost(batches: Iterator[Tensor], size: int, args: argparse.Namespace) -> Cost:
    """Return what an image costs, once the loader processes are at work."""
    for _ in range(args.workers * 2 + 2):  # what was prepared while the processes started
        image = next(batches)
        assert image.shape == (args.batch, 3, size, size) and image.dtype == torch.float32
    began, used = time.perf_counter(), processor_time()
    for _ in range(args.batches):
        next(batches)
    spent = Cost(time.perf_counter() - began, processor_time() - used)
    return Cost(*(1000 * seconds / (args.batches * args.batch) for seconds in spent))


def processor_time() -> float:
    """Return the seconds of processor time of this process and of those that it has started and that still run."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # another system than Linux
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def largest_difference(shards: list[str], size: int) -> int:
    """Return by how many levels the two roads differ at most."""
    largest = 0
    for sample in (sample for path in shards for sample in read_shard(path)):
        fast, exact = (read_square(sample.image, size, road=road).int() for road in ("fast", "exact"))  # [3, S, S] each
        largest = max(largest, int((fast - exact).abs().max()))
    return largest


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--images", type=int, default=800, help="in the shards of each size")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=24, help="that are measured")
    parser.add_argument("--workers", type=int, default=1, help="loader processes, on both sides")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--all", action="store_true", help="also what no ratio is demanded of")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {args.workers} loader processes, load average {load:.1f} on {os.cpu_count()} cores"
    )
    print(f"{'':12} {'against':20} {'ms':>6} {'ms':>6} {'ratio':>6}   {'cpu ms':>6} {'cpu ms':>6} {'ratio':>6}  levels")
    with tempfile.TemporaryDirectory() as folder:
        shards = {source: draw(Path(folder), source, args.images) for source in (SMALL, LARGE)}
        for case in CASES:
            if case.least is None and not args.all:
                continue
            pairs = []
            for _ in range(args.pairs):
                sides = ("ldm_lab", case.other)
                pairs.append(
                    [cost(SIDES[side](shards[case.source], case.size, args), case.size, args) for side in sides]
                )
            numbers = []
            for measured in range(len(Cost._fields)):
                one, other = ([pair[side][measured] for pair in pairs] for side in range(2))
                ratio = statistics.median(b / a for a, b in zip(one, other))
                numbers.append(f"{statistics.median(one):6.2f} {statistics.median(other):6.2f} {ratio:6.2f}")
            levels = largest_difference(shards[case.source], case.size)
            least = f"; at least {case.least:g}" if case.least else ""
            print(f"{case.name:12} {case.other:20} {'   '.join(numbers)}  {levels}{least}", flush=True)


if __name__ == "__main__":
    main()
