import dataclasses
import os

import pytest
import torch

from qlora_helpers.config import PROFILES, RunConfig, default_profile
from qlora_helpers.errors import ConfigError

METHOD = {
    "num_epochs": 3,
    "effective_batch_size": 16,
    "warmup_ratio": 0.06,
    "max_grad_norm": 1.0,
    "max_length": 256,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "seed": 42,
    "labels": ("World", "Sports", "Business", "Sci/Tech"),
}


def test_defaults_of_the_cpu_profile():
    assert dataclasses.asdict(RunConfig.from_environment()) == METHOD | {
        "profile": "cpu",
        "base_model": "SmolLM2-135M-Instruct",
        "data": "sample",
        "train_size": 280,
        "validation_size": 40,
        "test_size": 80,
        "learning_rate": 1e-3,
    }


def test_defaults_of_the_t4_profile():
    assert dataclasses.asdict(RunConfig(profile="t4", **PROFILES["t4"])) == METHOD | {
        "profile": "t4",
        "base_model": "unsloth/mistral-7b-bnb-4bit",
        "data": "fancyzhx/ag_news",
        "train_size": 2000,
        "validation_size": 400,
        "test_size": 7600,
        "learning_rate": 2e-4,
    }


def test_json_round_trip(config):
    other = dataclasses.replace(config, learning_rate=3e-5, data="/some/where", seed=7)
    assert RunConfig.from_json(other.to_json()) == other != config


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"profile": "cpu"}', '{"profile": "cpu", "unknown": 1}']
)
def test_json_that_is_no_config(text):
    with pytest.raises(ConfigError, match="01_setup.ipynb"):
        RunConfig.from_json(text)


def test_the_environment_wins_over_a_choice_and_that_over_the_profile(monkeypatch):
    monkeypatch.setenv("QLORA_TRAIN_SIZE", "12")
    config = RunConfig.from_environment(train_size=16, validation_size=8)
    assert (config.train_size, config.validation_size, config.test_size) == (12, 8, 80)


def test_epochs_is_an_alias_of_num_epochs(monkeypatch):
    monkeypatch.setenv("QLORA_EPOCHS", "5")
    assert RunConfig.from_environment().num_epochs == 5


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("QLORA_PROFILE", "tpu", r"profile is 'tpu': choose 't4' .* or 'cpu'"),
        ("QLORA_EPOCHS", "0", r"num_epochs is 0: it must be at least 1"),
        ("QLORA_NUM_EPOCHS", "two", r"QLORA_NUM_EPOCHS is 'two': it must be a whole number"),
        ("QLORA_LORA_R", "8.5", r"QLORA_LORA_R is '8.5': it must be a whole number"),
        ("QLORA_LEARNING_RATE", "fast", r"QLORA_LEARNING_RATE is 'fast': it must be a number"),
        ("QLORA_LEARNING_RATE", "nan", r"learning_rate is nan: give a finite number"),
        ("QLORA_LEARNING_RATE", "inf", r"learning_rate is inf: give a finite number"),
        ("QLORA_LEARNING_RATE", "0", r"learning_rate is 0.0: it must be above 0"),
        ("QLORA_LEARNING_RATE", "-1e-3", r"learning_rate is -0.001: it must be above 0"),
        ("QLORA_LORA_DROPOUT", "1", r"lora_dropout is 1.0: it must be at least 0 and below 1"),
        ("QLORA_WARMUP_RATIO", "-0.1", r"warmup_ratio is -0.1: it must be at least 0 and below 1"),
        ("QLORA_TRAIN_SIZE", "-4", r"train_size is -4: it must be at least 1"),
        ("QLORA_TEST_SIZE", "0", r"test_size is 0: it must be at least 1"),
        ("QLORA_MAX_LENGTH", "31", r"max_length is 31: it must be at least 32"),
        ("QLORA_SEED", "-1", r"seed is -1: it must be at least 0"),
        ("QLORA_BASE_MODEL", " ", r"base_model is empty: leave it out"),
        (
            "QLORA_TRIAN_SIZE",
            "9",
            r"QLORA_TRIAN_SIZE is not a setting. Did you mean QLORA_TRAIN_SIZE\?",
        ),
        (
            "QLORA_WORKSPASE",
            "x",
            r"QLORA_WORKSPASE is not a setting. Did you mean QLORA_WORKSPACE\?",
        ),
        (
            "QLORA_DATA",
            "no/such/folder",
            r"data is '.*/no/such/folder', which is not here. Give a folder that holds train.csv",
        ),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_environment()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"num_epoch": 3}, "unknown setting 'num_epoch'. The settings are: .*num_epochs"),
        ({"num_epochs": "two"}, "num_epochs"),
        ({"train_size": 2.5}, "train_size"),
    ],
)
def test_a_bad_choice_in_the_notebook_is_named(choice, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_environment(**choice)


@pytest.mark.skipif(torch.cuda.is_available(), reason="profile t4 is right where a GPU is")
def test_profile_t4_without_a_gpu(monkeypatch):
    monkeypatch.setenv("QLORA_PROFILE", "t4")
    with pytest.raises(ConfigError, match="profile 't4' needs a CUDA GPU.*set QLORA_PROFILE=cpu"):
        RunConfig.from_environment()


def test_the_machine_decides_where_no_profile_is_set(monkeypatch):
    monkeypatch.delenv("QLORA_PROFILE")
    assert default_profile() == ("t4" if torch.cuda.is_available() else "cpu")


def test_a_data_folder_is_the_same_from_the_notebooks_folder(monkeypatch, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_DATA", "rows")
    config = RunConfig.from_environment()
    assert config.data == str(tmp_path / "rows")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert RunConfig.from_environment() == config
    config.check_environment()  # the relative path asks for the same folder


def test_check_environment_refuses_a_contradiction(monkeypatch, config):
    monkeypatch.setenv("QLORA_SEED", "42")
    monkeypatch.setenv("QLORA_WORKSPACE", os.curdir)
    config.check_environment()
    monkeypatch.setenv("QLORA_EPOCHS", "4")
    with pytest.raises(
        ConfigError,
        match="QLORA_NUM_EPOCHS asks for 4, .* set up with 3: run notebooks/01_setup.ipynb again",
    ):
        config.check_environment()
