"""Tiny language models of transformers with random weights, in folders as the Hub's."""

import json
from pathlib import Path

import torch

WORDS = ["a", "red", "green", "blue", "circle", "star", "square", "on", "background", "photo", "of", "the"]


def write_language_model(folder: Path, kind: str = "t5", width: int = 48) -> Path:
    """Write a model with its tokenizer; return the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=2 * width, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.BertModel(config)
    else:
        config = transformers.T5Config(
            vocab_size=len(vocabulary), d_model=width, d_kv=12, d_ff=2 * width, num_layers=2, num_heads=4
        )
        model = transformers.T5EncoderModel(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    loaded = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**loaded, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder
