"""Names to classes, overrides, and errors that say all at once what is wrong and where."""

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Len

from ldm_lab import config
from ldm_lab.config import (
    AutoencoderUse,
    ConditionerUse,
    PositiveFloat,
    PositiveInt,
    RunConfig,
    Share,
    ShareBelowOne,
    bounds,
    overrides,
)
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


@pytest.mark.parametrize(
    ("overrides", "conditioner"),
    [
        (["conditioner.name=none"], {"name": "none", "dropout": 0.2}),
        (["conditioner={name: none, embed_dim: 8}"], {"name": "none", "dropout": 0.2, "embed_dim": 8}),
        (["conditioner.embed_dim=8", "conditioner.name=none"], {"name": "none", "dropout": 0.2, "embed_dim": 8}),
        (["conditioner.name=cloob"], {"name": "cloob", "weights": "cloob/vit_b_16_laion400m_16e", "dropout": 0.2}),
        (["conditioner={dropout: 0.5}"], {"name": "cloob", "weights": "cloob/vit_b_16_laion400m_16e", "dropout": 0.5}),
        (["conditioner={name: clip, model: ViT-B-32}"], {"name": "clip", "dropout": 0.2, "model": "ViT-B-32"}),
    ],
)
def test_what_belongs_to_the_weights_of_the_part_before_is_left_behind(overrides, conditioner):
    assert config.load(YFCC, ["data.shards=x", *overrides])["conditioner"] == conditioner


def test_the_rule_holds_for_all_sections_and_inside_them(tmp_path):
    loaded = config.load(YFCC, ["data={name: folder, path: /data}", "autoencoder.name=identity"])
    assert "shards" not in loaded["data"] and loaded["data"]["image_size"] == 256
    assert loaded["autoencoder"] == {"name": "identity"}, "neither weights nor their latents' deviation"
    loaded = config.load(YFCC, ["data.shards=x", "demo.sampling.sampler={name: ddim, eta: 0.5}"])
    assert loaded["demo"]["sampling"]["sampler"] == {"name": "ddim", "steps": 50, "eta": 0.5}
    loaded = config.load(
        YFCC, ["data.shards=x", "demo.sampling.sampler={name: plms, variant: glide}", "demo.sampling.sampler.steps=9"]
    )
    assert loaded["demo"]["sampling"]["sampler"] == {"name": "plms", "steps": 9, "variant": "glide"}
    (tmp_path / "run.yaml").write_text(f"defaults: {YFCC}\ndata: {{name: folder, path: /data}}\n")
    assert "shards" not in config.load(tmp_path / "run.yaml")["data"], "as a YAML does it"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.shards=a.tar", "data.path=b"], "data.path: no such key: 'path' of data.name=webdataset"),
        (["data.shards=a.tar", "data.path=b"], "data.name=folder, data.name=image_list have it"),
        (["data.shards=0.tar", "data.shards=1.tar"], "data.shards: is given 2 times ('data.shards=0.tar', "),
        (["data.shards=0.tar", "data.shards=1.tar"], "put quotes around it, data.shards='...'"),
    ],
)
def test_keys_of_other_parts_and_keys_given_twice(overrides, words):
    with pytest.raises(UserError) as error:
        config.load(YFCC, overrides)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=[1, 2]"], "'data=[1, 2]': data is a section of key: value lines, and a list is given, [1, 2]"),
        (["demo.sampling=[a]"], "demo.sampling is a section of key: value lines, and a list is given"),
        (["optim.betas.0=0.5"], "optim.betas is a list, [0.9, 0.999], and a section is given; give all of the list"),
        (
            ["trainer.max_epochs=3"],
            "trainer.max_epochs: no such key: a run's length is in optimizer steps",
        ),
        (["trainer.max_epochs=3", "trainer.max_steps=5"], "trainer.max_epochs: no such key: a run's length"),
        (["trainer.precision=half"], "'64-true', '32', '16', '64', 'bf16' is needed, not 'half'"),
        (["data.rules.foo=1"], "data.rules.foo: no such rule: 'foo'. Known: aesthetic"),
        (["data.rules.slur=null"], "data.rules.slur: no such rule: 'slur'. Did you mean 'slurs'?"),
        (["data.rules.nsfw=1"], "data.rules.nsfw: options are needed, such as data.rules.nsfw={}, not 1"),
        (["condition_sources.clip=null"], "condition_sources.clip: no such condition source: 'clip'"),
        (
            [f"data.shards=/d/{n}.tar" for n in range(4)],
            "a shell makes several words of an unquoted {0..3}: put quotes",
        ),
    ],
)
def test_one_line_for_each_of_these(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config.load(YFCC, ["data.shards=x.tar", *overrides] if "data.shards" not in overrides[0] else overrides)
    assert "\n" not in str(error.value)


def test_lists_and_sections_of_two_files_do_not_mix(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {name: folder, path: x}\nautoencoder: {name: kl_f8, ch_mult: [1, 2]}\n")
    for text, words in (
        ("data: [1]", "data is a section"),
        ("autoencoder: {ch_mult: {a: 1}}", "ch_mult is a list, [1, 2]"),
    ):
        (tmp_path / "over.yaml").write_text(f"defaults: base.yaml\n{text}\n")
        with pytest.raises(UserError, match=rf"over\.yaml: (autoencoder\.)?{re.escape(words)}") as error:
            config.load(tmp_path / "over.yaml")
        assert "\n" not in str(error.value)


def test_values_of_the_environment_are_read_as_their_options_take_them(monkeypatch):
    """A variable is text; what the option takes decides, in sections, mappings and lists, and a name stays a name."""
    for name, value in {"N": "4", "LR": "3e-6", "YES": "true", "A": "0.5", "PART": "ddim"}.items():
        monkeypatch.setenv(name, value)
    loaded = config.load(
        YFCC,
        [
            "data.shards=x.tar", "run=${oc.env:N}", "seed=${oc.env:N}", "trainer.max_steps=${oc.env:N}",
            "data.flip=${oc.env:YES}",
            "optim.lr=${oc.env:LR}", "optim.betas=['${oc.env:A}', 0.9]",
            "data.rules.aesthetic.above=${oc.env:N}", "demo.sampling.sampler.name=${oc.env:PART}",
            "demo.sampling.sampler.steps=${oc.env:N}", "demo.sampling.size=${oc.env:N}",
        ],
    )  # fmt: skip
    assert (loaded.run, loaded.seed) == ("4", 4) and type(loaded.seed) is int
    assert loaded["trainer"]["max_steps"] == 4 and loaded["optim"]["lr"] == 3e-6 and loaded["data"]["flip"] is True
    assert loaded["optim"]["betas"] == [0.5, 0.9]
    assert loaded["data"]["rules"]["aesthetic"]["above"] == 4
    assert loaded["demo"]["sampling"]["sampler"] == {"name": "ddim", "steps": 4}
    with pytest.raises(UserError, match=r"trainer\.max_steps: whole number .* is needed, not '0.5'"):
        config.load(YFCC, ["data.shards=x.tar", "trainer.max_steps=${oc.env:A}"])
    with pytest.raises(UserError, match="Environment variable 'NOT_THERE' not found"):
        config.load(YFCC, ["data.shards=x.tar", "seed=${oc.env:NOT_THERE}"])
    assert type(config.load(YFCC, ["data.shards=${oc.env:N}.tar"])["data"]["shards"]) is str


def test_one_grammar_for_all_words():
    words = ["a=3e-5", "b=50_000", "c=null", "d=[1, x]", "e=x=y", "f={g: 1.5}", "h=", "i='3'"]
    wanted = {"a": 3e-5, "b": 50_000, "c": None, "d": [1, "x"], "e": "x=y", "f": {"g": 1.5}, "i": "3", "h": None}
    assert overrides.values(words, "a=1") == wanted
    for word in ("a", "=1", "a=[1"):
        with pytest.raises(UserError, match=re.escape(repr(word))):
            overrides.values([word], "a=1")
    with pytest.raises(UserError, match="a: is given 2 times"):
        overrides.values(["a=1", "a=2"], "a=1")


def test_rules_across_keys_are_asked_before_anything_is_read(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = ["ema.decay=[0.9]", "checkpoint={every: 10, keep_every: 15}", "denoiser.base_channels=8"]
    code, _, err = program("train", "--config", YFCC, "data.shards=nowhere.tar", *wrong)
    assert code == 2 and err.startswith("error: 3 problems in the config:")
    assert "ema.decay: 1 values for 3 values of from_step" in err
    assert "checkpoint.keep_every: 15 is not a multiple of every (10)" in err
    assert "denoiser.base_channels: 8 makes a level 32 wide" in err and not list(tmp_path.iterdir())


def test_a_run_s_config_is_the_same_again_from_plain_data():
    loaded = config.load(YFCC, ["data.shards=x", "init_from=a.pth", "ema=null"])
    assert (loaded.run, loaded.task, loaded.seed, loaded.init_from) == ("yfcc_cfg", "diffusion", 0, "a.pth")
    assert RunConfig.from_dict(loaded.to_dict()) == loaded and "ema" not in loaded
    assert loaded["autoencoder"].use == AutoencoderUse(weights="kl-f8", latent_std=2.55)
    assert loaded["conditioner"].use_as(ConditionerUse).dropout == 0.2
    assert loaded["denoiser"].architecture() == loaded["denoiser"] and loaded.part("resume") == {}
    changed = loaded.with_part("autoencoder", loaded["autoencoder"].with_use(latent_mean=[0.1, 0.2]))
    assert changed.to_dict()["autoencoder"]["latent_mean"] == [0.1, 0.2] and loaded["autoencoder"].use.weights
    with pytest.raises(UserError, match=r"cache\.folder: has to be given"):
        loaded.part("cache").build()


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        (PositiveInt, 0, "at least 1 is needed, not 0"),
        (PositiveInt, "a", "whole number (at least 1) is needed, not 'a'"),
        (PositiveFloat, 0, "a number above 0 is needed, not 0"),
        (Share, 1.5, "a number from 0 to 1 is needed, not 1.5"),
        (Share | None, 2, "a number from 0 to 1 is needed, not 2"),
        (ShareBelowOne, 1, "a number from 0 to less than 1 is needed, not 1"),
        (PositiveInt | Literal[-1], -2, "at least 1 or -1 is needed, not -2"),
        (Annotated[list[PositiveInt], Len(2)], [1], "2 or more entries are needed, not [1]"),
        (Annotated[list[PositiveInt], Len(2, 2)], [1], "2 entries are needed, not [1]"),
        (list[PositiveInt], [1, 0], "list of whole numbers (at least 1) is needed, not [1, 0]"),
        (Share, float("nan"), "number (from 0 to 1) is needed, not nan"),
        (Share, True, "number (from 0 to 1) is needed, not True"),
    ],
)
def test_bounds_in_words(annotation, value, words):
    assert bounds.problem(value, annotation) == words


def test_a_missing_file_names_its_neighbors(tmp_path):
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


def test_what_has_to_be_given_may_stand_in_braces(tmp_path):
    (tmp_path / "run.yaml").write_text("a: ???\nb: {c: ???, d: [1, ???]}\n")
    with pytest.raises(UserError, match=r"run\.yaml: has to be given: a, b\.c, b\.d\[1\]"):
        config.read(tmp_path / "run.yaml")
    given = config.read(tmp_path / "run.yaml", ["a=1", "b.c=2", "b.d=[3]"])
    assert given == {"a": 1, "b": {"c": 2, "d": [3]}}


def test_defaults_are_overlaid_and_may_not_go_in_circles(tmp_path):
    (tmp_path / "base.yaml").write_text(YFCC.read_text().replace("???", "a.tar"))
    (tmp_path / "child.yaml").write_text("defaults: base.yaml\nrun: child\noptim: {lr: 1.0e-4}\n")
    child = config.load(tmp_path / "child.yaml")
    assert (child.run, child["optim"]["lr"], child["optim"]["weight_decay"]) == ("child", 1e-4, 0.01)
    (tmp_path / "base.yaml").write_text("defaults: child.yaml\n")
    with pytest.raises(UserError, match="leads back"):
        config.load(tmp_path / "child.yaml")


def test_several_files_lie_below_one_another_each_once(tmp_path):
    """In the order in which they are named; what two of them share is not laid over the first one again."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(YFCC.read_text().replace("???", "a.tar"))
    (tmp_path / "sub/slow.yaml").write_text("defaults: ../base.yaml\noptim: {lr: 1.0e-4, weight_decay: 0.0}\n")
    (tmp_path / "sub/data.yaml").write_text("defaults: [../base.yaml]\ndata: {name: folder, path: /d}\nseed: 3\n")
    (tmp_path / "run.yaml").write_text("defaults: [sub/slow.yaml, sub/data.yaml]\noptim: {weight_decay: 0.5}\n")
    run = config.load(tmp_path / "run.yaml")
    assert (run["optim"]["lr"], run["optim"]["weight_decay"], run.seed) == (1e-4, 0.5, 3)
    assert run["data"].name == "folder" and "shards" not in run["data"], "another part's keys stay behind"
    assert "defaults" not in run.to_dict(), "what is stored is the merged one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: {a: b}\n", "run.yaml: defaults: a file to lie below this one is needed"),
        ("defaults: [base.yaml, 3]\n", "run.yaml: defaults: a file to lie below this one is needed"),
        ("defaults: none.yaml\n", r"none.yaml: no such config \('defaults' of .*run.yaml\). Here: "),
        ("defaults: list.yaml\n", r"list.yaml: a config is a mapping .* \('defaults' of .*run.yaml\)"),
    ],
)
def test_what_is_no_file_to_lie_below(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=message):
        config.load(tmp_path / "run.yaml")


def test_mistakes_are_named_with_the_file_below_that_they_stand_in(tmp_path):
    base = YFCC.read_text().replace("???", "a.tar").replace("multipliers:", "multiplers:")
    (tmp_path / "base.yaml").write_text(f"{base}\nnonsense: 1\n")
    (tmp_path / "run.yaml").write_text("defaults: base.yaml\noptim: {lr: fast}\n")
    with pytest.raises(UserError) as error:
        config.load(tmp_path / "run.yaml", ["seed=-1"])
    lines = {line.split(":")[0].strip(): line for line in str(error.value).splitlines()[1:]}
    assert lines["denoiser.multiplers"].endswith(f"(in {tmp_path / 'base.yaml'})")
    assert lines["nonsense"].endswith(f"(in {tmp_path / 'base.yaml'})")
    assert lines["optim.lr"].endswith("not 'fast'") and lines["seed"].endswith("not -1")


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
