"""Folders as runs leave them, with logs as long as wished, for tests of their pages."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = (
    *("step", "train/loss", "train/lr", "train/grad_norm"),
    *(f"train/loss_t{i / 4:.2f}" for i in range(4)),
    *("speed/images_per_s", "speed/waiting", "speed/fetch_s", "speed/loss_s", "held_out/loss", "evaluate/fd"),
    *("evaluate/clip_score", "odd/<b>&\"'"),
)


def write_log(path: Path, rows: int, every: int = 50, seed: int = 0) -> None:
    """Write a metrics.csv of `rows` rows: a falling loss with a spike, NaN and infinity, some columns with gaps."""
    generator = np.random.default_rng(seed)
    steps = np.arange(rows) * every + every - 1  # as Lightning counts, from 0
    loss = 0.2 + 0.8 / (1 + np.arange(rows) / max(rows / 20, 1)) + generator.normal(0, 0.02, rows)
    own = {"train/loss": loss, "train/lr": np.minimum(1e-4, 1e-6 * (1 + np.arange(rows)))}
    texts = []
    for name in NAMES[1:]:
        values = own.get(name, loss * generator.uniform(0.5, 1.5))
        texts.append([repr(float(value)) for value in values])
    columns = dict(zip(NAMES[1:], texts))
    if rows > 60:
        columns["train/loss"][rows * 3 // 5] = "35.25"
        columns["train/loss"][rows * 4 // 5] = "nan"
        columns["train/grad_norm"][rows * 4 // 5] = "inf"
    for name, apart in (("held_out/loss", 20), ("evaluate/fd", 50), ("evaluate/clip_score", 50)):
        columns[name] = [text if i % apart == 0 else "" for i, text in enumerate(columns[name])]
    head = ",".join(map(quoted, NAMES))
    lines = [head, *map(",".join, zip(map(str, steps), *columns.values())), ""]
    path.write_bytes("\r\n".join(lines).encode())


def quoted(name: str) -> str:
    """Return a name as a CSV has it."""
    return '"' + name.replace('"', '""') + '"' if '"' in name or "," in name else name


def write_run(folder: Path, rows: int = 400, pictures: int = 4, lr: float = 1e-4, seed: int = 0) -> Path:
    """Write a run's folder and return it."""
    folder.mkdir(parents=True)
    write_log(folder / "metrics.csv", rows, seed=seed)
    (folder / "config.yaml").write_text(
        f"task: diffusion\nrun: {json.dumps(folder.name)}\nseed: 0\noptim:\n  lr: {lr}\n"
        f"trainer:\n  max_steps: {rows * 50}\ndemo:\n  prompts: '</script><b>hostile</b>'\n"
    )
    seen = {"kind": "spike", "loss": 35.25, "limit": 3.0, "norm": math.inf, "keys": ["00012", "<b>"], "name": ""}
    lines = [{**seen, "step": rows * 30 + i, "norm": "inf", "done": "left out"} for i in range(3)]
    lines.append(
        {**seen, "step": rows * 40, "norm": "inf", "done": "back to the state of step 7, the data are left out"}
    )
    (folder / "guard.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"time": "2026-01-01T10:00:00+00:00", "step": 0, "event": "started", "text": "1 device", "details": []},
        {"time": "2026-01-02T10:00:00+00:00", "step": rows * 25, "event": "resumed", "text": "from last.ckpt",
         "details": ["optim.lr: 0.001 -> 0.0001"]},
        {"time": "2026-01-03T10:00:00+00:00", "step": rows * 50, "event": "ended", "text": "done", "details": []},
    ]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    for kind in ("demo", "enlargements") if pictures else ():
        (folder / kind).mkdir()
        for i in range(pictures):
            picture = Image.new("RGB", (160, 120), (40 + 200 * i // pictures, 90, 160))
            picture.save(folder / kind / f"step={1 + rows * 50 * i // pictures:08d}.png")
    return folder
