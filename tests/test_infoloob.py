"""The CLOOB loss: against recorded values, its temperatures, and gathered over processes."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from infoloob_worker import OPTIONS, Towers, batch
from tiny import run_program

from ldm_lab.config import build
from ldm_lab.errors import UserError
from ldm_lab.training.infoloob import CLOOBLoss, infoloob, retrieve

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def recorded():
    folder = ROOT / "tests" / "data" / "golden"
    case = json.loads((folder / "cloob_loss.json").read_text())
    return case, dict(np.load(folder / "cloob_loss.npz"))


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours.detach().numpy() - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("suffix", "convention", "key"),
    [
        ("", "cloob_training", None),
        ("_ml_jku", "ml_jku", None),
        ("_ml_jku_defaults", "ml_jku", "ml_jku_defaults"),
    ],
)
def test_loss_and_gradients_are_the_recorded_ones(recorded, suffix, convention, key):
    case, arrays = recorded
    temperatures = case["config"][key] if key else case["config"]
    loss = CLOOBLoss(
        inv_tau=temperatures["inv_tau"], scale_hopfield=temperatures["scale_hopfield"], convention=convention
    )
    image, text = (torch.tensor(arrays[f"{n}_features"], requires_grad=True) for n in ("image", "text"))
    value = loss(image, text)
    value.backward()
    assert relative(value, arrays[f"loss{suffix}"]) < 1e-6
    assert relative(image.grad, arrays[f"grad_image{suffix}"]) < 2e-6
    assert relative(text.grad, arrays[f"grad_text{suffix}"]) < 2e-6


def test_without_retrieval_it_is_infoloob_of_the_embeddings_themselves():
    image, text = (F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(i)), dim=1) for i in (0, 1))
    plain = build("loss", {"name": "infoloob", "inv_tau": 7.0, "scale_hopfield": None})
    by_hand = 0.0
    for rows in (image @ text.T, text @ image.T):
        for i in range(5):
            others = torch.cat([rows[i, :i], rows[i, i + 1 :]])
            by_hand += (torch.log(torch.exp(7 * others).sum()) - 7 * rows[i, i]) / 5
    torch.testing.assert_close(plain(image, text), by_hand / 2)


def test_retrievals_are_the_recorded_ones(recorded):
    case, arrays = recorded
    image, text = (torch.tensor(arrays[f"{n}_features"]) for n in ("image", "text"))
    beta = case["config"]["scale_hopfield"]
    pairs = {"p_xx": (image, image), "p_yy": (text, text), "p_xy": (image, text), "p_yx": (text, image)}
    for name, (stored, queries) in pairs.items():
        assert relative(retrieve(stored, queries, beta), arrays[name]) < 1e-6, name


def test_infoloob_leaves_the_pair_itself_out_of_the_denominator():
    a, b = (F.normalize(torch.randn(4, 3, generator=torch.Generator().manual_seed(s)), dim=1) for s in (0, 1))
    by_hand = []
    for i in range(4):
        others = sum(math.exp(5 * float(a[i] @ b[j])) for j in range(4) if j != i)
        by_hand.append(math.log(others) - 5 * float(a[i] @ b[i]))
    assert float(infoloob(a, b, 5.0)) == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_a_learned_temperature_has_a_gradient_and_stays_in_its_range():
    model = Towers(learn_inv_tau=True, inv_tau=14.3, convention="ml_jku")
    model(*batch()).backward()
    assert model.loss.log_inv_tau.grad.abs() > 0
    with torch.no_grad():
        model.loss.log_inv_tau.fill_(9.0)
    model.loss.clamp()
    assert float(model.loss.inv_tau.detach()) == pytest.approx(100)
    with torch.no_grad():
        model.loss.log_inv_tau.fill_(-1.0)
    model.loss.clamp()
    assert float(model.loss.inv_tau.detach()) == 1.0
    assert not CLOOBLoss().log_inv_tau.requires_grad, "a fixed one is nothing to train"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"inv_tau": 0}, r"loss\.inv_tau: a number above 0 is needed, not 0"),
        ({"inv_tau": 200, "learn_inv_tau": True}, r"outside 1\.\.100"),
        ({"scale_hopfield": -1}, r"loss\.scale_hopfield: a number above 0 is needed, not -1"),
        ({"convention": "clip"}, r"'cloob_training', 'ml_jku'"),
    ],
)
def test_wrong_options_are_named(section, message):
    with pytest.raises(UserError, match=message):
        build("loss", {"name": "infoloob", **section})


def test_two_processes_get_loss_and_gradients_of_the_whole_batch(tmp_path):
    script, out = ROOT / "tests" / "infoloob_worker.py", tmp_path / "out.pt"
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_program, script, rank, tmp_path / "meet", out, cwd=tmp_path) for rank in (0, 1)]
    for run in runs:
        assert run.result().returncode == 0, run.result().stderr
    gathered = torch.load(out, weights_only=True)
    model = Towers(**OPTIONS)
    loss = model(*batch())
    loss.backward()
    torch.testing.assert_close(gathered["loss"], loss.detach())
    assert "loss.log_inv_tau" in gathered["gradients"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gathered["gradients"][name], parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
