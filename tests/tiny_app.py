"""The app on tiny random models, and what talks to it as a program does."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import tiny_glide
import torch
from tiny import DENOISER, embedding, make_parts

from ldm_lab.app.limits import Limits
from ldm_lab.app.server import Settings, serving
from ldm_lab.app.shelf import Shelf
from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.lora import BaseModel, save_lora
from ldm_lab.checkpoints.native import save_model
from ldm_lab.config import RunConfig, build
from ldm_lab.pretrained.own_runs import note_own
from ldm_lab.sampling import ModelOptions
from ldm_lab.sampling.aesthetic import RatingEmbeddings
from ldm_lab.training.lora import LoraOptions, additions

LIMITS = Limits(pictures=4, side=128, steps=400, work=2, megapixels=1, upload=1, stored=17, waiting=8)
SECONDS = 60


def make_models(folder: Path) -> Path:
    """Write a folder with two models of 16-pixel pictures; in the folder of a run, and by itself."""
    config = {"task": "diffusion", **make_parts(folder), "denoiser": DENOISER, "objective": {"name": "v_cosine"}}
    config["conditioner"]["dropout"] = 0.2
    (folder / "tiny").mkdir()
    note_own(folder / "tiny")  # whose parts lie elsewhere
    for number, name in enumerate(("tiny/ema.safetensors", "other.safetensors")):
        torch.manual_seed(number)
        state = build("denoiser", DENOISER, 4, embedding(16)).state_dict()
        save_model(folder / name, state, config, {"image_size": "16"})
    (folder / "tiny" / "config.yaml").write_text("task: diffusion\n")
    return folder


def make_additions(folder: Path) -> None:
    """Write a LoRA and rating embeddings for the models of `make_models`, each with random numbers in it."""
    torch.manual_seed(0)
    network = build("denoiser", DENOISER, 4, embedding(16))
    LoraOptions(rank=2).insert(network)
    factors = {name: torch.randn_like(value) / 4 for name, value in additions(network.state_dict()).items()}
    form = {"denoiser": DENOISER, "objective": {"name": "v_cosine"}, "lora": {"rank": 2}}
    save_lora(folder / "lora.safetensors", factors, RunConfig.from_dict(form), BaseModel("base", "0" * 64, ""), {})
    rows = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    conditioner = {"name": "cloob", "weights": str(folder / "conditioner.safetensors")}
    RatingEmbeddings(dict(zip((0, 9), rows)), embedder_of(conditioner)).save(folder / "ratings.safetensors")


def make_stages(folder: Path) -> None:
    """Write a base model of 16-pixel pixels, and one that enlarges its pictures to 32."""
    tiny_glide.write(folder / "base.safetensors")
    tiny_glide.write(folder / "larger.safetensors", upsampler=True)


@contextmanager
def served(folder: Path, password: str | None = None, limits: Limits = LIMITS) -> Iterator[str]:
    """Serve the models of a folder on a free port; gives the address without a slash at its end."""
    settings = Settings(port=0, password=password, loading=ModelOptions(device="cpu"), limits=limits)
    with serving(Shelf(folder=folder), settings) as address:
        yield address.rstrip("/")


class Refused(Exception):
    """What the server says of a request that it does not carry out."""


def detail(answer: requests.Response) -> str:
    """Return why a request is refused."""
    return answer.json()["detail"] if answer.headers["content-type"] == "application/json" else answer.text


def begin(address: str, endpoint: str = "sample", **given: object) -> str:
    """Ask for something; returns what it is called from then on."""
    answer = requests.post(f"{address}/gradio_api/call/v2/{endpoint}", json=given, timeout=SECONDS)
    if answer.status_code != 200:
        raise Refused(f"{answer.status_code}: {detail(answer)}")
    return answer.json()["event_id"]


def events(address: str, event: str, endpoint: str = "sample") -> Iterator[tuple[str, list]]:
    """Yield (kind, data) of what the server tells, as it comes."""
    with requests.get(f"{address}/gradio_api/call/{endpoint}/{event}", stream=True, timeout=SECONDS) as answer:
        kind = ""
        for line in answer.iter_lines(decode_unicode=True, chunk_size=1):
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield kind, json.loads(line.removeprefix("data: "))


def ask(address: str, endpoint: str = "sample", **given: object) -> object:
    """Return what an endpoint answers. Raises Refused with its message."""
    for kind, data in events(address, begin(address, endpoint, **given), endpoint):
        if kind == "complete":
            return data[0]
        if kind == "error":
            raise Refused(data["error"] if isinstance(data, dict) else str(data))
    raise AssertionError("no answer")


def press(address: str, button: str, doing: str = "click", **given: object) -> list:
    """Press a button of the page as a browser does, with some controls set; returns what the page is told in the end.

    Args:
        address: of the page.
        button: its name in the page.
        doing: what is done to it.
        given: controls by their names in the page, with _ for -; the others are as they are when the page opens.
    """
    page = requests.get(f"{address}/config", timeout=SECONDS).json()
    components = {its["id"]: its["props"] for its in page["components"]}
    named = {props.get("elem_id"): number for number, props in components.items()}
    (event,) = [its for its in page["dependencies"] if its["backend_fn"] and [named[button], doing] in its["targets"]]
    values = {number: components[number].get("value") for number in event["inputs"]}
    for name, value in given.items():
        number = named.get(name.replace("_", "-"), named.get(f"option-{name}"))
        assert number in values, f"{name} is no control that {button} reads"
        values[number] = value
    joined = {"data": list(values.values()), "fn_index": event["id"], "session_hash": secrets.token_hex(8)}
    answer = requests.post(f"{address}/gradio_api/queue/join", json=joined, timeout=SECONDS)
    if answer.status_code != 200:
        raise Refused(f"{answer.status_code}: {detail(answer)}")
    told = f"{address}/gradio_api/queue/data?session_hash={joined['session_hash']}"
    with requests.get(told, stream=True, timeout=SECONDS) as answer:
        for line in answer.iter_lines(decode_unicode=True, chunk_size=1):
            said = json.loads(line.removeprefix("data: ")) if line else {}
            if said.get("msg") == "process_completed":
                if not said["success"]:
                    raise Refused(said["output"]["error"])
                return said["output"]["data"]
    raise AssertionError("no answer")


def upload(address: str, path: Path) -> dict[str, object]:
    """Return what stands for an uploaded file. Raises Refused."""
    with open(path, "rb") as file:
        answer = requests.post(f"{address}/gradio_api/upload", files={"files": (path.name, file)}, timeout=SECONDS)
    if answer.status_code != 200:
        raise Refused(f"{answer.status_code}: {detail(answer)}")
    return {"path": answer.json()[0], "meta": {"_type": "gradio.FileData"}}
