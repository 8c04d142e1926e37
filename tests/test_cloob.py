"""CLOOB's towers and CLIP's tokenizer beyond parity: vocabularies of any size, prompts, the padding's quirk."""

import builtins
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_lab.batch import Batch
from ldm_lab.clip_tokens import Encoding, tokenize
from ldm_lab.conditioners.cloob import CLOOB, SelfAttention
from ldm_lab.conditioners.none import NoConditioner
from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.io.images import center_crop_to

TINY = {
    "embed_dim": 12, "image_size": 8, "patch_size": 4, "image_width": 16, "image_layers": 2, "image_heads": 2,
    "text_size": 10, "vocab_size": 600, "text_width": 16, "text_layers": 2, "text_heads": 4,
}  # fmt: skip


@pytest.fixture
def cloob() -> CLOOB:
    torch.manual_seed(0)
    return CLOOB(**TINY).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- tokenizer


def test_start_text_end_padding():
    assert tokenize(["a cat", ""], text_size=6).tolist() == [
        [49406, 320, 2368, 49407, 0, 0],
        [49406, 49407, 0, 0, 0, 0],
    ]
    assert tokenize([], text_size=6).shape == (0, 6)


def test_a_small_vocabulary_has_the_first_tokens_of_the_large_one():
    text = "the red circle, with 3 éclairs"
    large, small, letters = Encoding(49408), Encoding(700), Encoding(514)
    assert max(small.encode(text)) < 698
    assert len(large.encode(text)) < len(small.encode(text)) < len(letters.encode(text))
    for encoding in (large, small, letters):
        assert encoding.decode(encoding.encode(text)).replace(" ", "") == text.replace(" ", "")
    assert Encoding(515).encode("ing")[0] == 512  # "i" and "n", CLIP's first merge
    assert small.encode("<|endoftext|>") == [699]
    assert small.encode("<|STARTOFTEXT|>") == [698]


@given(st.text(max_size=40), st.sampled_from([514, 560, 5000, 49408]))
@settings(max_examples=150, deadline=None)
def test_every_text_can_be_encoded(text, vocab_size):
    ids = Encoding.of_size(vocab_size).encode(text)
    assert all(0 <= token < vocab_size for token in ids)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyzäß東 !0123.,", max_size=30), st.sampled_from([514, 900, 49408]))
@settings(max_examples=100, deadline=None)
def test_encoding_and_back(text, vocab_size):
    encoding = Encoding.of_size(vocab_size)
    assert encoding.decode(encoding.encode(text)).replace(" ", "") == text.replace(" ", "")


def test_text_is_cleaned_as_by_clip():
    encoding = Encoding.of_size(49408)
    assert encoding.encode("  Fish &amp;amp; CHIPS\n\t") == encoding.encode("fish & chips")
    assert encoding.encode("voilÃ ") == encoding.encode("voilà")
    assert encoding.encode("<start_of_text>") != [49406]  # open_clip's spelling is text to CLIP


def test_a_long_prompt_is_cut_with_one_line_that_names_it(caplog):
    long = "a red circle and " * 30
    with caplog.at_level(logging.WARNING):
        ids = tokenize([long, "a cat"], text_size=8, vocab_size=49408, warn=True)
    assert ids[0].tolist() == [49406, *Encoding.of_size(49408).encode(long)[:6], 49407]
    (record,) = caplog.records
    assert "'a red circle and " in record.getMessage()
    assert "120 tokens, of which 6 fit" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 150


def test_the_longest_prompt_that_fits_is_not_cut(caplog):
    assert tokenize(["a a a"], text_size=5, vocab_size=600, warn=True)[0].tolist() == [598, 320, 320, 320, 599]
    assert not caplog.records


@pytest.mark.parametrize("vocab_size", [0, 513, 49409])
def test_a_vocabulary_that_cannot_be(vocab_size):
    with pytest.raises(UserError, match=rf"vocab_size: .*49408.*514.*{vocab_size} is outside"):
        tokenize(["a"], vocab_size=vocab_size)


def test_the_tokenizer_does_not_import_open_clip(monkeypatch):
    """It takes many seconds, and everyone who samples would wait for it."""
    original = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert not name.startswith("open_clip")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert Encoding(600).encode("a") == [320]


# ------------------------------------------------------------------------------------------------------------ towers


def test_the_released_architecture():
    with torch.device("meta"):
        cloob = CLOOB()
    assert sum(p.numel() for p in cloob.image_encoder.parameters()) == 86_190_080
    assert sum(p.numel() for p in cloob.text_encoder.parameters()) == 63_427_584
    assert len(cloob.state_dict()) == 393
    assert cloob.image_encoder.layers[0].attn.heads == 12
    assert cloob.text_encoder.layers[0].attn.heads == 8


def test_embeddings_are_unit_rows_that_do_not_depend_on_each_other(cloob):
    texts = ["a red circle", "", "two words"]
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for together, alone in (
        (cloob.encode_text(texts), torch.cat([cloob.encode_text([text]) for text in texts])),
        (cloob.encode_image(images), torch.cat([cloob.encode_image(image[None]) for image in images])),
    ):
        assert together.shape == (3, 12)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert (together[0] - together[1]).norm() > 1e-3


def test_prompts_are_texts_then_images(cloob):
    picture = Image.new("RGB", (30, 20), "orange")
    embed = cloob.from_prompts(["a red circle", "a"], [picture])["embed"]
    assert embed.shape == (3, 12)
    torch.testing.assert_close(embed[:2], cloob.encode_text(["a red circle", "a"]))
    batch = Batch(["a"], [""], torch.tensor([1.0, 165 / 127.5 - 1, -1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    torch.testing.assert_close(embed[2:], cloob.from_batch(batch)["embed"], rtol=1e-4, atol=1e-5)
    assert cloob.from_prompts([], [picture])["embed"].shape == (1, 12)
    assert cloob.from_prompts([], [])["embed"].shape == (0, 12)
    assert not cloob.null({"embed": embed})["embed"].any()
    assert cloob.null({"embed": embed})["embed"].shape == embed.shape


def test_what_follows_the_end_counts_but_a_second_end_does_not(cloob):
    """The released mask lets texts see their padding, which therefore has to be complete."""
    end = TINY["vocab_size"] - 1
    tokens = torch.tensor([[end - 1, 320, end, *[0] * 7]])
    other = tokens.clone()
    other[0, 5] = 330
    second_end = tokens.clone()
    second_end[0, 5] = end
    tower = cloob.text_encoder
    assert (tower(tokens) - tower(other)).norm() > 1e-4
    attention = tower.layers[0].attn
    x = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(2))
    valid = torch.arange(10)[None] <= 2
    attended = attention(x, valid)
    uniform = attention.out(attention.value(attention.norm(x)).mean(1, keepdim=True))
    torch.testing.assert_close(attended[:, 3:], uniform.expand(1, 7, 16), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attended[:, :3], attention(x)[:, :3])
    masks = []
    for ids in (tokens, second_end):
        handle = attention.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
        tower(ids)
        handle.remove()
    assert torch.equal(*masks)
    assert masks[0].sum() == 3


def test_without_an_end_every_position_counts(cloob):
    masks = []
    cloob.text_encoder.layers[0].attn.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    cloob.text_encoder(torch.full((1, 10), 320))
    assert masks[0].all()


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(16, 4, 1), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])
    theirs.in_proj_bias.data.zero_()
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(*[ours.norm(x)] * 3)[0], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    cloob = CLOOB(**TINY)
    (cloob.encode_image(torch.rand(2, 3, 8, 8)) * cloob.encode_text(["a", "b c"])).sum().backward()
    assert [name for name, p in cloob.named_parameters() if p.grad is None] == []


def test_buffers_are_not_among_the_weights(cloob):
    assert set(cloob.state_dict()) == {name for name, _ in cloob.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "image_size: 8 is no multiple of patch_size"),
        ({"image_heads": 3}, "image_width: 16 is no multiple of image_heads"),
        ({"text_heads": None}, "text_heads: has to be given"),
        ({"text_layers": 0}, "text_layers: at least 1 is needed, not 0"),
        ({"text_size": 1}, "text_size: at least 2 is needed, not 1"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=rf"^conditioner\.{message}"):
        CLOOB(**{**TINY, **options})
    with pytest.raises(UserError, match=rf"^conditioner\.{message}"):
        build("conditioner", {"name": "cloob", **TINY, **options})


# ----------------------------------------------------------------------------------------------------- image prompts


@pytest.mark.parametrize("size", [(1023, 767), (187, 300), (224, 224), (1, 1), (3, 5000)])
def test_image_prompts_cover_the_square(size):
    picture = center_crop_to(Image.new("L", size, 255), 32, 32)
    assert picture.size == (32, 32)
    assert picture.mode == "RGB"
    assert picture.getextrema() == ((255, 255),) * 3


def test_transparent_image_prompts_are_laid_over_white():
    hidden = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert center_crop_to(hidden, 8, 8).getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 1
    assert center_crop_to(palette, 8, 8).getpixel((4, 4)) == (255, 255, 255)


def test_the_middle_of_an_image_prompt_is_taken():
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    assert center_crop_to(picture, 50, 50).getextrema()[0][0] > 100


def test_no_condition():
    none = NoConditioner(embed_dim=5)
    batch = Batch(["a", "b", "c"], [""] * 3, torch.zeros(3, 3, 8, 8))
    assert torch.equal(none.from_batch(batch)["embed"], torch.zeros(3, 5))
    cond = none.from_prompts(["a"], [Image.new("RGB", (2, 2))])
    assert torch.equal(cond["embed"], torch.zeros(2, 5))
    assert torch.equal(none.null(cond)["embed"], torch.zeros(2, 5))
    assert not none.state_dict()
