"""Files of features that are damaged or foreign: one line for a file that the user names; our own are made anew."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ldm_lab.data.counts import Counts
from ldm_lab.data.jobs import Finished, PassOptions
from ldm_lab.errors import UserError
from ldm_lab.evaluation.feature_files import (
    FEATURES,
    PictureRows,
    check_tensors,
    differences,
    read_part,
    read_rows,
    write_part,
    write_rows,
)
from ldm_lab.evaluation.metrics import CLIP_SCORE
from ldm_lab.evaluation.real_images import real_rows

NETWORK = SimpleNamespace(space="embedding", width=3, identity={"name": "n"})
EMBEDDING = FEATURES + "embedding"
FACTS = {"embedding": json.dumps({"name": "n"}), "data": "x"}


def rows(count: int = 4) -> PictureRows:
    values = {EMBEDDING: torch.rand(count, 3), CLIP_SCORE: torch.full((count,), torch.nan)}
    return PictureRows(values, ["", "é", "a\nb", "c"][:count])


def written(path: Path, change=lambda tensors, metadata: None) -> Path:
    """Write a file of features, changed before it is written."""
    from safetensors import safe_open

    write_rows(path, rows(), FACTS)
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file({name: its.contiguous() for name, its in tensors.items()}, path, metadata)
    return path


def test_facts_are_compared_as_they_are_and_printed_in_one_line(tmp_path):
    write_rows(tmp_path / "f.safetensors", rows(), {"options": "a  b\nc"})
    there = read_rows(tmp_path / "f.safetensors")[1]
    assert not differences(there, {"options": "a  b\nc"})
    assert differences(there, {"options": "d  e"}) == ["options (a b c there, d e here)"]


DAMAGE = {
    "no-facts": lambda t, m: m.pop("features"),
    "facts-of-a-list": lambda t, m: m.update(features="[1]"),
    "facts-no-json": lambda t, m: m.update(features="{" * 5000),
    "facts-with-lines": lambda t, m: m.update(features=json.dumps({"embedding": "a\nb\n" * 99})),
    "other-role": lambda t, m: m.update(role="model"),
    "no-features": lambda t, m: t.pop(EMBEDDING),
    "narrow": lambda t, m: t.update({EMBEDDING: t[EMBEDDING][:, :2]}),
    "whole-numbers": lambda t, m: t.update({EMBEDDING: t[EMBEDDING].long()}),
    "half": lambda t, m: t.update({EMBEDDING: t[EMBEDDING].half()}),
    "three-axes": lambda t, m: t.update({EMBEDDING: t[EMBEDDING][..., None]}),
    "one-axis": lambda t, m: t.update({EMBEDDING: t[EMBEDDING][:, 0]}),
    "0-dim": lambda t, m: t.update({EMBEDDING: torch.tensor(1.0)}),
    "too-few": lambda t, m: t.update({EMBEDDING: t[EMBEDDING][:2]}),
    "none": lambda t, m: t.update({EMBEDDING: t[EMBEDDING][:0], CLIP_SCORE: t[CLIP_SCORE][:0],
                                   "text": t["text"][:0], "text_ends": t["text_ends"][:0]}),
    "nan": lambda t, m: t[EMBEDDING][1].fill_(torch.nan),
    "infinity": lambda t, m: t[EMBEDDING][1, 1].fill_(torch.inf),
    "0-dim-score": lambda t, m: t.update({CLIP_SCORE: torch.tensor(1.0)}),
    "whole-score": lambda t, m: t.update({CLIP_SCORE: torch.zeros(4, dtype=torch.int32)}),
    "no-captions": lambda t, m: t.pop("text"),
    "no-ends": lambda t, m: t.pop("text_ends"),
    "falling-ends": lambda t, m: t.update(text_ends=t["text_ends"].flip(0)),
    "negative-ends": lambda t, m: t["text_ends"][0].fill_(-5),
    "far-ends": lambda t, m: t["text_ends"].fill_(2**62),
    "near-ends": lambda t, m: t["text_ends"].fill_(1),
    "overflowing-ends": lambda t, m: t["text_ends"].copy_(torch.tensor([2**63 - 1, -(2**63), 3, 6])),
    "float-ends": lambda t, m: t.update(text_ends=t["text_ends"].float()),
    "0-dim-ends": lambda t, m: t.update(text_ends=torch.tensor(3)),
    "text-of-numbers": lambda t, m: t.update(text=t["text"].long()),
    "text-no-utf8": lambda t, m: t["text"].fill_(255),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_one_line(tmp_path, kind):
    path = written(tmp_path / "f.safetensors", DAMAGE[kind])
    with pytest.raises(UserError) as caught:
        real_rows(None, [NETWORK], path, False, PassOptions())
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 20, (2**62).to_bytes(8, "little") + b"{}", b"\x10" + b"\0" * 7 + b'{"a":{"dtype":"F'],
    ids=["empty", "zeros", "huge-header", "cut-header"],
)
def test_what_is_no_safetensors_file_is_one_line(tmp_path, content):
    (tmp_path / "f.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_rows(tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path)


def test_a_header_that_lies_about_sizes_is_one_line(tmp_path):
    whole = written(tmp_path / "f.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    for change in (
        {"shape": [2**40, 3]}, {"shape": [-4, 3]}, {"shape": [0, 2**60]}, {"dtype": "F4"}, {"dtype": "F8_E8M0"},
        {"data_offsets": [0, 2**50]},
    ):  # fmt: skip
        told = json.dumps({**header, EMBEDDING: {**header[EMBEDDING], **change}}).encode()
        (tmp_path / "g.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + whole[8 + length :])
        with pytest.raises(UserError, match="safetensors"):
            read_rows(tmp_path / "g.safetensors")


def test_an_undamaged_file_is_read(tmp_path):
    path = written(tmp_path / "f.safetensors")
    found, unusable = real_rows(None, [NETWORK], path, False, PassOptions())
    assert found.texts == ["", "é", "a\nb", "c"] and unusable is None and found.features("embedding").shape == (4, 3)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if not kind.startswith("facts")])
def test_a_damaged_part_of_a_pass_counts_as_not_there(tmp_path, kind, capsys):
    wanted = {EMBEDDING: (3,), CLIP_SCORE: ()}
    done = Finished({"embedding": "x"}, "4 from 0 on", Counts(4))
    path = tmp_path / "00000.safetensors"
    write_part(path, rows(), done)
    assert read_part(path, wanted) == done and not capsys.readouterr().out
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    DAMAGE[kind](tensors, metadata)
    save_file({name: its.contiguous() for name, its in tensors.items()}, path, metadata)
    if kind in ("none", "nan", "infinity"):  # an item without a usable image, or of pictures that are not finite
        assert read_part(path, wanted) == done
        return
    assert read_part(path, wanted) is None
    if kind != "no-facts":
        assert "damaged; made anew" in capsys.readouterr().out or kind == "other-role"


def test_parts_of_different_kinds_are_one_line():
    with pytest.raises(UserError, match="parts of different kinds"):
        PictureRows.joined([rows(), PictureRows({EMBEDDING: torch.zeros(1, 2), CLIP_SCORE: torch.zeros(1)}, ["a"])])
    assert len(PictureRows.joined([rows(), PictureRows(), rows(2)])) == 6
    with pytest.raises(UserError, match="there is no"):
        check_tensors(Path("f"), PictureRows({}, ["a"]), {EMBEDDING: (3,)})
