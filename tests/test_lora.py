"""LoRA: small trained additions to a frozen network, in training, in files, in pictures and merged."""

import json
import math
import warnings

import pytest
import tiny_glide
import torch
from safetensors.torch import save_file
from tiny import DENOISER, embedding, make_run
from torch import nn

from ldm_lab import ema
from ldm_lab.checkpoints.files import read_pickled, read_safetensors
from ldm_lab.checkpoints.lora import BaseModel, Lora, WeightedLora, add_all, fingerprint, read_lora, save_lora
from ldm_lab.config import RunConfig, build
from ldm_lab.errors import UserError
from ldm_lab.pretrained.own_runs import note_own
from ldm_lab.sampling import ModelOptions, Pipeline, SamplingOptions, applied_loras
from ldm_lab.sampling.loras import split_weight
from ldm_lab.training.lora import LoraOptions, additions

PROMPT = ["a red circle"]
FEW = SamplingOptions(sampler={"name": "ddim", "steps": 2}, guidance=2.0)


def ccld(**options) -> nn.Module:
    torch.manual_seed(0)
    return build("denoiser", {**DENOISER, **options}, 4, embedding(16))


def asked(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return an input of one of the two networks."""
    torch.manual_seed(1)
    if "embed" in network.spec:
        return {"x": torch.randn(2, 4, 8, 8), "time": torch.tensor([0.2, 0.7]), "embed": torch.randn(2, 16)}
    ids = torch.randint(0, 600, (2, 6))
    inputs = {"x": torch.randn(2, 3, 16, 16), "time": torch.tensor([3.0, 70.0]), "token_ids": ids}
    return {**inputs, "token_ids_mask": torch.ones(2, 6, dtype=torch.bool)}


def fill(network: nn.Module) -> None:
    """Give the additions values as if they were trained."""
    torch.manual_seed(2)
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)


def as_file(network: nn.Module, path, options: LoraOptions, form: dict, base: str = "") -> Lora:
    config = RunConfig.from_dict({**form, "lora": {"rank": options.rank, "alpha": options.alpha}})
    save_lora(path, additions(network.state_dict()), config, BaseModel("base", "0" * 64, base), {})
    return read_lora(path)


FORM = {"denoiser": DENOISER, "objective": {"name": "v_cosine"}}
NAMES = {"denoiser": "ccld_unet", "objective": "v_cosine"}


# ---------------------------------------------------------------------------------------------------- the additions


@pytest.mark.parametrize("kind", ["ccld_unet", "glide_unet"])
def test_what_peft_adds_in_training_is_what_the_file_adds_to_the_weights(tmp_path, kind):
    form = FORM if kind == "ccld_unet" else tiny_glide.config()
    network = ccld() if kind == "ccld_unet" else tiny_glide.network(form)
    network.requires_grad_(True).eval()
    inputs = asked(network)
    base, before = {k: v.clone() for k, v in network.state_dict().items()}, network(**inputs)
    options = LoraOptions(rank=2, alpha=3.0)
    options.insert(network)
    assert torch.equal(network(**inputs), before), "it begins as nothing added"
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    fill(network)
    adapted = network(**inputs)
    assert not torch.allclose(adapted, before, atol=1e-3)
    names = {role: form[role]["name"] for role in ("denoiser", "objective")}
    lora = as_file(network, tmp_path / "l.safetensors", options, form, fingerprint(base))
    merged = {k: v.clone() for k, v in base.items()}
    assert add_all(merged, [WeightedLora(lora, 1.0)], names) == []
    plain = (ccld() if kind == "ccld_unet" else tiny_glide.network(form)).eval()
    plain.load_state_dict(merged)
    assert torch.allclose(plain(**inputs), adapted, atol=1e-4)


def test_all_layers_but_the_outer_ones_are_added_to():
    for network in (ccld(), tiny_glide.network(tiny_glide.config())):
        layers = [n for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
        chosen = LoraOptions(rank=1).chosen(network, {})
        assert {*layers} - {*chosen} == {*network.outer_layers()} & {*layers}
        assert len(chosen) > 20


def test_layers_are_chosen_by_parts_of_the_network_parts_of_names_and_patterns():
    network = tiny_glide.network(tiny_glide.config())
    text = LoraOptions(rank=1, targets=["text_transformer"]).chosen(network, {})
    assert text and all(name.startswith("transformer") for name in text)
    assert all(name.endswith(".qkv") for name in LoraOptions(rank=1, targets=["qkv"]).chosen(network, {}))
    assert LoraOptions(rank=1, targets=["input_blocks.0"]).chosen(network, {}) == ["input_blocks.0.0"]
    assert LoraOptions(rank=1, targets=["out.*"]).chosen(network, {}) == ["out.2"]
    with pytest.raises(UserError, match=r"no such layer of this network: 'qvk'. Did you mean 'qkv'"):
        LoraOptions(rank=1, targets=["qvk"]).chosen(network, {})
    with pytest.raises(UserError, match="positional_embedding: is neither a linear layer nor a convolution"):
        LoraOptions(rank=1, targets=["positional_embedding"]).chosen(network, {})


class Odd(nn.Module):
    """Layers whose weights cannot have an addition, and one whose can."""

    spec = {}

    def __init__(self):
        super().__init__()
        self.first, self.plain, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.grouped, self.dilated = nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, dilation=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.attend = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.twice = self.again = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.same = nn.Linear(4, 4)
        self.same.weight = self.tied.weight

    def outer_layers(self):
        return ["first", "last"]

    def freeze_groups(self):
        return {}


def test_layers_that_an_addition_is_not_for_are_left_and_named():
    lines = LoraOptions(rank=1).insert(network := Odd())
    assert {name.split(".lora_")[0] for name in network.state_dict() if ".lora_" in name} == {"plain"}
    assert "1 layers" in lines[0] and "left as they are: grouped (a convolution in 2 groups)" in lines[1]
    for target, why in [
        ("grouped", "in 2 groups"), ("dilated", "dilated"), ("circular", "circular padding"),
        ("attend", "reads its weight itself"), ("encoder.linear1", "reads its weight itself"),
        ("normed", "computed"), ("twice", "several places"), ("tied", "several places"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"lora.targets: {target}: LoRA is not for .*{why}"):
            LoraOptions(rank=1, targets=[target]).insert(Odd())


def test_the_average_has_the_additions_alone_for_itself():
    network = ccld()
    LoraOptions(rank=2).insert(network)
    average = ema.averaged_copy(network, share_frozen=True)
    for (name, mine), its in zip(average.named_parameters(), network.parameters(), strict=True):
        assert (mine is its) == (".lora_" not in name), name
    before = {name: value.clone() for name, value in average.state_dict().items()}
    fill(network)
    ema.update(average, network, 0.5)
    changed = {name for name, value in average.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".lora_B." in name for name in changed)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same_with_checkpointing(dropout):
    gradients = []
    for checkpointing in (False, True):
        network = ccld(gradient_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        LoraOptions(rank=2, dropout=dropout).insert(network)
        fill(network)
        inputs = asked(network)
        torch.manual_seed(3)
        network(**inputs).square().mean().backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.allclose(gradient, gradients[1][name], atol=1e-6), name


# --------------------------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base model, a LoRA run on it, and the same one in two parts; with dropout, EMA, accumulation of two batches."""
    from ldm_lab.config import load
    from ldm_lab.training.runner import run

    here = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(here)
        yaml = make_run(here, images=24, demo={"prompts": "prompts.txt", "every": 4, "sampling": {
            "sampler": {"name": "ddim", "steps": 1}}})  # fmt: skip
        words = ["init_from=runs/base", "lora.rank=2", "lora.dropout=0.1", "trainer.accumulate_grad_batches=2"]
        words += ["checkpoint.every=1", "checkpoint.keep=0", "optim.lr=0.02"]
        run(load(yaml, ["run=base", "trainer.max_steps=1", "demo=null"]))
        run(load(yaml, ["run=whole", *words, "trainer.max_steps=3"]))
        run(load(yaml, ["run=parts", *words, "trainer.max_steps=1", "demo=null"]))
        run(load(yaml, ["run=parts", *words, "trainer.max_steps=3", "resume.checkpoint=last", "demo=null"]))
    return here


def test_resumed_is_bit_for_bit_the_uninterrupted_run(runs):
    whole, parts = (read_pickled(runs / "runs" / run / "last.ckpt") for run in ("whole", "parts"))
    assert whole["state_dict"].keys() == parts["state_dict"].keys()
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, parts)]
    assert len(states[0]) == sum(name.startswith("model.") for name in whole["state_dict"]), "of the additions alone"
    assert all(torch.equal(states[0][i]["exp_avg"], states[1][i]["exp_avg"]) for i in states[0])
    a, b = (read_safetensors(runs / "runs" / run / "lora.safetensors")[0] for run in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_a_run_leaves_is_small_and_tells_what_it_is_of(runs):
    run, base = runs / "runs" / "whole", runs / "runs" / "base"
    state = read_pickled(run / "last.ckpt")["state_dict"]
    assert all(".lora_" in name for name in state) and {n.split(".")[0] for n in state} == {"model", "model_ema"}
    assert not (run / "ema.safetensors").exists()
    assert (run / "lora.safetensors").stat().st_size < (base / "ema.safetensors").stat().st_size / 4
    tensors, told = read_safetensors(run / "lora.safetensors")
    assert any(value.abs().max() > 0 for name, value in tensors.items() if ".lora_B" in name), "it was trained"
    assert told["base"] == "base" and told["step"] == "3" and json.loads(told["config"])["lora"]["rank"] == 2
    model, _ = read_safetensors(base / "ema.safetensors")
    assert told["base_weights"] == fingerprint(model) == fingerprint({k: v.half() for k, v in model.items()})
    assert (run / "demo" / "step=00000001.png").is_file()


def test_another_base_or_rank_is_no_resume(runs, program, monkeypatch):
    monkeypatch.chdir(runs)
    words = ["--config", "tiny.yaml", "run=whole", "resume.checkpoint=last", "lora.dropout=0.1", "demo=null"]
    code, _, err = program("train", *words, "lora.rank=3", "init_from=runs/base")
    assert code == 2 and "lora.rank was 2, the config says 3" in err
    tensors, told = read_safetensors("runs/base/ema.safetensors")
    tensors["net.0.main.0.weight"] += 0.1
    save_file(tensors, "other.safetensors", told)
    code, _, err = program("train", *words, "lora.rank=2", "init_from=other.safetensors")
    assert code == 2 and "was trained on another model than init_from (other.safetensors)" in err
    code, _, err = program("train", "--config", "tiny.yaml", "run=x", "lora.rank=2", "demo=null")
    assert code == 2 and "init_from: lora needs a model that it adds to" in err
    code, _, err = program("train", "--config", "tiny.yaml", "run=x", "lora.rank=0", "init_from=runs/base")
    assert code == 2 and "lora.rank" in err and not (runs / "runs" / "x").exists()
    options = ["lora.rank=2", "init_from=runs/base", "optim.freeze=[unet]", "demo=null"]
    code, _, err = program("train", "--config", "tiny.yaml", "run=x", *options)
    assert code == 2 and "lora.targets chooses" in err


# ------------------------------------------------------------------------------------------------------- in pictures


def pictures(checkpoint, loras=()) -> list[bytes]:
    made = Pipeline.from_checkpoint(checkpoint, ModelOptions(lora=list(loras)))(PROMPT, FEW)
    return [picture.tobytes() for picture in made]


def test_off_or_taken_out_again_the_pictures_are_the_base_model_s(runs, program):
    base, lora = runs / "runs" / "base", runs / "runs" / "whole" / "lora.safetensors"
    plain, with_it = pictures(base), pictures(base, [f"{lora}:0.8"])
    assert with_it != plain
    assert pictures(base, [f"{lora}:0"]) == plain
    out = runs / "merged.safetensors"
    assert program("ldm_lab.__main__", "convert", base, out, "--lora", f"{lora}:0.8")[0] == 0
    assert pictures(out) == with_it
    assert "whole:0.8 (sha256" in read_safetensors(out)[1]["merged_loras"]
    pipeline = Pipeline.from_checkpoint(base)
    with applied_loras(pipeline.model, [f"{lora}:0.5", f"{lora}:0.3"]):
        assert pipeline(PROMPT, FEW)[0].tobytes() != plain[0]
    assert pipeline(PROMPT, FEW)[0].tobytes() == plain[0]
    with pytest.raises(UserError, match="would not be finite"), applied_loras(pipeline.model, [f"{lora}:1e300"]):
        pass
    assert pipeline(PROMPT, FEW)[0].tobytes() == plain[0]


def test_a_picture_tells_its_loras_and_is_made_once_more(runs, program, monkeypatch):
    monkeypatch.chdir(runs)
    words = ["a red circle", "--sampler", "ddim", "--steps", "2", "-n", "1"]
    base = ["--checkpoint", "runs/base", *words]
    assert program("sample", *base, "--lora", "runs/whole:0.8", "--lora", "runs/parts", "--out", "a")[0] == 0
    told = json.loads((runs / "a" / "samples.json").read_text())[0]
    assert told["lora"] == ["whole", "parts"] and told["lora_weight"] == [0.8, 1.0] and len(told["lora_sha256"]) == 2
    code, _, err = program("sample", "--from", "a/00000.png", "--out", "b")
    assert code == 0 and "another model" not in err
    assert (runs / "b" / "00000.png").read_bytes() == (runs / "a" / "00000.png").read_bytes()
    code, _, err = program("sample", "--from", "a/00000.png", "--lora", "runs/whole:0", "--out", "c")
    assert code == 0 and "--lora is another model than the picture's (whole" in err
    assert program("sample", *base, "--out", "d")[0] == 0
    assert (runs / "c" / "00000.png").read_bytes() == (runs / "d" / "00000.png").read_bytes()


@pytest.mark.parametrize(
    ("written", "file", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:.5", r"C:\loras\a.safetensors", 0.5),
        ("hf://me/mine/a.safetensors", "hf://me/mine/a.safetensors", 1.0),
        ("hf://me/mine/a.safetensors:2", "hf://me/mine/a.safetensors", 2.0),
        ("0.5", "0.5", 1.0),
    ],
)
def test_the_weight_stands_after_the_last_colon(written, file, weight):
    assert split_weight(written) == (file, weight)


@pytest.mark.parametrize("written", ["a:nan", "a:inf", ":0.5", ""])
def test_weights_that_are_none_and_files_without_a_name_are_refused(written):
    with pytest.raises(UserError, match="lora: "):
        split_weight(written)


# ------------------------------------------------------------------------------------------------ files of strangers


def rewritten(source, path, change=lambda tensors: None, **told) -> object:
    tensors, metadata = read_safetensors(source)
    change(tensors)
    save_file(tensors, path, {**metadata, **told})
    return path


LAYER = "mapping.0.main.0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{LAYER}.lora_B.weight"), f"{LAYER} has one of its two factors only"),
        (lambda t: t.update({f"{LAYER}.weight": torch.ones(1)}), "is no factor of a LoRA"),
        (lambda t: t.update({f"{LAYER}.lora_B.weight": torch.ones(32, 3)}), "its config says rank 2"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2)}), "which are no layer's"),
        (lambda t: t[f"{LAYER}.lora_A.weight"].fill_(math.nan), "not finite"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2, 9)}), f"does not fit this model: {LAYER} is"),
        (
            lambda t: t.update({f"x.lora_{k}.weight": t[f"{LAYER}.lora_{k}.weight"] + 0 for k in "AB"}),
            "does not fit this model: x is missing here",
        ),
        (lambda t: t.clear(), "without any layer"),
    ],
)
def test_wrong_factors_are_one_line(runs, tmp_path, change, said):
    path = rewritten(runs / "runs/whole/lora.safetensors", tmp_path / "l.safetensors", change)
    with pytest.raises(UserError) as error:
        lora = read_lora(path)
        add_all(ccld().state_dict(), [WeightedLora(lora, 1.0)], NAMES)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "its config is not readable"),
        ("[]", "its config is not readable"),
        ("{}", "its config has no section 'lora'"),
        ('{"lora": {"rank": 0}}', "config.lora.rank"),
        ('{"lora": {"rank": "9"}}', "config.lora.rank"),
        ('{"lora": {"rank": 2, "alpha": -1}}', "config.lora.alpha"),
        ('{"lora": {"rank": 2}, "denoiser": {"name": "os.system"}}', "os.system"),
        ('{"lora": {"rank": 2}, "denoiser": 3}', "config.denoiser"),
    ],
)
def test_wrong_configs_are_one_line(runs, tmp_path, config, said):
    path = rewritten(runs / "runs/whole/lora.safetensors", tmp_path / "l.safetensors", config=config)
    with pytest.raises(UserError) as error:
        read_lora(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none_of_ours_are_named(runs, tmp_path):
    kohya = tmp_path / "kohya.safetensors"
    save_file({"lora_unet_mid.lora_down.weight": torch.ones(1), "lora_unet_mid.lora_up.weight": torch.ones(1)}, kohya)
    with pytest.raises(UserError, match=r"of another program's .kohya's"):
        read_lora(kohya)
    with pytest.raises(UserError, match="no LoRA: it holds a trained model"):
        read_lora(runs / "runs" / "base" / "ema.safetensors")
    with pytest.raises(UserError, match=r"a run of LoRA writes lora.safetensors beside it"):
        read_lora(runs / "runs" / "whole" / "last.ckpt")
    with pytest.raises(UserError, match=r"no such file .lora."):
        read_lora(tmp_path / "nothing.safetensors")


def test_another_base_is_said_and_another_kind_of_model_refused(runs, tmp_path, caplog):
    lora = runs / "runs/whole/lora.safetensors"
    note_own(tmp_path)
    other = rewritten(
        runs / "runs/base/ema.safetensors", tmp_path / "o.safetensors", lambda t: t["net.0.main.0.bias"].add_(1)
    )
    pictures(other, [lora])
    assert "was trained on base (sha256" in caplog.text and "these are other weights" in caplog.text
    with pytest.raises(UserError, match=r"is for the denoiser 'ccld_unet', and this model has 'glide_unet'"):
        add_all({}, [WeightedLora(read_lora(lora), 1.0)], {"denoiser": "glide_unet"})


def test_a_lora_is_no_model(runs, program, monkeypatch):
    monkeypatch.chdir(runs)
    for name, said in [
        ("runs/whole", "a run of LoRA, which is added to its base model"),
        ("runs/whole/lora.safetensors", "a LoRA, not a model; it is added to its base: --checkpoint base --lora"),
        ("runs/whole/last.ckpt", "a checkpoint of a run of LoRA, without its base model"),
    ]:
        code, _, err = program("sample", "--checkpoint", name, "a red circle")
        assert code == 2 and said in err, err
    code, out, _ = program("ldm_lab.__main__", "inspect", "runs/whole")
    assert code == 0 and "a LoRA of ldm_lab's" in out and "base: base" in out and "lora: {rank: 2" in out
    code, _, err = program("ldm_lab.__main__", "convert", "runs/whole/lora.safetensors", "x.safetensors")
    assert code == 2 and "takes as it is" in err
    code, _, err = program(
        "ldm_lab.__main__", "convert", "autoencoder.safetensors", "x.safetensors", "--lora", "runs/whole"
    )
    assert code == 2 and "--lora: is merged into models" in err


def test_the_whole_network_has_to_come_from_the_base(runs, program, monkeypatch):
    monkeypatch.chdir(runs)
    rewritten("runs/base/ema.safetensors", "short.safetensors", lambda t: t.pop("net.0.main.0.bias"))
    words = ["lora.rank=2", "init_from=short.safetensors", "demo=null"]
    code, _, err = program("train", "--config", "tiny.yaml", "run=y", *words)
    assert code == 2 and "lora: needs all of the network from init_from" in err
