"""LAION's aesthetic predictors and rating embeddings, the released files, against what the originals gave."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fill import fill
from torch import Tensor

from ldm_lab.checkpoints.embedders import OPENAI
from ldm_lab.checkpoints.importer import detect_format
from ldm_lab.checkpoints.parts import load_module
from ldm_lab.curation.heads.head import load_head
from ldm_lab.curation.scoring.rating_means import BUCKETS, BucketMeans
from ldm_lab.io.atomic import sha256
from ldm_lab.sampling.aesthetic import Aesthetic, RatingEmbeddings


class Aesthetics(NamedTuple):
    """A recorded case: its folder, its json, its arrays."""

    folder: Path
    json: dict[str, Any]
    arrays: dict[str, Tensor]

    def ratings(self) -> RatingEmbeddings:
        """Return the released rating embeddings that the case names."""
        return RatingEmbeddings.load((self.folder / self.json["rating_embeddings"]).parent)

    def close(self, ours: Tensor, name: str, atol: float) -> None:
        """Assert that an array is as recorded."""
        theirs = self.arrays[name]
        assert ours.shape == theirs.shape, name
        assert float((ours.double() - theirs.double()).abs().max()) <= atol, name


@pytest.fixture
def recorded(golden):
    def load(name: str) -> Aesthetics:
        path = golden / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"{golden} has no case {name}")
        with np.load(golden / f"{name}.npz") as arrays:
            values = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        return Aesthetics(golden, json.loads(path.read_text(encoding="utf-8")), values)

    return load


def released_head(case: Aesthetics):
    path = case.folder / case.json["weights_file"]
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert sha256(path) == case.json["weights_sha256"]
    return load_head(path).head


@torch.no_grad()
def test_aesthetic_linear(recorded):
    case = recorded("aesthetic_linear")
    head, allowed = released_head(case), case.json["tolerance"]
    assert head.embedder == OPENAI[case.json["model"]]
    assert {name: list(value.shape) for name, value in head.state_dict().items()} == case.json["weights"]
    case.close(head(case.arrays["unit_embeddings"]), "unit_scores", allowed["scores_atol"])
    case.close(head(case.arrays["raw_embeddings"]), "raw_scores", allowed["scores_atol"])
    case.close(head.raw(case.arrays["raw_embeddings"]), "raw_scores_if_not_normalized", 20 * allowed["scores_atol"])
    assert case.arrays["half_embeddings"].dtype == torch.float16
    case.close(head(case.arrays["half_embeddings"]), "half_scores", allowed["half_scores_atol"])


@torch.no_grad()
def test_rating_embeddings_rise(recorded):
    case = recorded("aesthetic_linear")
    head, ratings = released_head(case), case.ratings()
    assert ratings.embedder == head.embedder and list(ratings.embeds) == list(range(10))
    scores = head(torch.stack(list(ratings.embeds.values())))
    case.close(scores, "rating_scores", case.json["tolerance"]["scores_atol"])
    assert (scores.diff() > 0).all() and scores[0] < 0.5 and scores[-1] > 10


def test_guided_queries(recorded):
    case = recorded("aesthetic_linear")
    ratings, queries = case.ratings(), case.arrays["query_embeddings"]
    guided = [Aesthetic(ratings, g["rating"], g["weight"]).guide(queries) for g in case.json["guided"]]
    case.close(torch.stack(guided), "guided_queries", case.json["tolerance"]["guided_atol"])


def test_aesthetic_buckets(recorded):
    case = recorded("aesthetic_buckets")
    scores, embeds = case.arrays["scores"].numpy(), case.arrays["embeddings"]
    whole = BucketMeans(embeds.shape[1])
    whole.add(embeds, scores)
    parts = BucketMeans(embeds.shape[1])  # shard by shard comes to the same
    for rows in np.array_split(np.arange(len(scores)), 7):
        parts.add(embeds[rows], scores[rows])
    for means in (whole, parts):
        counts = {f"{k}-{k + 1}": int(count) for k, count in enumerate(means.counts)}
        assert counts == case.json["counts"]
        assert {key: getattr(means, key) for key in ("below", "above", "missing")} == {
            key: case.json[key] for key in ("below", "above", "missing")
        }
        assert int(means.counts.sum()) + means.below + means.above + means.missing == case.json["rows"]
        found = means.means()
        assert sorted(found) == [k for k in range(10) if means.counts[k]]
        for k, mean in found.items():
            expected = case.arrays["bucket_embeddings"][k]
            assert float((mean - expected).abs().max()) <= case.json["tolerance"]["bucket_embeddings_atol"]


def test_where_a_bucket_ends():
    scores = np.array([-0.0, 0.0, np.nextafter(1, 0), 1, 9.99, 10, np.inf, -np.inf, -1e-9, np.nan])
    assert BUCKETS.places(scores[:-1]).tolist() == [1, 1, 1, 2, 10, 11, 11, 0, 0]
    assert BUCKETS.counts(scores).tolist() == [2, 3, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 1], "NaN is missing"


@torch.no_grad()
def test_aesthetic_mlp(recorded, tmp_path):
    case = recorded("aesthetic_mlp")
    weights = {name: fill(name, shape, case.json["weights_seed"]) for name, shape in case.json["weights"].items()}
    torch.save(weights, tmp_path / "mlp.pth")
    given = {"name": "mlp", "embedder": OPENAI["vit_l_14"]}
    mlp, section = load_module("head", given, detect_format(tmp_path / "mlp.pth"))
    mlp.eval()
    layers, allowed = case.json["layers"], case.json["tolerance"]
    assert section["widths"] == layers["widths"] and section["dropout"] == layers["dropout_after_first_three"]
    heads = [mlp]
    if case.json["layout"] == "linear":
        assert section["activation"] == "none"
        heads.append(mlp.fused())
    else:
        assert section["activation"] == "relu" and mlp.fused() is mlp
    for head in heads:
        case.close(head(case.arrays["unit_embeddings"]), "fill_unit_scores", allowed["fill_atol"])
        case.close(head(case.arrays["raw_embeddings"]), "fill_raw_scores", allowed["fill_atol"])
        case.close(head.raw(case.arrays["long_embeddings"]), "fill_long_forward", allowed["long_atol"])


@torch.no_grad()
def test_the_released_mlp(recorded):
    """Runs where the 3.7 MB file lies beside the recordings."""
    case = recorded("aesthetic_mlp")
    found = 0
    for entry in case.json["real_weights"]["files"]:
        for path in (case.folder / entry["file"], case.folder / "aesthetic_heads" / entry["file"]):
            if not path.is_file() or sha256(path) != entry["sha256"]:
                continue
            found += 1
            head, arrays, atol = load_head(path).head, entry["arrays"], case.json["tolerance"]["real_atol"]
            assert head.embedder == OPENAI["vit_l_14"] and head.column == "AESTHETIC_SCORE"
            case.close(head(case.arrays["unit_embeddings"]), arrays["unit_embeddings"], atol)
            case.close(head(case.arrays["raw_embeddings"]), arrays["raw_embeddings, normalised"], atol)
            ratings = torch.stack(list(case.ratings().embeds.values()))
            case.close(head(ratings), arrays["vit_l_14 rating0..9"], atol)
    if not found:
        pytest.skip("the released MLP is not beside the recordings")
