"""The reader of CLOOB pickles: what released files and their kin hold is read, and nothing that a file names runs."""

import contextlib
import functools
import os
import pickle
import pickletools
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_lab.checkpoints import safe_pickle
from ldm_lab.checkpoints.formats.cloob_pickle import CLOOBPickle
from ldm_lab.checkpoints.opened import OpenedFile
from ldm_lab.checkpoints.parts import load_part, read_part
from ldm_lab.checkpoints.safe_pickle import load_arrays
from ldm_lab.conditioners.cloob import CLOOB
from ldm_lab.errors import UserError

RECORDED = Path(__file__).parent / "data" / "golden" / "cloob_tiny.pkl"
SIZES = {
    "embed_dim": 6, "image_size": 8, "patch_size": 4, "image_width": 8, "image_layers": 2, "text_size": 5,
    "vocab_size": 20, "text_width": 4, "text_layers": 1,
}  # fmt: skip


def tree() -> tuple[CLOOB, dict]:
    """Return a small model, and the same in the layout of the released pickles."""
    torch.manual_seed(0)
    model = CLOOB(**SIZES, image_heads=2, text_heads=2)
    towers = ({}, {})
    for name, value in model.state_dict().items():
        tower, *path, leaf = name.split(".")
        image = tower == "image_encoder"
        module = "/".join([{"image_encoder": "vi_t_image_encoder"}.get(tower, tower), *path])
        module = module.replace("layers/", "layer_").replace("attn/norm", "self_attention/layer_norm")
        for short in ("query", "key", "value"):
            module = module.replace(f"attn/{short}", f"self_attention/multi_head_attention/{short}")
        module = module.replace("attn/out", "self_attention/multi_head_attention/linear").replace(
            "ff/", "feed_forward/"
        )
        module = module.replace("feed_forward/norm", "feed_forward/layer_norm")
        array = value.numpy()
        if module.endswith("layer_norm"):
            leaf = {"weight": "scale", "bias": "offset"}[leaf]
        elif leaf != "class_embed":
            leaf = {"weight": "w", "bias": "b"}[leaf]
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        elif leaf == "w" and not module.endswith("embed"):
            array = array.T
        if module == "text_encoder/embed":
            leaf = "embeddings"
        towers[0 if image else 1].setdefault(module, {})[leaf] = array
    return model, {"params": towers, "epoch": 3}


def read(content: object, folder: Path, protocol: int = 4):
    path = folder / "cloob.pkl"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return CLOOBPickle().read(OpenedFile(path, {}, pickled=load_arrays(path)), "conditioner")


def epoch(path: Path):
    return CLOOBPickle().facts(OpenedFile(path, {}, pickled=load_arrays(path)))["epoch"]


def assert_same(state: dict, model: CLOOB) -> None:
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# ---------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol(tmp_path, protocol):
    model, content = tree()
    part = read(content, tmp_path, protocol)
    assert_same(part.state, model)
    assert part.options == SIZES
    assert epoch(tmp_path / "cloob.pkl") == 3


def test_the_original_file():
    state, config = read_part(RECORDED, "conditioner", "cloob")
    assert config["image_width"] == 24
    assert all(value.dtype == torch.float32 for value in state.values())
    assert isinstance(epoch(RECORDED), int)


def test_loaded_by_its_config_section(tmp_path):
    model, content = tree()
    read(content, tmp_path)
    section = {"name": "cloob", "weights": str(tmp_path / "cloob.pkl"), "image_heads": 2, "text_heads": 2}
    assert_same(load_part("conditioner", section).state_dict(), model)
    with pytest.raises(UserError, match="image_heads: has to be given"):
        load_part("conditioner", {"name": "cloob", "weights": str(tmp_path / "cloob.pkl")})


@pytest.mark.parametrize("protocol", [4, 5])
def test_other_ways_to_write_arrays(tmp_path, protocol):
    model, content = tree()
    for parameters in (*content["params"][0].values(), *content["params"][1].values()):
        for i, (name, array) in enumerate(parameters.items()):
            shuffled = np.ascontiguousarray(np.moveaxis(array, 0, -1))
            others = [array.astype(">f4"), np.asfortranarray(array), array.astype("f8"), np.moveaxis(shuffled, -1, 0)]
            parameters[name] = others[(i + array.ndim) % 4]
    content["epoch"] = np.float32(3)
    state, _ = read(content, tmp_path, protocol)
    assert_same(state, model)
    assert epoch(tmp_path / "cloob.pkl") is None
    content["epoch"] = np.int64(7)
    read(content, tmp_path)
    assert epoch(tmp_path / "cloob.pkl") == 7


def written_elsewhere(monkeypatch: pytest.MonkeyPatch, module: str, name: str, value: object) -> None:
    """Make pickle find `value` under a name of a package that is not here."""
    packages = module.split(".")
    for depth in range(len(packages)):
        package = ".".join(packages[: depth + 1])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    setattr(sys.modules[module], name, value)
    value.__module__, value.__qualname__ = module, name


def test_mappings_of_haiku(tmp_path, monkeypatch):
    class FlatMapping(dict):
        def __reduce__(self):
            return FlatMapping, (dict(self),)

    model, content = tree()
    content["params"] = tuple(FlatMapping(tower) for tower in content["params"])
    with monkeypatch.context() as patch:
        written_elsewhere(patch, "haiku._src.data_structures", "FlatMapping", FlatMapping)
        written = pickle.dumps(content)
    assert_same(read(written, tmp_path)[0], model)


@pytest.mark.parametrize(
    ("module", "name"),
    [("jax._src.device_array", "reconstruct_device_array"), ("jax._src.array", "_reconstruct_array")],
)
def test_arrays_of_jax(tmp_path, monkeypatch, module, name):
    def reconstruct(*arguments):
        raise AssertionError("only its name is needed")

    class Array:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values

        def __reduce__(self):
            return reconstruct, (*self.values.__reduce__(), {"weak_type": False, "named_shape": {}})

    model, content = tree()
    content["params"] = tuple(
        {path: {leaf: Array(array) for leaf, array in parameters.items()} for path, parameters in tower.items()}
        for tower in content["params"]
    )
    with monkeypatch.context() as patch:
        written_elsewhere(patch, module, name, reconstruct)
        written = pickle.dumps(content)
    assert_same(read(written, tmp_path)[0], model)


# ------------------------------------------------------------------------------------------------ what is not run


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class ArrayWithState:
    """Pickles as an array whose state is something else."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        function, arguments, _ = np.zeros(1).__reduce__()
        return function, arguments, self.state


def text(value: str) -> bytes:
    """Return the opcode that pushes a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def hostile(marker: Path) -> dict[str, bytes]:
    """Return pickles that create the marker when Python's own means load them."""
    code, shell = f"open({str(marker)!r}, 'w').close()", f"touch {marker}"
    inner = pickle.dumps(Call(os.system, shell))
    return {
        "os.system": inner,
        "eval": pickle.dumps(Call(eval, code)),
        "exec": pickle.dumps(Call(exec, code)),
        "protocol 0": pickle.dumps(Call(os.system, shell), 0),
        "getattr of an import": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V"
        + shell.encode()
        + b"\ntR.",
        "partial": pickle.dumps(Call(functools.partial(os.system, shell))),
        "deep inside": pickle.dumps({"params": ({"a": {"b": [(Call(eval, code),)]}}, {}), "epoch": 1}),
        "a dict's key": pickle.dumps({"params": ({}, {}), Call(eval, f"{code} or 1"): 1}),
        "an array's state": pickle.dumps(
            ArrayWithState((1, (1,), Call(eval, f"{code} or np.dtype('f8')"), False, b""))
        ),
        "an array of objects": pickle.dumps(np.array([Call(eval, code)], dtype=object)),
        "a pickle in a pickle": pickle.dumps(Call(pickle.loads, inner)),
        "opcode INST": b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        "opcode OBJ": b"(cos\nsystem\nS'" + shell.encode() + b"'\no.",
        "opcode STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(shell) + b"\x85R.",
    }


@pytest.mark.parametrize("kind", hostile(Path("/nowhere")))
def test_nothing_that_a_pickle_names_is_run(tmp_path, kind):
    marker = tmp_path / "marker"
    content = hostile(marker)[kind]
    with pytest.raises(UserError, match=r"cloob\.pkl: (refused: it asks for|not a readable pickle)") as raised:
        read(content, tmp_path)
    assert not marker.exists()
    assert "\n" not in str(raised.value)
    with contextlib.suppress(Exception):  # what it returns does not matter, nor what goes wrong after the deed
        pickle.loads(content)
    assert marker.exists(), "this pickle was no danger in the first place"


NDARRAY, RECONSTRUCT = b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nload\nX\x01\0\0\0x\x85R.",
        b"cnumpy.core.multiarray\nscalar.__self__\n.",
        b"\x80\x04" + text("numpy") + text("ndarray.__subclasses__") + b"\x93.",
        b"cbuiltins\ngetattr\n.",
        b"ccopyreg\n_reconstructor\n.",
        b"c__main__\nx\n.",
        b"cldm_lab.checkpoints.safe_pickle\nload_arrays\n.",
        NDARRAY + b")R.",  # called, which it is not meant to be
        NDARRAY + b")\x81.",  # as a class to be instantiated
        NDARRAY + b"}X\x04\0\0\0makeNsb.",  # given attributes
        RECONSTRUCT + b"N}X\x04\0\0\0makeNs\x86b.",
        RECONSTRUCT + b"NR" + b"(K\x01K\x01\x85NI00\nC\x00tb.",  # an array without a type
        b"\x82\x01.",  # an extension code
        b"Pid\n.",  # a persistent id
        b"cnumpy\ndtype\nX\x01\0\0\0O\x85R.",  # a type of objects
        b"cnumpy\ndtype\nX\x03\0\0\0f4,\x85R.",
        b"c_codecs\nencode\nX\x01\0\0\0xX\x05\0\0\0rot13\x86R.",
        b"}r\xff\xff\xff\x7f.",  # a memo of 32 GB
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of as many bytes as there are numbers
        b"(" * 100 + b".",
        b"",
        b"\x80\x04",
        b"not a pickle at all",
        b"\x80\x63N.",
        b"N.",
        b"].",
        pickle.dumps({"params": ({}, {})}),
        pickle.dumps({"params": ({"text_encoder/embed": {"embeddings": "text"}}, {})}),
        pickle.dumps({"params": ({"vi_t_image_encoder/embed": {"w": np.zeros(3)}}, {})}),
        pickle.dumps({"params": ({"vi_t_image_encoder/unheard": {"of": np.zeros(3)}}, {})}),
        pickle.dumps({"params": ({"vi_t_image_encoder": np.zeros(3)}, {})}),
        pickle.dumps({"params": "ab"}),
    ],
)
def test_other_things_are_one_line_errors(tmp_path, content):
    with pytest.raises(UserError, match=r"cloob\.pkl: ") as raised:
        read(content, tmp_path)
    assert "\n" not in str(raised.value)


def test_the_stand_ins_cannot_be_changed(tmp_path):
    """A pickle that changed them would change what the next one is read with."""
    before = {key: named.make for key, named in safe_pickle.ARRAYS.items()}
    for content in (NDARRAY + b"}X\x04\0\0\0makeNsb.", NDARRAY + b"N}X\x04\0\0\0makeNs\x86b."):
        with pytest.raises(UserError):
            read(content, tmp_path)
    assert {key: named.make for key, named in safe_pickle.ARRAYS.items()} == before


def test_a_loop_in_a_pickle(tmp_path):
    loop: list = []
    loop.append(loop)
    with pytest.raises(UserError, match="not a readable pickle"):
        read(pickle.dumps({"params": loop}), tmp_path)


def test_damaged_files(tmp_path):
    """Whatever byte is wrong: the parameters are still read, or there is one line of error."""
    _, content = tree()
    whole = pickle.dumps(content)
    rng = random.Random(0)
    for length in rng.sample(range(len(whole)), 60):
        with pytest.raises(UserError, match=r"cloob\.pkl: "):
            read(whole[:length], tmp_path)
    structure = [i for opcode, _, i in pickletools.genops(whole) if opcode.name != "SHORT_BINBYTES"]
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[(rng.choice(structure) + rng.randrange(3)) % len(damaged)] ^= 1 << rng.randrange(8)
        with contextlib.suppress(UserError):
            read(bytes(damaged), tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_arrays(tmp_path / "cloob.pkl")
    with pytest.raises(UserError, match="not a file"):
        load_arrays(tmp_path)
