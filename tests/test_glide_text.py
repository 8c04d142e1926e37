"""GLIDE's tokens beyond parity: vocabularies of any size, cutting, the empty text, no download at import."""

import logging

import pytest
import torch
from tiny import run_program

from ldm_lab.batch import Batch
from ldm_lab.conditioners import glide_text
from ldm_lab.conditioners.glide_text import GlideText, gpt2_encoding, gpt2_ranks
from ldm_lab.conditions import TokenIds
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.pretrained.catalogue import catalogue

MERGES = ["#version: 0.2", "Ġ a", "r e", "re d", "Ġ red", ""]  # as in vocab.bpe; Ġ is the letter of a space


@pytest.fixture
def merges(tmp_path, monkeypatch):
    """A vocabulary of four merges in the place of GPT-2's."""
    path = tmp_path / "vocab.bpe"
    path.write_text("\n".join(MERGES), encoding="utf-8")
    monkeypatch.setattr(glide_text, "fetch", lambda name, folder=None: path)
    gpt2_encoding.cache_clear()
    yield
    gpt2_encoding.cache_clear()


def small(**options) -> GlideText:
    return GlideText(**{"vocabulary": "clip", "vocab_size": 600, "text_size": 12, **options})


def test_ranks_are_bytes_then_merges():
    ranks = gpt2_ranks(MERGES)
    assert len(ranks) == 256 + 4
    assert ranks[b"!"] == 0 and ranks[b"a"] == 64 and ranks[b" "] == 220
    assert [ranks[piece] for piece in (b" a", b"re", b"red", b" red")] == [256, 257, 258, 259]


def test_gpt2_tokens_of_a_small_vocabulary(merges):
    conditioner = GlideText(vocab_size=261, text_size=5)
    made = conditioner.from_prompts(["A RED", "", " "], [])
    assert made["token_ids"].tolist() == [[64, 259, 260, 260, 260], [260] * 5, [220, 260, 260, 260, 260]]
    assert made["token_ids_mask"].tolist() == [
        [True, True, False, False, False],
        [False] * 5,
        [True, False, False, False, False],
    ]
    assert conditioner.spec == {"token_ids": TokenIds(5, 261)}
    fewer = GlideText(vocab_size=258, text_size=5)
    assert fewer.from_prompts(["a red"], [])["token_ids"].tolist() == [[64, 220, 81, 68, 67]], (
        "only ' a' is left of them"
    )
    assert fewer.encode("a a") == [64, 256]


def test_the_clip_vocabulary_needs_no_download(monkeypatch):
    monkeypatch.setattr(glide_text, "fetch", lambda name, folder=None: pytest.fail("a download"))
    conditioner = small()
    made = conditioner.from_batch(Batch(["a", "b"], ["a red circle", ""]))
    assert made["token_ids"].shape == made["token_ids_mask"].shape == (2, 12)
    assert 3 <= int(made["token_ids_mask"][0].sum()) <= 12 and not made["token_ids_mask"][1].any()
    assert (made["token_ids"] < 600).all() and (made["token_ids"][~made["token_ids_mask"]] == 599).all()
    ids = made["token_ids"][0][made["token_ids_mask"][0]].tolist()
    assert glide_text.CLIPEncoding.of_size(600).decode(ids) == "a red circle"
    assert GlideText(vocabulary="clip").vocab_size == 49408
    written_out = small().from_prompts(["<|startoftext|><|endoftext|>"], [])["token_ids"]
    assert (written_out < 600).all()


def test_null_is_the_empty_text_and_leaves_the_rest():
    conditioner = small()
    cond = {**conditioner.from_prompts(["a red circle", "a ring"], []), "low_res": torch.ones(2, 3, 4, 4)}
    null, empty = conditioner.null(cond), conditioner.from_prompts(["", ""], [])
    assert torch.equal(null["token_ids"], empty["token_ids"]) and torch.equal(
        null["token_ids_mask"], empty["token_ids_mask"]
    )
    assert null["low_res"] is cond["low_res"]


def test_long_texts_are_cut_with_a_warning(caplog):
    conditioner = small(text_size=4)
    with caplog.at_level(logging.WARNING):
        made = conditioner.from_prompts(["a red circle on a blue background", "one two three four five six"], [])
    assert made["token_ids_mask"].all()
    assert [record.getMessage().split(" is cut")[0] for record in caplog.records] == [
        "prompt 'a red circle on a blue background'", "prompt 'one two three four five six'",
    ]  # fmt: skip
    assert "of which 4 fit" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            conditioner.from_batch(Batch(["a"], ["a red circle on a blue background"]))
    assert len(caplog.records) == 1, "captions are many: one line tells"


def test_images_are_no_prompts(merges):
    with pytest.raises(UserError, match="prompted with text"):
        small().from_prompts([], [object()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": "clip", "vocab_size": 500}, "vocab_size: this vocabulary has 514 to 49408 ids, not 500"),
        ({"vocab_size": 60_000}, "vocab_size: this vocabulary has 257 to 50257 ids, not 60000"),
        ({"text_size": 0}, "text_size: at least 1"),
        ({"vocabulary": "t5"}, "vocabulary: one of 'gpt2', 'clip' is needed"),
    ],
)
def test_options(options, message):
    with pytest.raises(UserError, match=message):
        build("conditioner", {"name": "glide_text", **options})


def test_without_the_merges_one_line_says_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_LAB_OFFLINE", "1")
    gpt2_encoding.cache_clear()
    with pytest.raises(
        UserError, match=r"put vocab.bpe \(from https://.*vocab.bpe or .*\) at .*/gpt2/vocab.bpe/vocab.bpe"
    ):
        GlideText().from_prompts(["a dog"], [])
    assert catalogue()["gpt2/vocab.bpe"].sha256.startswith("1ce1664773c50f3e")


def test_importing_loads_neither_tiktoken_nor_a_file(tmp_path):
    code = "import sys, ldm_lab.conditioners.glide_text; sys.exit('tiktoken' in sys.modules)"
    assert run_program("-c", code, cwd=tmp_path, LDM_LAB_OFFLINE="1").returncode == 0
