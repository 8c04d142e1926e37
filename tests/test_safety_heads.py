"""LAION's detectors of unsafe images and of violence, in the forms that they are published in.

`keras_tables` and `keras_plain` were saved by Keras 2.15, the first with AutoKeras's encoding, and scored there.
"""

import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm_lab.__main__ import main
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.tensor_bundle import crc32c
from ldm_lab.curation.heads.head import load_head
from ldm_lab.curation.heads.standardized_mlp import text_keys
from ldm_lab.errors import UserError

CASES = Path(__file__).parent / "data/cases/weights"
EMBEDDER = "{name: clip, model: ViT-X, pretrained: mine}"


def converted(source, out, *words: str) -> Path:
    assert not main(["convert", str(source), str(out), f"embedder={EMBEDDER}", "column=punsafe", *words])
    return out


def scores_of(path, embeds: torch.Tensor) -> torch.Tensor:
    head = load_head(path).head
    raw = head.raw(embeds).detach()
    return raw.sigmoid() if head.output == "probability" else raw


@pytest.mark.parametrize("form", ["zip", "folder", "half"])
@pytest.mark.parametrize("name", ["keras_tables", "keras_plain"])
def test_a_head_that_keras_saved(tmp_path, name, form):
    source = CASES / f"{name}.zip"
    if form == "folder":
        with zipfile.ZipFile(source) as archive:
            archive.extractall(tmp_path)
        source = tmp_path / name
    out = converted(source, tmp_path / "head.safetensors", *["--half"] * (form == "half"))
    recorded = np.load(CASES / f"{name}.npz")
    scores = scores_of(out, torch.from_numpy(recorded["embeds"]))
    error = (scores - torch.from_numpy(recorded["scores"])).abs().max()
    assert error < (5e-3 if form == "half" else 1e-6)
    assert load_head(out).head.output == ("probability" if name == "keras_tables" else "number")


def test_columns_that_autokeras_looks_up_are_compared_as_texts():
    values = torch.tensor([0.1234565, -0.1234565, 0.0078125, -0.0078125, 0.0, -0.0, -1e-7, 1e-7, 0.5, 1 / 3, -7.0])
    texts = [f"{value:f}" for value in values.double().tolist()]
    keys = text_keys(values).tolist()
    assert all((a == b) == (x == y) for a, x in zip(keys, texts) for b, y in zip(keys, texts))


def test_a_keras_head_does_not_say_whose_embeddings_it_takes():
    with pytest.raises(UserError, match=r"keras_plain.zip: does not say whose embeddings it takes\. Say it once"):
        load_head(CASES / "keras_plain.zip")


def rezipped(path: Path, out: Path, **changes: bytes | None) -> Path:
    """A zip with other contents in it, or without a file, by the beginnings of the files' names."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            key = next((key for key in changes if Path(info.filename).name.startswith(key)), None)
            if key is None or changes[key] is not None:
                new.writestr(info.filename, old.read(info) if key is None else changes[key])
    return out


def test_what_is_said_of_keras_models_that_are_no_heads(tmp_path):
    source = CASES / "keras_plain.zip"
    with zipfile.ZipFile(source) as archive:
        described = archive.read("keras_plain/keras_metadata.pb")
    cases = {
        "without keras_metadata.pb": {"keras_metadata": None},
        "without variables/variables.index": {"variables.index": None},
        "without variables/variables.data-00000-of-00001": {"variables.data": None},
        "holds tensors of an unknown model": {"keras_metadata": described.replace(b'"Dense"', b'"Gauss"')},
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=message) as raised:
            load_head(rezipped(source, tmp_path / "a.zip", **changes))
        assert "\n" not in str(raised.value)
    both = tmp_path / "both.zip"
    with zipfile.ZipFile(both, "w") as archive:
        archive.writestr("a/saved_model.pb", b"")
        archive.writestr("b/saved_model.pb", b"")
    with pytest.raises(UserError, match="2 models in one zip"):
        load_head(both)


def test_damage_of_a_keras_model_is_found(tmp_path):
    """Bytes of any of its files are changed, or cut off: an error in one line, or the same scores."""
    random.seed(0)
    source, expected = CASES / "keras_tables.zip", scores_with_embedder(CASES / "keras_tables.zip")
    with zipfile.ZipFile(source) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for name, content in contents.items():
        for _ in range(12):
            place = random.randrange(len(content))
            changed = bytearray(content)
            changed[place] ^= 1 << random.randrange(8)
            damaged = content[:place] if random.random() < 0.3 else bytes(changed)
            path = rezipped(source, tmp_path / "a.zip", **{Path(name).name: damaged})
            try:
                assert torch.equal(scores_with_embedder(path), expected) or not name.endswith(("index", "00001"))
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 500


def scores_with_embedder(path: Path) -> torch.Tensor:
    found = detect_format(path)
    state = found.importer.read(found.file, "head").state
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])


def test_checksums_are_crc32c():
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"6789", crc32c(b"12345")) == 0xE3069283


# ----------------------------------------------------------------------------------------------- the port to PyTorch


class Port(nn.Module):
    """What LAION publishes as a module: a standardization, and layers in attributes."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_buffer("mean", 0.1 * torch.randn(widths[0]))
        self.norm.register_buffer("variance", torch.rand(widths[0]) + 0.1)
        for i in range(1, len(widths)):
            self.add_module(f"linear_{i}", nn.Linear(widths[i - 1], widths[i]))
        self.count = len(widths) - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.norm.mean) / (self.norm.variance.sqrt() + 1e-10)
        for i in range(1, self.count):
            x = self.get_submodule(f"linear_{i}")(x).relu()
        return self.get_submodule(f"linear_{self.count}")(x).sigmoid()[:, 0]


def test_the_port_to_pytorch(tmp_path, capsys):
    torch.manual_seed(0)
    embeds = nn.functional.normalize(torch.randn(20, 512), dim=1)
    port = Port([512, 32, 32, 1])
    torch.save(port.state_dict(), tmp_path / "a.pth")
    loaded = load_head(tmp_path / "a.pth").head
    assert "has the sizes of LAION's nsfw/vit_b_32, and is taken for it" in capsys.readouterr().err
    assert loaded.column == "punsafe" and loaded.embedder["model"] == "ViT-B-32-quickgelu"
    assert torch.allclose(loaded(embeds), port(embeds), atol=1e-6)
    other = Port([512, 16, 1])
    torch.save({"model": {f"module.{name}": value for name, value in other.state_dict().items()}}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="does not say whose embeddings it takes and what is between its layers"):
        load_head(tmp_path / "b.pth")
    words = ("activation=relu", "output=probability")
    path = converted(tmp_path / "b.pth", tmp_path / "b.safetensors", *words)
    assert torch.allclose(load_head(path).head(embeds), other(embeds), atol=1e-6)


@torch.no_grad()
def test_the_layout_on_h_14_by_its_released_name(tmp_path):
    torch.manual_seed(0)
    widths = [8, 8, 8, 8, 4, 4, 4, 1]
    parts: list[nn.Module] = []
    for i in range(5):
        parts += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU(), nn.Dropout(0.2)]
    net = nn.Sequential(*parts, nn.Linear(4, 4), nn.Linear(4, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in net.state_dict().items()}, tmp_path / "h14_nsfw.pth")
    head = load_head(tmp_path / "h14_nsfw.pth").head
    embeds = nn.functional.normalize(torch.randn(20, 8), dim=1)
    assert (head.column, head.output, head.embedder["model"]) == ("punsafe", "number", "ViT-H-14")
    assert torch.allclose(head(embeds), net(embeds)[:, 0], atol=1e-6)


# ---------------------------------------------------------------------------------------------- prompts of violence


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", ">f4"])
def test_two_prompts_in_an_array(tmp_path, dtype):
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal((2, 8)).astype(dtype)
    np.save(tmp_path / "violence_detection_vit_b_32.npy", np.asfortranarray(prompts))
    loaded = load_head(tmp_path / "violence_detection_vit_b_32.npy").head
    assert loaded.column == "violence" and loaded.embedder["pretrained"] == "openai"
    embeds = rng.standard_normal((400, 8)).astype("float32")
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    violent = np.argmax(np.einsum("ij,kj->ik", embeds, prompts.astype("float32")), axis=1) == 1
    assert (loaded(torch.from_numpy(embeds)).detach().numpy() > 0).tolist() == violent.tolist()
    with pytest.raises(UserError, match="does not say whose embeddings it takes"):
        np.save(tmp_path / "mine.npy", prompts)
        load_head(tmp_path / "mine.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8), "float32"), "not a head: it holds tensors of an unknown model"),
        (np.zeros(8, "float32"), "not a head: it holds tensors of an unknown model"),
        (np.zeros((2, 8), "int64"), "not a head: it holds tensors of an unknown model"),
        (np.array([{"a": 1}, 2], dtype=object), "not a readable .npy file "),
        (np.zeros(2, dtype=[("a", "f4")]), "which are no numbers"),
    ],
)
def test_other_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        load_head(tmp_path / "a.npy")


def test_an_array_whose_header_lies(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 8), "float32"))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"(2, 8), }  ", b"(2, 8888), }"[:11]))
    with pytest.raises(UserError, match=r"not a readable \.npy file "):
        load_head(tmp_path / "a.npy")


def test_the_watermark_detector_is_named(tmp_path):
    torch.save(
        {"conv_stem.weight": torch.zeros(1), "classifier.5.weight": torch.zeros(2, 4)},
        tmp_path / "watermark_model_v1.pt",
    )
    with pytest.raises(UserError, match="not a head: it holds LAION's watermark detector, which looks at pixels"):
        load_head(tmp_path / "watermark_model_v1.pt")
