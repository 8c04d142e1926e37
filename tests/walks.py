"""How each command in README and docs is run: as it stands, or shortened, or why it is not.

    python tests/walks.py        the whole table

`tests/test_walks.py` runs them so, page by page, in a folder with stand-ins (`tests/small_world.py`): recipes have
small networks and 2 steps, shards and folders of images a dozen drawn ones, released weights are random ones.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from documented import PAGES, Command, commands

PORT = 7860
SHORT = (
    "trainer.max_steps=2 trainer.threads=1 data.workers=0 data.batch_size=2 checkpoint.every=2 "
    "optim.warmup_steps=1 logging.every=1"
)
# Released names, and what stands for them.
RELEASED = {
    "hf://DeepFloyd/IF-II-M-v1.0/unet/": "released/if_ii",
    "hf://DeepFloyd/IF-I-M-v1.0/unet/": "released/if_i",
    "hf://stabilityai/sd-vae-ft-mse": "released/autoencoder.safetensors",
    "hf://OWNER/NAME/upsampler_1.safetensors": "released/shared/upsampler_1.safetensors",
    "hf://OWNER/NAME": "released/shared",
    "stable-diffusion/vae": "released/vae.safetensors",
    "cloob/vit_b_16_laion400m_16e": "released/cloob.safetensors",
    "ccld/yfcc_cfg": "released/ccld",
    "laionide/v3-base": "released/glide_base",
    "laionide/v2-sr": "released/glide_upsample",
    "glide/upsample": "released/glide_upsample",
    "glide/base": "released/glide_base",
    "kl-f8": "released/autoencoder.safetensors",
    "aesthetic/vit_b_32": "released/aesthetic.pth",
}
NAMES = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, RELEASED))})(?![\w.-])")
# What is other in a command when it is run here: (pattern, replacement).
SHORTENED: tuple[tuple[str, str], ...] = (
    (r"(?<![\w.])/data/", "there/"),
    (r"/shared/cache", "there/shared_cache"),
    (r"\{00000\.\.\d+\}", "{00000..00001}"),
    (r"trainer\.devices=\d+", "trainer.devices=2"),
    (r"trainer\.num_nodes=\d+", "trainer.num_nodes=1"),
    (r"--num-nodes \d+", "--num-nodes 1"),
    (r"--nnodes=\d+", "--nnodes=1"),
    (r"--rdzv-endpoint=\S+", "--rdzv-endpoint=localhost:0"),
    (r"--nproc-per-node[= ]\d+", "--nproc-per-node=2"),
    (r"--devices (\d+|auto)", "--devices 2"),
    (r"trainer\.max_steps=[\d_]+", "trainer.max_steps=2"),
    (r"(?<![\w.])count=\d+", "count=16"),
    (r"--pictures \d+", "--pictures 4"),
    (r"(?<!\w)-n 9\b", "-n 2"),
    (r"--interpolate \d+", "--interpolate 3"),
    (r"(--(?:upsampler-)?steps) \d+", r"\1 2"),
)
# Where that is not enough: (what the command has, pattern, replacement).
OF_SOME: tuple[tuple[str, str, str], ...] = (
    (r"sample\.py .*--aesthetic 9 --aesthetic-weight", r"$", " --aesthetic-embeddings vit_b_32_embeddings"),
    (r"sample\.py .*--aesthetic-embeddings ratings", r"--aesthetic 9", "--aesthetic 3"),  # of scores from 0 to 5
    (r"ldm_lab start ", r"$", " --steps 2 --memory cpu --offline"),
    (r" train .*photos\.yaml", r"$", f" {SHORT}"),
    (r"ldm_lab app .*--port", r"--port \d+", f"--port {PORT}"),
    (r"ldm_lab app (?!.*--port)", r"$", f" --port {PORT}"),
    (r" score (?!.*--head)", r"$", " --head released/aesthetic.pth --clip weights=checkpoints/ViT-B-32.pt"),
    (r"run=of_shards", r"image_size: \d+, batch_size: \d+", "image_size: 32, batch_size: 2, workers: 0"),
    (
        r"discriminator\.weights=",
        r"init_from=\S+ discriminator.weights=\S+",
        "init_from=released/kl-f8.ckpt discriminator.weights=released/kl-f8.ckpt",
    ),
    (r" evaluate .*--clip model=", r"--clip \S+ \S+", "--clip weights=released/clip.safetensors"),
    (r" evaluate .*--metric fid", r"$", " --inception released/inception.pth --bootstrap 2"),
    (r"sample.py .*if_ii_m", r"$", " --upsampler-steps 2"),
    (r" convert hf://DeepFloyd/IF", r"$", " model=t5 text_size=8"),
    (
        r" evaluate .*step=00000250",
        r"step=00000250(.*)step=00000500(.*)step=00001000",
        r"step=00000001\1step=00000002\2step=00000003",
    ),
    (r"checkpoint\.every=250", r"checkpoint\.every=250", "checkpoint.every=1 trainer.max_steps=4"),
)
# What is not run: (how the command begins, why).
NOT_RUN: dict[str, str] = {
    r"make [a-z-]+( EXTRAS=\w+)?$": "a target of the Makefile, which a test looks up",
    r"source \.venv/bin/activate$": "changes the shell that it is typed into",
    r"pre-commit install$": "changes the checkout's .git",
    r"git clone ": "needs a network",
    r"pipx install ": "needs a network",
    r"python -m venv ": "needs a network for what it installs",
    r"pip install ": "needs a network",
    r"(huggingface-cli|hf upload) ": "needs an account",
    r"python examples/\w+\.py$": "a server, which tests/test_recipes.py starts",
    r"bash benchmarks/gpu\.sh$": "needs a GPU; continuous integration runs it with --tiny",
    r"(while true; do|\[ \$\? -eq 75 \] \|\| break|done)$": "a loop around a command that is run by itself",
}
# What a page begins with, besides its own commands.
NEEDS: dict[str, Sequence[str]] = {
    "README.md": ("runs/quickstart", "runs/a", "runs/b", "released/ccld", "sea.jpg"),
    "docs/app.md": ("runs/quickstart", "dog.png", "secret.txt"),
    "docs/autoencoder.md": ("released/kl-f8.ckpt",),
    "docs/compare.md": ("runs/quickstart", "runs/a", "runs/b", "votes-a.json", "votes-b.json"),
    "docs/curation.md": (
        "released/aesthetic.pth", "checkpoints/ViT-B-32.pt", "nsfw.pth", "ratings.csv", "urls.parquet",
        "model.safetensors", "vit_b_32_embeddings",
    ),
    "docs/evaluation.md": ("runs/quickstart", "runs/a", "runs/b", "released/inception.pth"),
    "docs/finetune.md": ("released/ccld",),
    "docs/formats.md": (
        "released/ccld", "epoch=2-step=249999.ckpt", "checkpoints/kl-f8.zip", "out/quickstart", "ViT-B-32.pt",
        "runs/mine", "runs/ae", "epoch=9-step=250000.ckpt",
    ),
    "docs/glide.md": ("released/glide_base", "released/glide_upsample", "dogGLIDE.pt"),
    "docs/imagen.md": ("released/if_i", "released/if_ii", "t5", "checkpoints/t5"),
    "docs/sampling.md": (
        "runs/quickstart", "out/quickstart", "mask.png", "runs/style", "b.safetensors", "runs/glide_quickstart",
        "runs/glide_quickstart_upsampler",
    ),
    "docs/recipes.md": ("released/aesthetic.pth", "checkpoints/ViT-B-32.pt"),
    "docs/sharing.md": ("runs/quickstart", "released/shared"),
    "docs/training.md": ("runs/quickstart", "runs/yfcc_cfg"),
    "docs/watching.md": ("runs/a", "runs/b"),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How a command is run.

    Attributes:
        command: as the page has it.
        text: that is run; "" where nothing is.
        why: nothing is.
    """

    command: Command
    text: str
    why: str = ""

    @property
    def words(self) -> list[str]:
        """The words behind `python -m ldm_lab` of what is run."""
        return replace(self.command, text=self.text).program_words or []

    @property
    def kind(self) -> str:
        """One of "as it stands", "shortened", "by another test", "not run"."""
        if self.text:
            return "as it stands" if self.text == self.command.text else "shortened"
        return "by another test" if self.why.startswith("tests/") else "not run"

    def __str__(self) -> str:
        return f"{self.kind}{self.why and ': ' + self.why}{self.changes()}: {self.command.text}"

    def changes(self) -> str:
        """Return what is other than in the page, in words; "" if nothing is."""
        if self.kind != "shortened":
            return ""
        before, after = self.command.text.split(), self.text.split()
        found = []
        for tag, a, b, c, d in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
            if tag != "equal":
                old, new = " ".join(before[a:b]), " ".join(after[c:d])
                found.append(f"{old} -> {new}" if old and new else f"with {new}" if new else f"without {old}")
        return ": " + "; ".join(found)


def way_of(command: Command) -> Way:
    """Return how a command is run."""
    if test := command.run_by:
        return Way(command, "", test)
    for start, why in NOT_RUN.items():
        if re.match(start, command.text):
            return Way(command, "", why)
    text = NAMES.sub(lambda match: RELEASED[match[0]], command.text)
    for pattern, replacement in SHORTENED:
        text = re.sub(pattern, replacement, text)
    for has, pattern, replacement in OF_SOME:
        if re.search(has, command.text):
            text = re.sub(pattern, replacement, text, count=1)
    return Way(command, text)


def ways(page: str) -> list[Way]:
    """Return how the commands of a page are run, in their order."""
    return [way_of(its) for its in commands() if its.page == page]


def table() -> Iterator[str]:
    """Yield the lines of the table: each page with its numbers, then its commands that are not run as they stand."""
    for page in PAGES:
        if found := ways(page):
            counts = Counter(way.kind for way in found)
            yield f"{page}: {len(found)} commands, " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
            yield from (f"  {way.command.line}: {way}" for way in found if way.kind != "as it stands")


if __name__ == "__main__":
    print("\n".join(table()))
