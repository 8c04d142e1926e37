"""`python -m ldm_lab train-head` and `rating-embeddings`: a planted rating is found again, figures are honest."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from data_sets import encoded, samples
from safetensors.torch import save_file
from test_score import ARCHITECTURE
from torch.nn import functional as F

from ldm_lab.checkpoints.embedders import embedder_of
from ldm_lab.checkpoints.native import save_part
from ldm_lab.config import build
from ldm_lab.curation.heads import training as head_training
from ldm_lab.curation.heads.head import load_head, save_head
from ldm_lab.curation.scoring.files import (
    EMBEDDINGS,
    SCORES,
    ScoreFacts,
    ScoreRows,
    read_embeddings,
    write_embeddings,
    write_scores,
)
from ldm_lab.data.tar import write_shard
from ldm_lab.errors import UserError
from ldm_lab.sampling.aesthetic import RatingEmbeddings

EMBEDDER = {"name": "clip", "model": "ViT-X", "pretrained": "mine"}
CLIP = ["--clip", "model=ViT-B-32", "pretrained=laion2b_s34b_b79k"]


def planted(count: int = 2000, width: int = 64, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings that lie in a cone, as CLIP's do, clean linear ratings around 5, and noisy ones.

    `noise` is the deviation of the noise in units of the ratings'.
    """
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(0, -1.5, width)  # [D]
    rows = torch.randn(count, width, generator=generator) * spread + 0.5 * torch.randn(width, generator=generator)
    embeds = F.normalize(rows, dim=1)  # [N, D]
    clean = embeds @ torch.randn(width, generator=generator)  # [N]
    clean = 5 + 1.2 * (clean - clean.mean()) / clean.std()  # [N]
    return embeds, clean, clean + 1.2 * noise * torch.randn(count, generator=generator)


@pytest.fixture
def rated(tmp_path):
    """Two files of embeddings with keys, and a CSV of their noisy ratings in another order."""
    embeds, _, noisy = planted()
    keys = [f"{n:06d}" for n in range(len(embeds))]
    for number, rows in enumerate(np.array_split(np.arange(len(embeds)), 2)):
        path = tmp_path / f"{number}{EMBEDDINGS}"
        write_embeddings(path, embeds[rows], [keys[row] for row in rows], EMBEDDER)
    order = np.random.default_rng(0).permutation(len(embeds))
    table = pa.table({"key": [keys[i] for i in order], "stars": noisy.numpy()[order]})
    pyarrow.csv.write_csv(table, tmp_path / "ratings.csv")
    return tmp_path


def train(program, folder, *args, column="stars"):
    return program("ldm_lab.__main__", "train-head", "--out", folder / "head.safetensors", "--rating", column, *args)


@pytest.mark.parametrize(
    ("args", "clean_correlation"), [([], 0.99), (["--kind", "mlp", "--widths", 32, "--dropout", "--epochs", 60], 0.95)]
)
def test_a_planted_rating_is_recovered_from_noisy_samples(rated, program, args, clean_correlation):
    files = sorted(rated.glob(f"*{EMBEDDINGS}"))
    code, out, err = train(program, rated, "--embeddings", *files, "--ratings", rated / "ratings.csv", *args)
    assert code == 0, err
    loaded = load_head(rated / "head.safetensors")
    assert loaded.trained["pearson"] >= 0.95 and loaded.trained["spearman"] >= 0.95
    assert f"Pearson {loaded.trained['pearson']:.4f}, Spearman {loaded.trained['spearman']:.4f}" in out
    assert (loaded.trained["images"], loaded.trained["held_out"]) == (1800, 200)
    assert loaded.trained["rmse"] < 0.5 * loaded.trained["rmse_of_mean"]
    assert loaded.head.embedder == EMBEDDER and loaded.head.column == "stars"
    embeds, clean, _ = planted()
    with torch.no_grad():
        assert np.corrcoef(loaded.head(embeds), clean)[0, 1] > clean_correlation, "the noise is not what it has learned"


def test_the_figures_are_of_images_that_were_not_trained_on(rated, program):
    """With ratings by chance and nearly as many dimensions as images, training figures would look fine."""
    embeds, _, _ = planted(count=120, width=64)
    torch.manual_seed(0)
    ratings = torch.randn(120)
    parts = head_training.split(embeds, ratings, 0.25, seed=0)
    assert len(parts.train[1]) == 90 and len(parts.held_out[1]) == 30
    section = {"name": "linear", "embed_dim": 64, "embedder": EMBEDDER}
    head, _ = head_training.fit_linear(section, *parts.train, ridge=0.0)
    assert head_training.evaluate(head, *parts.train, 0.0).pearson > 0.7
    assert abs(head_training.evaluate(head, *parts.held_out, 0.0).pearson) < 0.5
    seen = {tuple(row.tolist()) for row in parts.train[0]}
    assert not any(tuple(row.tolist()) in seen for row in parts.held_out[0])


def test_least_squares_are_exact_and_the_ridge_is_chosen_by_the_noise():
    section = {"name": "linear", "embed_dim": 64, "embedder": EMBEDDER}
    embeds, clean, _ = planted()
    head, facts = head_training.fit_linear(section, embeds, clean, ridge=0.0)
    with torch.no_grad():
        assert torch.allclose(head(embeds), clean, atol=1e-3)
    ridges = []
    for noise in (0.01, 0.3, 3.0):
        head, facts = head_training.fit_linear(section, *planted(count=300, noise=noise)[::2], ridge=None)
        ridges.append(facts["ridge"])
    assert ridges[0] < ridges[1] < ridges[2]


def test_a_linear_head_matches_the_closed_form_solution():
    embeds, _, noisy = planted(count=200, width=8)
    section = {"name": "linear", "embed_dim": 8, "embedder": EMBEDDER}
    head, _ = head_training.fit_linear(section, embeds, noisy, ridge=0.5)
    x = (embeds - embeds.mean(dim=0)).double()
    weight = torch.linalg.solve(x.T @ x + 0.5 * torch.eye(8).double(), x.T @ (noisy - noisy.mean()).double())
    assert torch.allclose(head.weight[0].double(), weight, atol=1e-4)


def test_probabilities():
    embeds, clean, _ = planted()
    labels = (clean > 6).float()
    section = {"name": "linear", "embed_dim": 64, "embedder": EMBEDDER, "output": "probability"}
    parts = head_training.split(embeds, labels, 0.25, 0)
    head, _ = head_training.fit_linear(section, *parts.train, None)
    with torch.no_grad():
        predicted = head(parts.held_out[0])
    assert ((predicted > 0.5).float() == parts.held_out[1]).float().mean() > 0.95
    with pytest.raises(ValueError, match="ratings from 0 to 1 are needed, these are"):
        head_training.fit_linear(section, embeds, clean, None)


def test_arrays_rated_row_by_row(tmp_path, program):
    embeds, _, noisy = planted(300)
    noisy[3], embeds[5, 0] = float("nan"), float("inf")
    np.save(tmp_path / "x.npy", (embeds * 7).half().numpy())
    np.save(tmp_path / "y.npy", noisy.numpy()[:, None])
    args = ("--embeddings", tmp_path / "x.npy", "--ratings", tmp_path / "y.npy")
    code, _, err = train(program, tmp_path, *args)
    assert code == 2 and "does not say whose embeddings these are; --clip" in err
    code, out, err = train(program, tmp_path, *args, *CLIP)
    assert code == 0, err
    assert "from 268 images (1 rated NaN, 1 with a non-finite embedding left out); on 30 held out" in out
    loaded = load_head(tmp_path / "head.safetensors")
    assert loaded.head.embedder == {"name": "clip", "model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "starz"}, "no such column: 'starz'. Did you mean 'stars'?"),
        ({"args": ["--held-out", "1.5"]}, "--held-out: a share between 0 and 1"),
        ({"args": ["--held-out", "0.00001"]}, "0 of them held out, are too few"),
        ({"args": ["--ridge", "-1"]}, "--ridge: a number from 0 on"),
        ({"args": ["--output", "probability"]}, "ratings from 0 to 1 are needed"),
        ({"args": ["--clip", "model=ViT-B-16", "pretrained=openai"]}, "were trained with QuickGELU"),
        ({"args": CLIP}, f"0{EMBEDDINGS}: belongs to the embeddings of clip ViT-X mine, these are of clip ViT-B-32"),
        ({"ratings": "none.csv"}, "none.csv: no such file"),
        ({"ratings": "words.csv"}, "the column 'stars' is of type string, not a number"),
        ({"ratings": "others.csv"}, "no rated image: 2,000 without a rating"),
        ({"ratings": "same.csv"}, "all 2000 ratings are 4: there is nothing to learn"),
        ({"args": ["--kind", "mlp", "--epochs", "2", "--lr", "1e30"]}, "--lr 1e+30: the head's weights did not stay"),
    ],
)
def test_bad_input(rated, program, change, message, monkeypatch):
    keys = [f"{n:06d}" for n in range(2000)]
    for name, table in {
        "words": {"key": ["000001"], "stars": ["many"]},
        "others": {"key": ["x"], "stars": [1.0]},
        "same": {"key": keys, "stars": [4.0] * 2000},
    }.items():
        pyarrow.csv.write_csv(pa.table(table), rated / f"{name}.csv")
    args = [
        "--embeddings",
        *sorted(rated.glob(f"*{EMBEDDINGS}")),
        "--ratings",
        rated / change.get("ratings", "ratings.csv"),
    ]
    code, _, err = train(program, rated, *args, *change.get("args", []), column=change.get("column", "stars"))
    assert code == 2 and message in err
    assert not (rated / "head.safetensors").exists()


def test_ratings_that_differ_among_the_held_out_alone():
    ratings = torch.full((20,), 4.0)
    held_out = torch.randperm(20, generator=torch.Generator().manual_seed(0))[0]
    ratings[held_out] = 5.0
    with pytest.raises(UserError, match="all 18 ratings to learn from are 4"):
        head_training.split(torch.randn(20, 3), ratings, 0.1, 0)


def test_embeddings_of_another_width(rated, program):
    write_embeddings(rated / f"9{EMBEDDINGS}", torch.randn(3, 65), ["a", "b", "c"], EMBEDDER)
    files = sorted(rated.glob(f"*{EMBEDDINGS}"))
    code, _, err = train(program, rated, "--embeddings", *files, "--ratings", rated / "ratings.csv")
    assert code == 2 and "embeddings of width 65, those before have 64" in err


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, suffix):
    from ldm_lab.curation.heads.ratings import read_table

    table = pa.table({"name": ["00012", "00013", "00012", "00014", None], "stars": [1, 2, 4, None, 3]})
    path = tmp_path / f"r.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="\t" if suffix == "tsv" else ",")
        pyarrow.csv.write_csv(table.slice(0, 4), path, options)
    assert read_table(path, "name", "stars") == {"00012": 2.5, "00013": 2.0}, "of several ratings the mean"


# -------------------------------------------------------------------------------------------- from images to the prompt


def make_clip(folder):
    section = {"name": "clip", "architecture": ARCHITECTURE}
    torch.manual_seed(0)
    save_part(folder / "clip.safetensors", build("conditioner", section), section)
    return embedder_of({"name": "clip", "weights": str(folder / "clip.safetensors")})


def test_from_rated_shards_to_a_head_that_scores(tmp_path, program):
    """The rating is how red an image is, which a random CLIP's embedding tells well enough."""
    embedder = make_clip(tmp_path)
    made = samples(range(120))
    for n, (_, parts) in enumerate(made):
        parts["png"] = encoded(n * 2, (32, 32))
        parts["json"] = json.dumps({"rating": n / 12} if n % 10 else {}).encode()
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.tar", iter(made[shard::3]))
    clip = ["--clip", f"weights={tmp_path / 'clip.safetensors'}", "--accelerator", "cpu", "--workers", "0"]
    args = ["--shards", f"{tmp_path}/?.tar", "--held-out", "0.25", *clip]
    code, out, err = train(program, tmp_path, *args, column="rating")
    assert code == 0, err
    assert "120 images scored" in out and "from 81 images (12 without a rating left out); on 27 held out" in out
    loaded = load_head(tmp_path / "head.safetensors")
    assert loaded.head.embedder == embedder and loaded.trained["pearson"] > 0.8
    assert len(list((tmp_path / "head.embeddings").glob(f"*{EMBEDDINGS}"))) == 3, "the embeddings are kept"
    head = ["--head", f"red={tmp_path / 'head.safetensors'}"]
    scored = ("--shards", f"{tmp_path}/?.tar", "--out", tmp_path / "scores", "--embeddings", *head, *clip)
    code, _, err = program("ldm_lab.__main__", "score", *scored)
    assert code == 0, err
    tables = [pq.read_table(path) for path in sorted((tmp_path / "scores").glob(f"*{SCORES}"))]
    scores = np.concatenate([table["red"].to_numpy() for table in tables])
    numbers = np.array([int(key) for table in tables for key in table["key"].to_pylist()])
    assert np.corrcoef(scores, numbers)[0, 1] > 0.8
    out_file = tmp_path / "ratings.safetensors"
    pattern = f"{tmp_path}/scores/*{SCORES}"
    code, out, err = program(
        "ldm_lab.__main__", "rating-embeddings", "--scores", pattern, "--column", "red", "--out", out_file
    )
    assert code == 0, err
    ratings = RatingEmbeddings.load(out_file)
    assert ratings.embedder == embedder and set(ratings.embeds) <= set(range(10))
    with torch.no_grad():
        rising = loaded.head(torch.stack([ratings.embeds[k] for k in sorted(ratings.embeds)]))
    assert (rising.diff() > 0).all(), "the mean embeddings' own scores rise"
    assert f"{ratings.facts['counts'][5]:,}" in out


def test_rating_embeddings_of_scores_that_do_not_fit(tmp_path, program):
    embeds, clean, _ = planted(40)
    keys = [str(n) for n in range(40)]
    scores = {"aesthetic": clean.numpy()}
    rows = ScoreRows(keys, [None] * 40, [None] * 40, scores)
    facts = ScoreFacts(EMBEDDER, "32-true", {}, False, {}, None, 40, {}, {}, {})
    write_scores(tmp_path / f"0{SCORES}", rows, facts)

    def average(column="aesthetic"):
        args = ("--scores", tmp_path / f"0{SCORES}", "--column", column, "--out", tmp_path / "r.safetensors")
        return program("ldm_lab.__main__", "rating-embeddings", *args)

    code, _, err = average()
    assert code == 2 and f"0{EMBEDDINGS}: no such file" in err
    write_embeddings(tmp_path / f"0{EMBEDDINGS}", embeds, keys[::-1], EMBEDDER)
    code, _, err = average()
    assert code == 2 and "its images are others than those of" in err
    write_embeddings(tmp_path / f"0{EMBEDDINGS}", embeds, keys, EMBEDDER)
    code, _, err = average("aestetic")
    assert code == 2 and "Did you mean 'aesthetic'?" in err
    code, out, err = average()
    assert code == 0 and "(no embedding)" in out, err
    clean[:] = 99
    write_scores(tmp_path / f"0{SCORES}", rows, facts)
    code, _, err = average()
    assert code == 2 and "no image has a score from 0 to 10: 0 below, 40 above" in err


def test_embedding_files_that_are_none(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"nothing")
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.zeros(3))
    save_file({"x": torch.zeros(1)}, tmp_path / "d.safetensors")
    for name in ("a.npy", "b.npy", "c.npy", "d.safetensors", "missing.npy"):
        with pytest.raises(ValueError, match=name):
            read_embeddings(tmp_path / name)


def test_a_trained_head_is_written_whole_or_not(tmp_path, monkeypatch):
    import os

    section = {"name": "linear", "embed_dim": 4, "embedder": EMBEDDER}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        save_head(tmp_path / "h.safetensors", build("head", section), section, {})
    assert not list(tmp_path.iterdir())
