"""Heads: read from released files and our own, strict about width and CLIP, found out by what is in them."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm_lab.__main__ import main
from ldm_lab.checkpoints import embedders
from ldm_lab.checkpoints.embedders import OPENAI
from ldm_lab.checkpoints.files import read_safetensors
from ldm_lab.config import build
from ldm_lab.curation.heads.head import l2_normalize, load_head, save_head
from ldm_lab.errors import UserError
from ldm_lab.io.atomic import sha256
from ldm_lab.pretrained import resolve as pretrained
from ldm_lab.pretrained.catalogue import catalogue

EMBEDDER = {"name": "clip", "model": "ViT-X", "pretrained": "mine"}
LINEAR = {"name": "linear", "embed_dim": 6, "embedder": EMBEDDER, "column": "beauty"}


def linear(path, **changes):
    section = {**LINEAR, **changes}
    head = build("head", section)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.weight)
    save_head(path, head, section, {"images": 7})
    return head


@pytest.mark.parametrize("size", ["vit_b_32", "vit_b_16", "vit_l_14"])
def test_released_heads_are_known_by_their_content(tmp_path, size, golden_heads):
    released = golden_heads / f"sa_0_4_{size}_linear.pth"
    entry = catalogue()[f"aesthetic/{size}"]
    assert (sha256(released), released.stat().st_size) == (entry.sha256, entry.size)
    renamed = tmp_path / "some.pth"
    renamed.write_bytes(released.read_bytes())
    for path in (released, renamed):
        head = load_head(path).head
        assert head.embedder == OPENAI[size] and head.column == "aesthetic"
        assert head.embed_dim == (768 if size == "vit_l_14" else 512)


def test_released_rating_embeddings_have_the_checksums_of_their_entries(golden_heads):
    for name, entry in catalogue().items():
        if entry.role == "rating":
            path = golden_heads / f"{name.split('/')[1]}_embeddings" / entry.file
            assert (sha256(path), path.stat().st_size) == (entry.sha256, entry.size)
    assert [name for name, entry in catalogue().items() if entry.config] == [
        *(f"aesthetic/{size}" for size in ("vit_b_16", "vit_b_32", "vit_l_14")),
        "aesthetic/improved_vit_l_14",
        *(f"nsfw/{size}" for size in ("vit_b_32", "vit_l_14", "vit_h_14")),
        *(f"violence/{size}" for size in ("vit_b_32", "vit_l_14")),
    ]


def test_a_head_out_of_the_cache(tmp_path, monkeypatch, golden_heads):
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    with pytest.raises(UserError, match="aesthetic/vit_b_32: not in the cache"):
        load_head("aesthetic/vit_b_32")
    path = pretrained.cached_path("aesthetic/vit_b_32")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((golden_heads / path.name).read_bytes())
    assert load_head("aesthetic/vit_b_32").source == "aesthetic/vit_b_32"


@torch.no_grad()
def test_a_head_normalizes_by_itself(tmp_path):
    head = linear(tmp_path / "h.safetensors")
    embeds = torch.randn(5, 6)
    embeds[2] = 0
    assert torch.allclose(head(embeds), head(embeds * 37), atol=1e-5)
    assert float(head(embeds)[2]) == float(head.bias)
    half = l2_normalize(embeds[:2]).half()
    assert torch.equal(l2_normalize(half), half.float()), "rounding to float16 is not undone"
    assert torch.allclose(l2_normalize(half * 4).norm(dim=1), torch.ones(2))


def test_a_head_takes_its_own_width_alone(tmp_path):
    head = linear(tmp_path / "h.safetensors")
    with pytest.raises(UserError, match=r"head beauty: takes embeddings of width 6 .clip ViT-X mine., these have 7"):
        head(torch.randn(2, 7))


@torch.no_grad()
def test_our_own_file(tmp_path):
    head = linear(tmp_path / "h.safetensors", output="probability")
    loaded = load_head(tmp_path / "h.safetensors")
    assert loaded.trained == {"images": 7} and loaded.head.embedder == EMBEDDER and loaded.head.column == "beauty"
    embeds = torch.randn(50, 6)
    assert torch.equal(loaded.head(embeds), head(embeds))
    assert ((head(embeds) > 0) & (head(embeds) < 1)).all()
    metadata = read_safetensors(tmp_path / "h.safetensors")[1]
    assert metadata["role"] == "head" and json.loads(metadata["config"])["embedder"] == EMBEDDER


@torch.no_grad()
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_an_mlp_without_activation_is_folded(tmp_path, activation):
    section = {"name": "mlp", "widths": [6, 8, 5, 1], "embedder": EMBEDDER, "activation": activation, "dropout": [0.5]}
    torch.manual_seed(0)
    head = build("head", section)
    save_head(tmp_path / "h.safetensors", head, section, {})
    loaded = load_head(tmp_path / "h.safetensors").head
    assert loaded.part_name == ("linear" if activation == "none" else "mlp")
    embeds = torch.randn(9, 6)
    assert torch.allclose(loaded(embeds), head.eval()(embeds), atol=1e-6)
    assert not torch.equal(head.train()(embeds), head(embeds)), "dropout is at work in training"


@torch.no_grad()
def test_a_foreign_mlp_of_any_layout(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "h.pth")
    with pytest.raises(
        UserError, match=r"does not say whose embeddings it takes and what is between its layers\. Say it"
    ):
        load_head(tmp_path / "h.pth")


@torch.no_grad()
def test_converting_says_what_the_file_does_not(tmp_path, program):
    layers = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, tmp_path / "h.pth")
    given = ["embedder={name: clip, model: ViT-X, pretrained: mine}", "column=punsafe", "output=probability"]
    given.append("activation=relu")
    out = tmp_path / "h.safetensors"
    code, text, err = program("ldm_lab.__main__", "convert", tmp_path / "h.pth", out, *given)
    assert code == 0, err
    assert "the head mlp of 33 parameters" in text
    embeds = torch.randn(3, 6)
    expected = layers(l2_normalize(embeds))[:, 0].sigmoid()
    assert torch.allclose(load_head(out).head(embeds), expected, atol=1e-6)
    code, text, _ = program("ldm_lab.__main__", "inspect", out)
    assert code == 0 and "head" in text and "punsafe" in text


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(2, 6), "bias": torch.zeros(2)}, "not a head"),
        ({"layers.0.weight": torch.zeros(3, 6), "layers.0.bias": torch.zeros(3)}, "not a head with one score"),
        (
            {
                "layers.0.weight": torch.zeros(3, 6),
                "layers.2.weight": torch.zeros(1, 3),
                "layers.2.bias": torch.zeros(1),
            },
            "layers.0.bias is missing",
        ),
        (
            {
                **{"layers.0.weight": torch.zeros(3, 6), "layers.0.bias": torch.zeros(3)},
                **{"layers.2.weight": torch.zeros(1, 4), "layers.2.bias": torch.zeros(1)},
            },
            "its layers do not follow on one another",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "h.pth")
    with pytest.raises(UserError, match=message):
        load_head(tmp_path / "h.pth")


def test_hostile_and_damaged_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused"):
        load_head(tmp_path / "evil.pth")
    linear(tmp_path / "h.safetensors")
    data = (tmp_path / "h.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"cut.safetensors"):
        load_head(tmp_path / "cut.safetensors")
    config = {**LINEAR, "embedder": {"name": "clip", "weights": "/etc/passwd"}}
    metadata = {"format": "ldm_lab", "role": "head", "config": json.dumps(config)}
    save_file({"weight": torch.zeros(1, 6), "bias": torch.zeros(1)}, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(UserError, match=r"embedder.weights: no such key"):
        load_head(tmp_path / "odd.safetensors")
    head = build("head", LINEAR)
    with torch.no_grad():
        head.weight.fill_(float("nan"))
    save_head(tmp_path / "nan.safetensors", head, LINEAR, {})
    with pytest.raises(UserError, match="not finite"):
        load_head(tmp_path / "nan.safetensors")


def test_embedders_are_told_apart():
    openai, other = OPENAI["vit_b_32"], {"name": "clip", "model": "ViT-B-32-quickgelu", "sha256": "a" * 64}
    assert embedders.same(openai, dict(openai)) and embedders.same(other, {"name": "clip", "sha256": "a" * 64})
    assert not embedders.same(openai, OPENAI["vit_b_16"]) and not embedders.same(other, {**other, "sha256": "b" * 64})
    with pytest.raises(
        UserError, match=r"x: belongs to the embeddings of clip ViT-B-32-quickgelu openai.*say so: pretr"
    ):
        embedders.check_same("x", openai, other)
    with pytest.raises(UserError, match="neither named nor in a file"):
        embedders.embedder_of({"name": "none"})


# ---------------------------------------------------------------------------------- what is between the layers of MLPs

CASES = Path(__file__).parent / "data/cases/weights"
R, D = nn.ReLU, nn.Dropout
LAYOUTS = {  # what is behind each hidden layer; released, or a sibling
    "h14": [(R, D)] * 5 + [()],
    "relu at the end": [(R, D), (R, D), (R,)],
    "nothing in the middle": [(R,), (), (R,)],
    "both": [(R, D), (R, D)],
}


def sequential(layout, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = [6, *range(9, 9 - len(layout), -1), 1]
    modules: list[nn.Module] = [nn.Linear(6, widths[1])]
    for i, between in enumerate(layout):
        modules += [kind() for kind in between] + [nn.Linear(widths[i + 1], widths[i + 2])]
    return nn.Sequential(*modules).eval()


def converted(source, out, *overrides):
    text = "embedder={name: clip, model: ViT-X, pretrained: mine}"
    main(["convert", str(source), str(out), text, *overrides])
    return load_head(out).head


@pytest.mark.parametrize("prefix", ["layers.", "net.", ""])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layers_are_followed_by_what_their_places_leave_room_for(tmp_path, layout, prefix):
    net = sequential(layout)
    torch.save({f"{prefix}{name}": value for name, value in net.state_dict().items()}, tmp_path / "a.pth")
    head = converted(tmp_path / "a.pth", tmp_path / "a.safetensors", "activation=relu")
    embeds = torch.nn.functional.normalize(torch.randn(200, 6), dim=-1)
    with torch.no_grad():
        assert (head(embeds) - net(embeds)[:, 0]).abs().max() < 1e-6


def test_the_case_of_a_small_h14_head(tmp_path):
    head = converted(CASES / "h14_layout_tiny.pth", tmp_path / "a.safetensors", "activation=relu")
    state = torch.load(CASES / "h14_layout_tiny.pth")
    net = nn.Sequential(nn.Linear(4, 3), R(), D(), nn.Linear(3, 2), nn.Linear(2, 1)).eval()
    net.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    embeds = torch.nn.functional.normalize(torch.randn(200, 4), dim=-1)
    with torch.no_grad():
        assert (head(embeds) - net(embeds)[:, 0]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ((0, 1, 2), "activation: 'relu' has no place, each layer follows directly on the one before"),
        ((0, 4, 7), r"what is between its layers \(0, 4, 7\) is more than activation and dropout"),
        ((1, 3, 5), r"what is before the first of its layers \(1, 3, 5\) is more than"),
        ((0, 2, 4, 6, 7), "activation: 'relu' is asked for, but .* holds 'none'"),
    ],
)
def test_layouts_that_are_another_function_are_refused(tmp_path, places, message):
    widths = [6, *[5] * (len(places) - 1), 1]
    layers = {place: nn.Linear(*pair) for place, pair in zip(places, pairwise(widths), strict=True)}
    state = {
        f"layers.{place}.{name}": value for place, net in layers.items() for name, value in net.state_dict().items()
    }
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        converted(tmp_path / "a.pth", tmp_path / "a.safetensors", "activation=relu")


def test_a_head_with_a_norm_in_it_is_not_taken_for_an_mlp(tmp_path):
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    torch.save({f"layers.{name}": value for name, value in net.state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds tensors of an unknown model"):
        converted(tmp_path / "a.pth", tmp_path / "a.safetensors", "activation=relu")
    torch.save(
        {f"layers.{n}": v for n, v in net.state_dict().items() if "running" not in n and "num" not in n},
        tmp_path / "b.pth",
    )
    with pytest.raises(UserError, match="its layers do not follow on one another"):
        converted(tmp_path / "b.pth", tmp_path / "b.safetensors", "activation=relu")
