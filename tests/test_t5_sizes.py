"""The sizes of language models' encoders, as transformers builds them."""

import pytest
import torch

from ldm_lab.conditioners.t5_models import MINILM, WIDTHS, minilm_folder
from ldm_lab.conditioners.t5_sizes import PUBLISHED, encoder_parameters, parameters_in

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 100, "d_model": 64, "d_ff": 96, "num_layers": 3, "num_heads": 2, "d_kv": 16}


def built(cls: type, config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls(config).parameters())


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_published_ones(model):
    shape = PUBLISHED[model]
    config = transformers.T5Config(
        vocab_size=shape.vocabulary, d_model=shape.width, d_ff=shape.inner, num_layers=shape.layers,
        num_heads=shape.heads, d_kv=shape.head_width, feed_forward_proj="gated-gelu" if shape.gated else "relu",
    )  # fmt: skip
    assert encoder_parameters(model) == built(transformers.T5EncoderModel, config)


def test_all_whose_width_is_known_are_there():
    assert {name: shape.width for name, shape in PUBLISHED.items()} == {
        name: width for name, width in WIDTHS.items() if name != MINILM
    }
    config = transformers.BertConfig.from_pretrained(minilm_folder())
    with torch.device("meta"):
        model = transformers.BertModel(config, add_pooling_layer=False)
    assert encoder_parameters(MINILM) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
@pytest.mark.parametrize("activation", ["gated-gelu", "relu"])
def test_those_in_a_folder(tmp_path, kind, activation):
    config = getattr(transformers, f"{kind}Config")(**SMALL, feed_forward_proj=activation)
    config.save_pretrained(tmp_path)
    assert encoder_parameters(str(tmp_path)) == built(getattr(transformers, f"{kind}EncoderModel"), config)


@pytest.mark.parametrize(
    "text", ["{}", "{", '{"model_type": "gpt2"}', '{"model_type": "t5", "d_model": 8}', '{"model_type": "bert"}']
)
def test_what_says_nothing(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert parameters_in(tmp_path) is None


def test_one_that_is_not_here_is_not_known():
    assert encoder_parameters("somebody/t5-of-their-own") is None
