"""Wordings of the built-in shapes: what the grammar derives, what not, and what the bundled CLOOB makes of it."""

import itertools
import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ldm_lab import clip_tokens, config
from ldm_lab.checkpoints.importer import Section
from ldm_lab.checkpoints.parts import load_part
from ldm_lab.data import shapes
from ldm_lab.data.captions import Captions
from ldm_lab.data.shape_wordings import (
    BACKGROUND_FIRST,
    HELD_OUT_FAMILIES,
    HELD_OUT_WORDINGS,
    RELATIVE_CLAUSES,
    WORDINGS,
    derived,
    is_derived,
    rules,
    vocabulary,
)
from ldm_lab.io.images import to_tensor

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "assets" / "quickstart"
HELD_OUT = list(itertools.chain(*HELD_OUT_FAMILIES.values()))
PLACES = ("{color}", "{shape}", "{background}")
RECORDED = [  # of three seeds
    "our pattern with one {color}, little {shape} and some page in {background} beneath, as another emblem",
    "the background is {background}, the {shape} is {color}",
    "the {shape} ({color}) / flat {background}, small icon",
]
Counts = tuple[int, int, int]  # how often each of PLACES is said


@cache
def says(symbol: str) -> set[Counts]:
    """Return how often a symbol can say each place: of all its derivations. A rule within itself would never end."""
    if not symbol.startswith("<"):
        return {tuple(int(symbol == place) for place in PLACES)}
    found: set[Counts] = set()
    for alternative in rules()[symbol[1:-1]]:
        for parts in itertools.product(*map(says, alternative)):
            found.add(tuple(map(sum, zip(*parts))))
    return found


def all_of(rule: str) -> set[str]:
    """Return everything that a rule derives, as words with spaces between them."""
    found = set()
    for alternative in rules()[rule]:
        parts = [all_of(symbol[1:-1]) if symbol.startswith("<") else {symbol} for symbol in alternative]
        found |= {" ".join(words) for words in itertools.product(*parts)}
    return found


# --------------------------------------------------------------------------------------------------- the grammar


def test_every_derivation_says_each_color_once_and_the_shape():
    assert says("<caption>") == {(1, 1, 1), (1, 2, 1)}


def test_every_rule_is_used_and_there():
    symbols = {symbol for alternatives in rules().values() for symbol in itertools.chain(*alternatives)}
    assert {"<caption>", *(symbol for symbol in symbols if "<" in symbol)} == {f"<{rule}>" for rule in rules()}


def test_the_grammar_names_no_color_and_no_shape():
    assert not vocabulary() & {*shapes.COLORS, *shapes.SHAPES}


def test_what_is_derived_is_recognized_and_says_nothing_else():
    rng = random.Random(0)
    texts = [derived(rng) for _ in range(100)]
    assert all(map(is_derived, texts)) and is_derived(texts[0].upper().replace("{COLOR}", "{color}"))
    assert len(set(texts)) > 70
    assert not any(is_derived(f"{text} that") or is_derived(f"no {text}") for text in texts)
    assert not any(is_derived(text.replace("{color}", "{background}")) for text in texts)


@pytest.mark.parametrize("rule", ["around", "ask", "filled", "pure"])
def test_recognizing_agrees_with_listing_everything(rule):
    listed = all_of(rule)
    assert all(is_derived(text, rule) for text in listed)
    others = [text for text in all_of("around") | all_of("pure") | all_of("ask") if text not in listed]
    assert others and not any(is_derived(text, rule) for text in others)


def test_captions_stay_the_same_for_a_seed():
    assert [derived(random.Random(seed)) for seed in range(3)] == RECORDED


# ------------------------------------------------------------------------------------------------------- families


def test_usual_wordings_are_derived():
    assert len(set(WORDINGS)) == len(WORDINGS) == 20 and all(map(is_derived, WORDINGS))


def test_no_held_out_wording_is_derived():
    assert len(set(HELD_OUT)) == len(HELD_OUT_WORDINGS) + len(RELATIVE_CLAUSES) + len(BACKGROUND_FIRST) == 24
    for wording, article in itertools.product(HELD_OUT, ("a", "the", "one")):
        told = re.sub(r"^a |(?<= )a (?=\{)", f"{article} ", wording)
        assert not any(is_derived(told + end) for end in ("", ".", "!", ", please")), told
        assert not any(is_derived(f"{lead} {told}") for lead in ("here is", "draw", "a picture of", "picture:"))


def test_the_grammar_has_no_relative_clause():
    assert not vocabulary() & {"that", "which", "who", "whom", "whose", "where", "what", "when"}
    assert all({"that", "which", "whose", "where"} & set(wording.split()) for wording in RELATIVE_CLAUSES)


def test_backgrounds_come_first_in_their_family():
    assert all(wording.index("{background}") < wording.index("{color}") for wording in BACKGROUND_FIRST)


# ------------------------------------------------------------------------------------------------------- captions


def test_an_image_has_several_captions_of_the_grammar(tmp_path):
    shapes.write_shards(tmp_path / "shapes", 4, 1, 16, wordings="grammar")
    samples = dict(shapes._samples(range(4), 0, 16, 0, 1.0, "grammar"))
    for files in samples.values():
        found = Captions().in_text(files["txt"], ".txt", lambda ending, files=files: files[ending[1:]])
        about = json.loads(files["json"])
        assert len(found.texts) == shapes.GRAMMAR_CAPTIONS and found.texts[0] == about["caption"]
        for text in found.texts:
            opened = re.sub(rf"\b{about['shape']}\b", "{shape}", text)
            opened = re.sub(rf"\b{about['color']}\b", "{color}", opened)
            assert is_derived(re.sub(rf"\b{about['background']}\b", "{background}", opened))


def test_captions_leave_the_pictures_as_they_are():
    plain, several = (dict(shapes._samples(range(3), 0, 16, 0, 1.0, wordings)) for wordings in (None, "grammar"))
    assert all(plain[key]["png"] == several[key]["png"] for key in plain)


# ------------------------------------------------------------------------------------------------ the bundled CLOOB


def test_the_text_tower_has_room_for_the_captions():
    options = config.load(ROOT / "configs" / "quickstart_cloob_text.yaml")["conditioner"].to_dict()
    rng = random.Random(0)
    texts = [shapes.caption(shapes.draw(rng, 16)[1], derived(rng)) for _ in range(1000)]
    encoding = clip_tokens.Encoding.of_size(options["vocab_size"])
    fitting = [len(encoding.encode(text)) + 2 <= options["text_size"] for text in texts]
    assert sum(fitting) >= 0.99 * len(fitting)


def test_the_bundle_is_small():
    assert sum(file.stat().st_size for file in BUNDLE.iterdir()) <= 4_000_000


@torch.no_grad()
def test_the_bundled_cloob_reads_wordings_that_it_never_saw():
    cloob = load_part("conditioner", Section({"name": "cloob", "weights": str(BUNDLE / "cloob.safetensors")}))
    kinds = [kind for kind in itertools.product(shapes.COLORS, shapes.SHAPES, shapes.COLORS) if kind[0] != kind[2]]
    plain = [shapes.Attributes(*kind, extent=0.65, x=0.5, y=0.5, angle=0.0) for kind in kinds]
    drawings = cloob.encode_image(torch.stack([to_tensor(shapes.render(a, 64)) for a in plain]))  # [336, D]
    for family, wordings in {"usual wordings": WORDINGS, **HELD_OUT_FAMILIES}.items():
        right = []
        for turn, wording in enumerate(wordings):
            asked = range(turn % 7, len(kinds), 7)
            tokens = cloob.tokenize([shapes.caption(plain[i], wording) for i in asked])
            texts = F.normalize(cloob.encode_tokens(tokens), dim=-1)  # [48, D]
            right += [i == j for i, j in zip(asked, (texts @ drawings.T).argmax(1).tolist())]
        assert sum(right) >= (0.99 if family == "usual wordings" else 0.9) * len(right), family
