"""A Colab machine, simulated (see tests/fake_colab): its secrets, and what their failures say."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from qlora_helpers import RunConfig, find_workspace
from qlora_helpers.colab.hub_token import use_token
from qlora_helpers.config import AG_NEWS, PROFILES

SECRET = "hf_" + "Secret" * 5
HUB_CONFIG = RunConfig(**PROFILES["cpu"] | {"profile": "cpu", "data": AG_NEWS})


@pytest.fixture(autouse=True)
def content(new_machine) -> Path:
    return new_machine()


def _asked() -> list:
    from google.colab import userdata

    return userdata.asked


@pytest.mark.parametrize(
    ("behaviour", "source", "note", "warning"),
    [
        (f"is {SECRET}", "Colab's secret HF_TOKEN", "", False),
        ("is ", None, "Colab's secret HF_TOKEN is empty.", False),
        ("missing", None, "Colab has no secret HF_TOKEN.", False),
        ("forbidden", None, "This notebook may not read Colab's secret HF_TOKEN.", False),
        (
            "late",
            None,
            "Colab's secret HF_TOKEN did not come (Requesting secret HF_TOKEN timed out. Secrets "
            "can only be fetched when running from the Colab UI): going on without it.",
            True,
        ),
    ],
)
def test_the_token_of_colabs_secrets(monkeypatch, capsys, behaviour, source, note, warning):
    monkeypatch.setenv("FAKE_SECRET", behaviour)
    token = use_token(HUB_CONFIG)
    assert (token.source, token.note, token.warning) == (source, note, warning)
    assert huggingface_hub.get_token() == os.environ.get("HF_TOKEN") == (SECRET if source else None)
    printed = capsys.readouterr().out
    assert ("going on without it. If the base model asks for a token" in printed) is warning
    use_token(HUB_CONFIG)
    assert _asked() == ["HF_TOKEN"] and capsys.readouterr().out == ""


def test_without_a_secret_the_environments_token_then_the_stored_one():
    os.environ["HF_TOKEN"] = SECRET
    assert use_token(HUB_CONFIG).source == "HF_TOKEN in the environment"
    del os.environ["HF_TOKEN"]
    Path(constants.HF_TOKEN_PATH).write_text(SECRET)
    assert use_token(HUB_CONFIG, again=True).source == "the stored login"
    assert "HF_TOKEN" not in os.environ


def test_no_token_is_asked_for_where_none_is_needed():
    assert use_token(RunConfig.from_environment()).note == "not needed" and not _asked()


def test_the_token_is_nowhere_written_or_printed(monkeypatch, capfd):
    monkeypatch.setenv("FAKE_SECRET", f"is {SECRET}")
    token, run = use_token(HUB_CONFIG), find_workspace()
    run.write("config.json", HUB_CONFIG.to_json())
    run.publish("01_setup", vars(HUB_CONFIG), ["config.json"])
    run.push()
    paths = [*run.path.rglob("*"), *run.mirror.folder.rglob("*")]
    written = b"".join(path.read_bytes() for path in paths if path.is_file())
    assert len(written) > 1000 and SECRET.encode() not in written
    assert SECRET not in "".join(capfd.readouterr()) + repr(token)
