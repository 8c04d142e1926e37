"""Files of weights that people really have: read right whatever is around the tensors, or refused in one line."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save, save_file
from torch import Tensor

from ldm_lab.autoencoders.kl_f8 import KLAutoencoder
from ldm_lab.checkpoints.importer import detect_format, say_once
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.errors import UserError

STATE = {
    name: value
    for name, value in KLAutoencoder(ch=32, ch_mult=[1, 2], num_res_blocks=1).state_dict().items()
    if not name.startswith("latent_")
}
ITEMS = list(STATE.items())
HALF = len(ITEMS) // 2


def loaded(path) -> dict[str, Tensor]:
    say_once.cache_clear()
    state = load_part("autoencoder", {"name": "kl_f8", "weights": str(path)}).state_dict()
    return {name: value for name, value in state.items() if not name.startswith("latent_")}


def assert_read(path, expected: dict[str, Tensor] = STATE) -> None:
    found = loaded(path)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name].float()) for name in expected)


def refused(path) -> str:
    with pytest.raises(UserError) as raised:
        loaded(path)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    return message


# --------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"checkpoint": {"model": {"state_dict": state}}, "epoch": 3},
        lambda state: {"checkpoint": {"state_dict": state, "optimizer": {"state": {}}}},
        lambda state: {"params": {"model": state}, "args": None},
        lambda state: {"vae": state, "optimizer_state": {"exp_avg": torch.zeros(3)}, "step": 1},
        lambda state: {"ckpt": {f"_fsdp_wrapped_module.{name}": value for name, value in state.items()}},
        lambda state: {name.replace("mid.", "mid._checkpoint_wrapped_module."): value for name, value in state.items()},
        lambda state: {f"_forward_module.module.{name}": value for name, value in state.items()},
        lambda state: {name: torch.nn.Parameter(value) for name, value in state.items()},
    ],
)
def test_what_is_around_a_state_dict(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "a.pt")
    assert_read(tmp_path / "a.pt")


def test_an_attribute_that_all_names_begin_with(tmp_path, capsys):
    state = {f"net.{name}": value for name, value in STATE.items()}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.ckpt", "a.safetensors"):
        assert_read(tmp_path / name)
        assert "'net.', which all names in it begin with, is left out" in capsys.readouterr().err


def test_two_networks_under_names_of_their_own_are_not_chosen_from(tmp_path):
    torch.save({"vae": STATE, "vae2": STATE}, tmp_path / "a.pt")
    assert "no tensors of a network in it: it holds vae, vae2" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize("content", ["state", "wrapped"])
def test_an_optimizer_alone(tmp_path, content):
    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    torch.save(state if content == "state" else {"optimizer_state_dict": state, "epoch": 1}, tmp_path / "a.pt")
    expected = "the state of an optimizer" if content == "state" else "it holds optimizer_state_dict, epoch"
    assert expected in refused(tmp_path / "a.pt")


# ---------------------------------------------------------------------------------------------------------- folders


def test_folders_of_transformers_accelerate_and_of_one_file(tmp_path, capsys):
    for name in ("accelerate", "transformers", "sharded", "one"):
        (tmp_path / name).mkdir()
    save_file(STATE, tmp_path / "accelerate/model.safetensors")
    torch.save({}, tmp_path / "accelerate/optimizer.bin")
    torch.save(STATE, tmp_path / "transformers/pytorch_model.bin")
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, items in zip(names, (ITEMS[:HALF], ITEMS[HALF:])):
        torch.save(dict(items), tmp_path / "sharded" / name)
    places = {name: names[i >= HALF] for i, (name, _) in enumerate(ITEMS)}
    index = tmp_path / "sharded/pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file(STATE, tmp_path / "one/my_vae.safetensors")
    (tmp_path / "one/README.md").write_text("A VAE.")
    for name in ("accelerate", "transformers", "sharded", "one"):
        assert_read(tmp_path / name)
    assert "my_vae.safetensors is taken, the one file of weights in it" in capsys.readouterr().err
    save_file(STATE, tmp_path / "one/other.safetensors")
    assert "2 files of weights in it (my_vae.safetensors, other.safetensors): name one" in refused(tmp_path / "one")
    (tmp_path / "sharded" / names[1]).unlink()
    assert f"{names[1]} of 2 files that it names is missing" in refused(tmp_path / "sharded")
    (tmp_path / "empty").mkdir()
    assert "has a file such as" in refused(tmp_path / "empty")


def test_folders_of_deepspeed(tmp_path, capsys):
    step = tmp_path / "run/global_step10"
    step.mkdir(parents=True)
    (tmp_path / "run/latest").write_text("global_step10")
    half = {name: value.half() for name, value in STATE.items()}
    torch.save({"module": half, "optimizer": None, "ds_version": "0.14"}, step / "mp_rank_00_model_states.pt")
    parts = step / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"zero_stage": 2}}, parts)
    assert_read(tmp_path / "run", half)
    assert "the weights as DeepSpeed trained them are taken" in capsys.readouterr().err
    assert_read(step, half)
    assert "the state of DeepSpeed's optimizer alone; the weights are in" in refused(parts)
    (step / "mp_rank_00_model_states.pt").unlink()
    torch.save({"module": {}}, step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for path in (tmp_path / "run", step, step / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        assert f"(ZeRO 3). DeepSpeed's own `python zero_to_fp32.py {tmp_path}/run OUT`" in refused(path)


def test_a_folder_of_fsdp(tmp_path):
    dcp.save({"a": torch.zeros(3)}, checkpoint_id=str(tmp_path / "fsdp"), no_dist=True)
    command = f"`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {tmp_path}/fsdp OUT.pt`"
    assert command in refused(tmp_path / "fsdp")
    assert "name its folder" in refused(next((tmp_path / "fsdp").glob("*.distcp")))


def test_links_of_a_cache_of_the_hub(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    save_file(STATE, tmp_path / "blobs/aaaa")
    (tmp_path / "snapshots/vae.safetensors").symlink_to("../blobs/aaaa")
    (tmp_path / "snapshots/gone.safetensors").symlink_to("../blobs/bbbb")
    assert_read(tmp_path / "snapshots/vae.safetensors")
    assert "a link to ../blobs/bbbb, which is not there" in refused(tmp_path / "snapshots/gone.safetensors")


# ---------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_types_of_weights(tmp_path, capsys, dtype):
    state = {name: value.to(dtype) for name, value in STATE.items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert_read(tmp_path / name, state)
        assert ("rounded to 8 bits" in capsys.readouterr().err) is (dtype == torch.float8_e4m3fn)


def test_tensors_that_share_memory_or_lie_in_another_order(tmp_path):
    whole = torch.cat([value.flatten() for value in STATE.values()])
    views, place = {}, 0
    for name, value in STATE.items():
        views[name] = whole[place : place + value.numel()].view(value.shape)
        place += value.numel()
    torch.save(views, tmp_path / "shared.pt")
    turned = {
        name: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value for name, value in STATE.items()
    }
    torch.save(turned, tmp_path / "turned.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("shared.pt", "turned.pt", "old.pt"):
        assert_read(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.int8), "is int8: weights that were quantized"),
        (lambda value: value.to("meta"), "is without its values"),
        (lambda value: value.to_sparse(), "is quantized, sparse or complex"),
        (lambda value: value.to(torch.complex64), "is quantized, sparse or complex"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, change, message):
    torch.save({name: change(value) for name, value in STATE.items()}, tmp_path / "a.pt")
    assert message in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("header", "size", "what"),
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999]}}, 16, "invalid"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, 8, "invalid"),
        ({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in "ab"}, 16, "invalid"),
        ({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}, 16, "not a readable"),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, header, size, what):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    message = refused(tmp_path / "a.safetensors")
    assert "not a readable safetensors file, truncated or damaged" in message and what in message


def test_a_safetensors_file_that_was_cut_off(tmp_path):
    for size in (1, 8, 100, 5000):
        (tmp_path / "a.safetensors").write_bytes(save(STATE)[:size])
        message = refused(tmp_path / "a.safetensors")
        assert "not a readable safetensors file, truncated" in message or size == 1


# ------------------------------------------------------------------------------------------- what is no network here


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (
            ["lora_unet_mid_proj.lora_down.weight", "lora_unet_mid_proj.lora_up.weight", "lora_unet_mid_proj.alpha"],
            "LoRA",
        ),
        (["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"], "LoRA"),
        (["unet.mid.processor.to_q_lora.down.weight", "unet.mid.processor.to_q_lora.up.weight"], "LoRA"),
        (["lycoris_a.hada_w1_a", "lycoris_a.hada_w1_b"], "LoRA"),
        (["blocks.0.lokr_w1"], "LoRA"),
        (["*"], "textual inversion"),
        (["<cat-toy>"], "textual inversion"),
        (["emb_params"], "textual inversion"),
        (["clip_l", "clip_g"], "textual inversion"),
        (["encoder.weight", "encoder.weight.absmax", "encoder.weight.quant_state.bitsandbytes__nf4"], "quantized"),
        ([*STATE, "encoder.conv_in.scale_weight"], "quantized"),
        (["model.layers.0.qweight", "model.layers.0.qzeros"], "quantized"),
    ],
)
def test_files_beside_networks_are_named(tmp_path, names, kind):
    save_file({name: torch.zeros(2, 4) for name in names}, tmp_path / "a.safetensors")
    assert "no autoencoder in it: it holds" in refused(tmp_path / "a.safetensors")
    assert kind in refused(tmp_path / "a.safetensors")
    assert kind in detect_format(tmp_path / "a.safetensors").title


def test_a_textual_inversion_of_the_web_ui(tmp_path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}}, tmp_path / "a.pt")
    assert "a textual inversion" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.onnx", b"\x08\x08\x12\x07pytorch" + bytes(range(256)), "an ONNX model"),
        ("a.bin", b"\x08\x07\x12\x07pytorch" + bytes(range(256)), "an ONNX model"),
        ("a.engine", b"ftrt" + bytes(range(256)), "a TensorRT engine"),
        ("a.plan", bytes(range(1, 256)), "a TensorRT engine"),
        ("a.safetensors", b"GGUF\3\0\0\0" + bytes(300), "a GGUF file"),
        ("a.bin", b"lmgg" + bytes(range(256)), "a GGML file"),
        ("a.bin", b"\x1c\0\0\0TFL3" + bytes(range(256)), "TensorFlow Lite"),
        ("a.msgpack", b"\x81\xa6params\x81" + bytes(range(128, 256)), "Flax's weights"),
        ("a.mlmodel", b"\x08\4\x12" + bytes(range(256)), "a Core ML model"),
        ("a.xml", b'<?xml version="1.0"?>\n<net name="a" version="11">', "an OpenVINO model"),
        ("a.pt", b"\x1f\x8b\x08" + bytes(100), "gunzip"),
        ("a.pt", b"BZh9" + bytes(range(100)), "bunzip2"),
        ("a.pt", b"\xfd7zXZ\0" + bytes(100), "unxz"),
        ("a.pt", bytes(257) + b"ustar\0" + bytes(400), "a tar archive"),
        ("a.ckpt", bytes(9000), "begins with zeros alone"),
        ("a.ckpt", b"", "the file is empty"),
    ],
)
def test_files_of_other_programs_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("index.html", "a saved web site"),
        ("model.weights.h5", "a Keras 3 archive"),
        ("encoder.weight.npy", "an archive of NumPy's arrays"),
        ("exported/data/weights/model_weights_config.json", "a program of torch.export's"),
        ("[Content_Types].xml", "a document of an office program"),
    ],
)
def test_zips_of_other_things_are_named(tmp_path, member, message):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(member, b"x")
    assert message in refused(tmp_path / "a.zip")


def test_pickles_of_other_things(tmp_path):
    torch.save(torch.nn.Linear(3, 3), tmp_path / "module.pt")
    message = refused(tmp_path / "module.pt")
    assert "(GLOBAL torch.nn.modules.linear.Linear); save the state_dict of the module" in message
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({name: np.zeros(3) for name in STATE}))
    assert "tensors of an unknown model" in refused(tmp_path / "arrays.pkl")
    (tmp_path / "torch.pkl").write_bytes(pickle.dumps({"a": torch.zeros(3)}))
    assert "refused: it asks for torch" in refused(tmp_path / "torch.pkl")


def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(3, 3))), str(tmp_path / "a.pt"))
    assert "in a TorchScript archive, whose program is not run" in refused(tmp_path / "a.pt")
