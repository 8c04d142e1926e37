"""Names to classes, overrides, and errors that say all at once what is wrong and where."""

import re
from pathlib import Path
from typing import Literal

import pytest

from ldm_lab import config
from ldm_lab.config import bounds
from ldm_lab.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
YFCC = CONFIGS / "yfcc_cfg.yaml"


def test_overrides_reach_their_keys_with_their_types():
    loaded = config.load(YFCC, ["data.shards=/d/{0..9}.tar", "optim.lr=3e-6", "trainer.max_steps=50_000"])
    assert loaded["data"]["shards"] == "/d/{0..9}.tar"
    assert loaded["optim"]["lr"] == 3e-6
    assert loaded["trainer"]["max_steps"] == 50_000
    assert loaded.run == "yfcc_cfg"


def test_all_problems_are_reported_at_once_with_the_nearest_match():
    overrides = [
        "data.shards=x.tar",
        "denoiser.base_chanels=128",
        "optim.lr=fast",
        "demos.every=3",
        "data.batch_size=2.5",
    ]
    with pytest.raises(UserError) as error:
        config.load(YFCC, overrides)
    message = str(error.value)
    assert message.startswith("4 problems")
    assert (
        "denoiser.base_chanels: no such key: 'base_chanels' of denoiser.name=ccld_unet. Did you mean 'base_channels'?"
        in message
    )
    assert "optim.lr: number (at least 0) is needed, not 'fast'" in message
    assert "demos: no such key: 'demos'. Did you mean 'demo'?" in message
    assert "data.batch_size: whole number (at least 1) is needed, not 2.5" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "has to be given: data.shards"),
        (["data.shards=x", "denoiser.name=dit"], "denoiser.name: no such denoiser: 'dit'"),
        (["data.shards=x", "task=difusion"], "task: no such task: 'difusion'. Did you mean 'diffusion'?"),
        (["data.shards=x", "data.crop=middle"], "data.crop: one of 'center', 'random' is needed, not 'middle'"),
        (["data.shards=x", "trainer.precision=8"], "trainer.precision: one of '32-true', '16-mixed', 'bf16-mixed'"),
        (["data.shards=x", "demo.sampling.sampler.name=plsm"], "Did you mean 'plms'?"),
        (["data.shards=x", "optim=5"], "optim: a section of key: value lines is needed"),
        (["data.shards=x", "seed=-1"], "seed: a number from 0 to 4_611_686_018_427_387_903 is needed, not -1"),
        (["data.shards=x", "defaults=other.yaml"], "defaults: no such key"),
        (["data.shards=x", "optim.lr=.inf"], "optim.lr: number (at least 0) is needed, not inf"),
        (
            ["data.shards=x", "optim.betas=[1,2]"],
            "optim.betas: list of numbers (from 0 to less than 1) (2 entries) is needed",
        ),
        (["data.shards=x", "optim.eps=-1"], "optim.eps: at least 0 is needed, not -1"),
        (["data.shards=x", "trainer.accumulate_grad_batches=0"], "accumulate_grad_batches: at least 1 is needed"),
        (["data.shards=x", "trainer.threads=-1"], "trainer.threads: at least 1 is needed"),
        (["data.shards=x", "trainer.max_steps=0"], "trainer.max_steps: at least 1 or -1 is needed, not 0"),
        (["data.shards=x", "checkpoint.keep=-1"], "checkpoint.keep: at least 0 is needed, not -1"),
        (["data.shards=x", "logging.every=0"], "logging.every: at least 1 is needed, not 0"),
        (["data.shards=x", "resume.lr=-1"], "resume.lr: at least 0 is needed, not -1"),
        (["data.shards=x", "demo.sampling.batch_size=0"], "demo.sampling.batch_size: at least 1 is needed, not 0"),
        (["data.shards=x", "conditioner.dropout=2"], "conditioner.dropout: a number from 0 to 1 is needed, not 2"),
        (["data.shards=x", "autoencoder.latent_std=0"], "autoencoder.latent_std: a number above 0 is needed, not 0"),
        (["data.shards"], "is written key=value, such as optim.lr=3e-6"),
    ],
)
def test_one_clear_line(overrides, words):
    with pytest.raises(UserError, match="(?s)" + re.escape(words)):
        config.load(YFCC, overrides)


def test_another_part_leaves_the_keys_of_the_one_before_behind():
    """As the header of glide_finetune_base.yaml has it: its `data.path` is none of webdataset's."""
    rules = "{nsfw: {drop: [NSFW, LIKELY]}, aspect_ratio: {at_least: 0.8, at_most: 1.3}, size: {min_side: 256}}"
    for order in (1, -1):
        overrides = ["data.shards=/data/{00000..01242}.tar", f"data.rules={rules}", "data.name=webdataset"][::order]
        loaded = config.load(CONFIGS / "glide_finetune_base.yaml", overrides)
        assert "path" not in loaded["data"] and loaded["data"]["shards"] == "/data/{00000..01242}.tar"
        assert loaded["data"]["rules"]["aspect_ratio"] == {"at_least": 0.8, "at_most": 1.3}
        assert loaded["data"]["image_size"] == 64 and loaded["data"]["batch_size"] == 4
    with pytest.raises(UserError, match=r"data\.path: no such key"):  # what is asked for is not left behind
        config.load(CONFIGS / "glide_finetune_base.yaml", [*overrides, "data.path=/data"])


def test_a_missing_file_names_its_neighbours(tmp_path):
    with pytest.raises(UserError, match=r"no such config.*yfcc_cfg\.yaml"):
        config.load(YFCC.with_name("yfc_cfg.yaml"))
    with pytest.raises(UserError, match="no such config"):
        config.load(tmp_path / "nowhere" / "x.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1, 2\n", "a: b: c\n", "\x00\x01", "run: ${nowhere}\n"])
def test_an_unreadable_yaml_is_a_user_error(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        config.load(path)


def test_defaults_are_overlaid_and_may_not_go_in_circles(tmp_path):
    (tmp_path / "base.yaml").write_text(YFCC.read_text().replace("???", "a.tar"))
    (tmp_path / "child.yaml").write_text("defaults: base.yaml\nrun: child\noptim: {lr: 1.0e-4}\n")
    child = config.load(tmp_path / "child.yaml")
    assert (child.run, child["optim"]["lr"], child["optim"]["weight_decay"]) == ("child", 1e-4, 0.01)
    (tmp_path / "base.yaml").write_text("defaults: child.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        config.load(tmp_path / "child.yaml")


def test_a_config_names_only_registered_parts():
    with pytest.raises(UserError, match=r"no such denoiser: 'os\.system'"):
        config.build("denoiser", {"name": "os.system"}, 4, 512)
    with pytest.raises(UserError, match="no such key: '_target_'"):
        config.build("objective", {"name": "v_cosine", "_target_": "os.system"})


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        (3, float, True),
        (True, int, False),
        (True, float, False),
        (True, bool, True),
        (2.0, int, False),
        (None, int | None, True),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
        ({"a": 1}, dict | None, True),
    ],
)
def test_types(value, annotation, fits):
    assert bounds.fits(value, annotation) is fits


def test_the_listing_of_parts_has_every_role_and_every_option():
    listing = config.describe_parts()
    for words in (
        "denoiser: ccld_unet",
        "base_channels",
        "data: webdataset",
        "sampler: plms",
        "task: diffusion",
        "optim",
    ):
        assert words in listing
    for role in config.ROLES:
        for cls in config.parts(role).values():
            assert cls.__doc__, f"{cls} has no docstring for the listing"
