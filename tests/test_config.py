import dataclasses
import os

import pytest
import torch

from qlora_helpers.config import PROFILES, RunConfig, default_profile
from qlora_helpers.errors import ConfigError

# num_epochs, effective_batch_size, warmup_ratio, max_grad_norm, max_length, r, alpha, dropout
METHOD = (3, 16, 0.06, 1.0, 256, 8, 16, 0.05, 42, ("World", "Sports", "Business", "Sci/Tech"))


def test_the_defaults_of_the_profiles():
    cpu, t4 = RunConfig.from_environment(), RunConfig(profile="t4", **PROFILES["t4"])
    small = ("cpu", "SmolLM2-135M-Instruct", "sample", 280, 40, 80, 1e-3)
    mistral = ("t4", "unsloth/mistral-7b-bnb-4bit", "fancyzhx/ag_news", 2000, 400, 7600, 2e-4)
    assert dataclasses.astuple(cpu) == small + METHOD
    assert dataclasses.astuple(t4) == mistral + METHOD


def test_json_round_trip(config):
    other = dataclasses.replace(config, learning_rate=3e-5, data="/some/where", seed=7)
    assert RunConfig.from_json(other.to_json()) == other != config


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"profile": "cpu"}', '{"labels": "ab", "x": 1}', "[" * 10**5]
)
def test_json_that_is_no_config(text):
    with pytest.raises(ConfigError, match="01_setup.ipynb"):
        RunConfig.from_json(text)


def test_the_environment_wins_over_a_choice_and_that_over_the_profile(monkeypatch):
    monkeypatch.setenv("QLORA_TRAIN_SIZE", "12")
    monkeypatch.setenv("QLORA_EPOCHS", "5")
    config = RunConfig.from_environment(train_size=16, validation_size=8)
    assert (config.train_size, config.validation_size, config.test_size) == (12, 8, 80)
    assert config.num_epochs == 5  # QLORA_EPOCHS is short for QLORA_NUM_EPOCHS


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PROFILE", "tpu", "profile is 'tpu': choose 't4' .* or 'cpu'"),
        ("EPOCHS", "0", "num_epochs is 0: it must be at least 1"),
        ("NUM_EPOCHS", "two", "QLORA_NUM_EPOCHS is 'two': it must be a whole number"),
        ("LEARNING_RATE", "fast", "QLORA_LEARNING_RATE is 'fast': it must be a number"),
        ("LEARNING_RATE", "nan", "learning_rate is nan: it must be at least 1e-09. .* is 1[.]"),
        ("SEED", str(2**32), "seed is 4294967296: it must be at least 0. .* is 4,294,967,295"),
        ("SEED", "9" * 4301, "QLORA_SEED is '9{40}' [.]{3}: it must be a whole number"),
        ("BASE_MODEL", " ", "base_model is ' ': it must be more than spaces"),
        ("TRIAN_SIZE", "9", r"QLORA_TRIAN_SIZE is not .* Did you mean QLORA_TRAIN_SIZE\?"),
        ("WORKSPASE", "x", r"QLORA_WORKSPASE is not .* Did you mean QLORA_WORKSPACE\?"),
        ("X" * 40, "x", r"QLORA_X{40} is not a setting\.$"),
        ("DRIVE", "no", r"QLORA_DRIVE is 'no': it must be 1 \(Google Drive.* or 0"),
        ("DATA", "no/a.csv", "data is '/.*/no/a.csv', which is not here. Give a folder that holds"),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(monkeypatch, variable, value, message):
    monkeypatch.setenv(f"QLORA_{variable}", value)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_environment()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"num_epoch": 3}, "unknown setting 'num_epoch'. The settings are: .*num_epochs"),
        ({"train_size": "two"}, "train_size is 'two': it must be a whole number"),
    ],
)
def test_a_bad_choice_in_the_notebook_is_named(choice, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_environment(**choice)


@pytest.mark.parametrize("value", [-1, 10**30])
def test_every_number_has_bounds(config, value):
    numbers = [f for f in dataclasses.fields(config) if f.type in (int, float)]
    for field in numbers:
        change = {field.name: field.type(value)}
        with pytest.raises(ConfigError, match=f"^{field.name} is .*: it must be .* The greatest"):
            dataclasses.replace(config, **change)
    assert len(numbers) == 13


@pytest.mark.parametrize("labels", [("a",), ("a", "a"), ("a", ""), ("a", 5), tuple("abc" * 9)])
def test_labels_are_two_or_more_different_names(config, labels):
    with pytest.raises(ConfigError, match="they must be 2 to 26 different names"):
        dataclasses.replace(config, labels=labels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="profile t4 is right where a GPU is")
def test_profile_t4_without_a_gpu(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "t4")
    with pytest.raises(ConfigError, match="profile 't4' needs a CUDA GPU.*set QLORA_PROFILE=cpu"):
        RunConfig.from_environment()


def test_the_machine_decides_where_no_profile_is_set(monkeypatch):
    monkeypatch.delenv("QLORA_PROFILE")
    assert default_profile() == ("t4" if torch.cuda.is_available() else "cpu")


def test_a_relative_folder_is_the_same_from_the_notebooks_folder(monkeypatch, tmp_path):
    for name in ("rows", "models/tiny", "notebooks"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("QLORA_DATA", "rows")
    monkeypatch.setenv("QLORA_BASE_MODEL", "models/tiny")
    for folder in (tmp_path, tmp_path / "notebooks"):
        monkeypatch.chdir(folder)
        config = RunConfig.from_environment()
        assert config == RunConfig.from_form(data="rows", base_model="models/tiny")
        assert config.data == str(tmp_path / "rows")
        assert config.base_model == str(tmp_path / "models" / "tiny")
        config.check_environment()  # the relative path asks for the same folder
    monkeypatch.setenv("QLORA_BASE_MODEL", "account/model")  # no folder: a name on the hub
    assert RunConfig.from_environment().base_model == "account/model"


def test_check_environment_refuses_a_contradiction(monkeypatch, config):
    monkeypatch.setenv("QLORA_SEED", "42")
    monkeypatch.setenv("QLORA_WORKSPACE", os.curdir)
    config.check_environment()
    monkeypatch.setenv("QLORA_EPOCHS", "4")
    message = "QLORA_NUM_EPOCHS asks for 4, .* set up with 3: run notebooks/01_setup.ipynb again"
    with pytest.raises(ConfigError, match=message):
        config.check_environment()
