"""The doctor: on this machine, and on simulated ones."""

import dataclasses
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import psutil
import pytest
import torch
from huggingface_hub import constants
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    MistralConfig,
    MistralForCausalLM,
)

from qlora_helpers import RunConfig, Workspace
from qlora_helpers.colab import doctor, drive, hub_token, machine, reach, versions
from qlora_helpers.colab.doctor import examine, findings_table, require_ok
from qlora_helpers.colab.estimates import (
    bytes_written,
    expected_plan,
    minutes,
    model_size,
    rows_on_cpu,
)
from qlora_helpers.colab.mirror import Mirror
from qlora_helpers.config import AG_NEWS, PROFILES
from qlora_helpers.errors import ConfigError, PreflightError
from qlora_helpers.model import embedded_checkpoint, load_base_model

ROOT = Path(__file__).parents[1]
T4 = RunConfig(profile="t4", **PROFILES["t4"])
MISTRAL = T4.base_model


@pytest.fixture
def t4(monkeypatch):
    """A machine that says it has a T4, and enough free host memory and disk. The context that a
    process opens on a T4 takes some of its memory."""
    for name, answer in {
        "is_available": True,
        "get_device_name": "Tesla T4",
        "get_device_capability": (7, 5),
        "memory_reserved": 0,
        "mem_get_info": (int(14.6 * 2**30), int(14.74 * 2**30)),
        "get_per_process_memory_fraction": 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * 2**30))
    measure = shutil.disk_usage

    def disk_usage(path):
        found = measure(path)
        # a small one is a test's own
        return found if found.total < 2**30 else SimpleNamespace(free=10**11)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


@pytest.fixture
def a_colab(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "colab")
    monkeypatch.setattr(machine, "CONTENT", tmp_path / "content")
    monkeypatch.setattr(drive, "_without", "credential propagation was unsuccessful")
    monkeypatch.setattr(hub_token, "_found", None)
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    monkeypatch.delenv("QLORA_PROFILE")
    before = set(sys.modules)
    yield
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "google" and name not in before
    ]:
        del sys.modules[name]


class _Hub(BaseHTTPRequestHandler):
    """What `hub` holds: of each path a status, headers and content; None is never answered."""

    def do_GET(self):
        answer = self.server.holds.get(
            self.path.partition("?")[0], (404, {"X-Error-Code": "RepoNotFound"}, {})
        )
        if answer is None:
            self.server.ended.wait(300)
            return
        status, headers, content = answer
        self.server.tokens.append(self.headers.get("Authorization"))
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def _repository(name: str, files: dict[str, int], gated=False) -> dict:
    return {
        "id": name,
        "sha": "c0ffee",
        "gated": gated,
        "siblings": [{"rfilename": file, "size": size} for file, size in files.items()],
    }


BASE_FILES = {
    "model.safetensors": 4_130_000_000,
    "config.json": 1000,
    "tokenizer.json": 3_000_000,
    "tokenizer.model": 500_000,
    "consolidated.safetensors": 4_130_000_000,
    "pytorch_model.bin": 4_000_000_000,
    "onnx/model.safetensors": 10**9,
    "README.md": 9,
    "pytorch_model.bin.index.json": 10**6,
    "mistral.Q4_K_M.gguf": 4 * 10**9,
}
DATA_FILES = {
    "data/train-00000-of-00001.parquet": 18_600_000,
    "data/test-00000-of-00001.parquet": 1_230_000,
    "README.md": 8000,
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the profile's model and data, on this machine; an empty hub cache; no token."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.ended, server.tokens, server.holds = (
        threading.Event(),
        [],
        {
            f"/api/models/{MISTRAL}": (200, {}, _repository(MISTRAL, BASE_FILES)),
            f"/api/datasets/{AG_NEWS}": (200, {}, _repository(AG_NEWS, DATA_FILES)),
        },
    )
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    # what is answered is in time, on a busy machine too
    monkeypatch.setattr(reach, "HUB_SECONDS", 300.0)
    monkeypatch.setenv("HF_TOKEN", "hf_not_kept")
    monkeypatch.delenv("HF_TOKEN")
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def _by_area(config: RunConfig, workspace: Path, **options) -> dict[str, doctor.Finding]:
    return {one.area: one for one in examine(config, Workspace(workspace), **options)}


def test_without_a_gpu_and_a_network_the_embedded_model_needs_nothing(
    workspace, config, monkeypatch
):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("it asked the network"))
    for slow in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(
            slow, "from_pretrained", lambda *a, **k: pytest.fail("it loaded something")
        )
    findings = examine(config, Workspace(workspace))
    assert {one.area for one in findings if one.verdict == "stop"} == set()
    assert [one.area for one in findings] == [
        "GPU",
        "host memory",
        "versions",
        "base model",
        "data",
        "disk, downloads",
        "disk, run",
        "workspace",
        "batch plan, expected",
        "minutes",
    ]
    require_ok(findings)
    found = {one.area: one.found for one in findings}
    assert re.fullmatch(r"none: profile cpu runs in float32 on \d+ cores", found["GPU"])
    assert found["batch plan, expected"] in (
        f"{rows} rows at once; 03 tries it" for rows in (8, 16)
    )
    assert found["minutes"] == "01: 1, 02: 1, 03: 5, 04: 2, 05: 1 (two CPU cores, measured)"
    assert not workspace.exists()


def test_a_t4_with_the_hub(t4, hub, workspace):
    found = _by_area(T4, workspace)
    assert {area: one.verdict for area, one in found.items() if one.verdict != "ok"} == {}
    assert (
        found["GPU"].found
        == "Tesla T4 (capability 7.5) is older than Ampere and has no bfloat16: runs in float16"
    )
    assert found["GPU memory"].found == "14.6 GiB free; the model takes 3.84 GiB in 4 bits"
    assert found["base model"].found == f"{MISTRAL}: on the hub, 4.13 GB: 4.13 GB to download"
    assert found["data"].found == f"{AG_NEWS}: on the hub, 20 MB: 20 MB to download"
    assert found["hub token"].found == "none" and set(hub.tokens) == {None}
    assert (
        "4.15 GB to download" in found["disk, downloads"].found
        and "1.09 GB to write" in found["disk, run"].found
    )
    assert re.match(
        r"16 rows at once, about (9|10|11) of 32 layers checkpointed on the longest",
        found["batch plan, expected"].found,
    )
    assert found["minutes"].found == (
        "01: 1, 02: 2, 03: 18, 04: 21, 05: 4 (a T4, by a rehearsal on another GPU and a T4's rows a second on paper)"
    )


def test_colab_without_a_gpu_says_how_to_choose_one(a_colab, workspace):
    config = RunConfig.from_environment()
    findings = examine(config, Workspace(workspace), "default")
    with pytest.raises(PreflightError) as raised:
        require_ok(findings)
    assert str(raised.value) == (
        "this run cannot go on here, and nothing was written.\n- GPU: none in this runtime. Runtime > Change runtime type > T4 GPU, then "
        "Runtime > Run all. Or, to run the small model on the CPU, choose PROFILE cpu in the form (or set QLORA_PROFILE=cpu) and run all "
        "again."
    )


@pytest.mark.parametrize("by", ["form", "variable"])
def test_colab_goes_on_without_a_gpu_if_asked(a_colab, workspace, monkeypatch, by):
    if by == "variable":
        monkeypatch.setenv("QLORA_PROFILE", "cpu")
    found = _by_area(
        RunConfig.from_form(profile="cpu"), workspace, profile="cpu" if by == "form" else "default"
    )
    assert found["GPU"].verdict == "ok"
    assert (
        found["workspace"].verdict == "warning"
        and "machines of their own and will not find it" in found["workspace"].remedy
    )


def test_a_secret_that_does_not_come_is_a_warning(a_colab, t4, hub, workspace, monkeypatch):
    monkeypatch.setenv("FAKE_SECRET", "late")
    token = _by_area(T4, workspace)["hub token"]
    assert token.verdict == "warning"
    assert token.found.startswith(
        "none (Colab's secret HF_TOKEN did not come (Requesting secret HF_TOKEN timed"
    )
    assert token.remedy.startswith(
        "If the base model asks for a token: the key in Colab's left margin, add HF_TOKEN"
    )


REFUSED = (
    401,
    {"X-Error-Message": "Invalid credentials in Authorization header"},
    {"error": "Invalid credentials"},
)
GATED = (
    403,
    {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"},
    {"error": "restricted"},
)


@pytest.mark.parametrize(
    ("answer", "found", "remedy"),
    [
        (
            (404, {"X-Error-Code": "RepoNotFound"}, {}),
            "the hub has no such model, or it is private",
            "a private one needs a token (HF_TOKEN)",
        ),
        (
            (401, {"X-Error-Code": "RepoNotFound"}, {}),
            "the hub has no such model, or it is private",
            "Check the name",
        ),
        (
            REFUSED,
            "the hub refuses the token",
            "Make a new one, to read, at https://huggingface.co/settings/tokens; or remove HF_TOKEN",
        ),
        (
            (503, {}, {}),
            "not in the hub cache, and the hub cannot be reached (it answers 503)",
            "Check the connection and run again",
        ),
        (
            None,
            "not in the hub cache, and the hub cannot be reached (no answer within 0.5 s)",
            "name a folder in QLORA_BASE_MODEL",
        ),
        (
            (200, {}, _repository(MISTRAL, {"pytorch_model.bin": 1})),
            "it holds no weights as safetensors",
            "Choose another one",
        ),
    ],
)
def test_a_model_that_cannot_be_had_stops_with_its_remedy(
    t4, hub, workspace, monkeypatch, answer, found, remedy
):
    hub.holds[f"/api/models/{MISTRAL}"] = answer
    if answer is None:
        monkeypatch.setattr(reach, "HUB_SECONDS", 0.5)
        # the answer for the data may be late as well
        _keep("dataset", AG_NEWS, dict.fromkeys(DATA_FILES, "rows"))
    if answer is REFUSED:
        monkeypatch.setenv("HF_TOKEN", "hf_old")
    findings = examine(T4, Workspace(workspace))
    with pytest.raises(
        PreflightError,
        match=re.escape(f"- base model: {MISTRAL}: {found}. ") + ".*" + re.escape(remedy),
    ):
        require_ok(findings)
    assert {one.area for one in findings if one.verdict == "stop"} == {"base model"}


@pytest.mark.parametrize("token", [None, "hf_accepted"])
def test_a_gated_model_needs_a_token_whose_owner_accepted(t4, hub, workspace, monkeypatch, token):
    gated = dataclasses.replace(T4, base_model="mistralai/Mistral-7B-v0.1")
    shards = {
        "model-00001-of-00002.safetensors": 9_940_000_000,
        "model-00002-of-00002.safetensors": 4_540_000_000,
        "config.json": 600,
        "tokenizer.model": 500_000,
    }
    hub.holds |= {
        f"/api/models/{gated.base_model}": (
            200,
            {},
            _repository(gated.base_model, shards, gated="auto"),
        ),
        f"/api/models/{gated.base_model}/auth-check": (200, {}, {}) if token else GATED,
    }
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    found = _by_area(gated, workspace)
    if token:
        assert (
            found["base model"].found.endswith("on the hub, 14.48 GB: 14.48 GB to download")
            and f"Bearer {token}" in hub.tokens
        )
        assert found["hub token"].found == "from HF_TOKEN in the environment"
        assert found["GPU memory"].found.endswith("takes 3.84 GiB in 4 bits")
    else:
        assert found["base model"].verdict == "stop" and found["base model"].remedy.startswith(
            "Accept them at https://huggingface.co/mistralai/Mistral-7B-v0.1 and give that account's read token as Colab's secret HF_TOKEN"
        )


def _keep(kind: str, name: str, files: dict[str, str]) -> Path:
    """Files in the hub cache as huggingface_hub lays it out."""
    root = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    for file, content in files.items():
        path = root / "snapshots" / "c0ffee" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("c0ffee")
    return root / "snapshots" / "c0ffee"


def test_offline_a_run_on_the_hub_is_stopped_and_what_is_cached_is_ok(t4, hub, workspace):
    hub.shutdown()
    hub.server_close()
    found = _by_area(T4, workspace)
    for area, remedy in (
        ("base model", "set QLORA_PROFILE=cpu, which needs no network"),
        ("data", "or to sample, which is bundled"),
    ):
        assert found[area].verdict == "stop" and remedy in found[area].remedy
        assert "the hub cannot be reached (ConnectError)" in found[area].found
    index = json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    )
    model = _keep(
        "model",
        MISTRAL,
        {
            "config.json": "{}",
            "tokenizer.json": "{}",
            "model-00001-of-00002.safetensors": "w",
            "model.safetensors.index.json": index,
        },
    )
    data = _keep("dataset", AG_NEWS, {"data/train-00000-of-00001.parquet": "rows"})
    assert [_by_area(T4, workspace)[area].verdict for area in ("base model", "data")] == [
        "stop",
        "stop",
    ]  # a part of each
    (model / "model-00002-of-00002.safetensors").write_text("w")
    (data / "data" / "test-00000-of-00001.parquet").write_text("rows")
    found = _by_area(T4, workspace)
    assert {one.verdict for one in found.values()} == {"ok"}
    assert found["base model"].found == f"{MISTRAL}: in the hub cache: no network needed"


def test_what_the_cache_holds_is_not_downloaded_again(t4, hub, workspace):
    _keep("model", MISTRAL, {"model.safetensors": "w", "config.json": "{}", "tokenizer.model": "t"})
    assert (
        _by_area(T4, workspace)["base model"].found
        == f"{MISTRAL}: on the hub, 4.13 GB: 3 MB to download"
    )


def test_a_disk_that_is_too_small_stops(t4, hub, workspace, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(small)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small / "hub"))
        found = _by_area(T4, workspace)
        assert (found["disk, downloads"].verdict, found["disk, run"].verdict) == ("stop", "ok")
        assert found["disk, downloads"].found == "0.1 GB free, 4.15 GB to download"
        assert found["disk, downloads"].remedy == "Make room for 4.2 GB and half as much again."
        assert (
            _by_area(T4, small / "run")["disk, run"].remedy
            == "Make room for 5.2 GB and half as much again."
        )  # both, on one disk
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        areas = {one.area: one for one in examine(T4, Workspace(workspace, Mirror(small, "run")))}
        assert areas["disk, Google Drive"].verdict == "warning"
        assert areas["disk, Google Drive"].remedy.endswith(
            "When Drive is full, the run goes on on this machine's own disk."
        )
        assert areas["workspace"].found.endswith(", copied to Google Drive")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_too_little_gpu_memory_stops(t4, hub, workspace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (4 * 2**30, 14 * 2**30))
    found = _by_area(T4, workspace)
    assert found["GPU memory"].verdict == "stop" and found["GPU memory"].remedy.startswith(
        "5.5 GiB are needed: Runtime > Restart session"
    )
    assert found["batch plan, expected"].found == "03 tries it on the model itself"


# Versions


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that puts a package's metadata, of some version, before those that are installed."""

    def install(name: str, version: str) -> None:
        folder = tmp_path / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        monkeypatch.syspath_prepend(tmp_path / "site")

    return install


def test_a_version_below_its_floor_stops(pretend, config, workspace):
    pretend("peft", "0.17.0")
    found = _by_area(config, workspace)["versions"]
    assert (found.verdict, found.found) == ("stop", "peft 0.17.0 (needed: >=0.20)")
    assert (
        found.remedy
        == '%pip install --upgrade "peft>=0.20", then Runtime > Restart session and run all.'
    )


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("99.0", "torch 99.0 (tested up to 2.13.0)"),
        ("2.9.1+cu126", "torch 2.9.1 (tested from 2.11.0)"),
    ],
)
def test_a_version_that_was_not_tested_is_a_warning(pretend, config, workspace, version, said):
    pretend("torch", version)
    found = _by_area(config, workspace)["versions"]
    assert (found.verdict, found.found) == ("warning", said)


def test_colabs_build_of_the_oldest_tested_torch_is_ok(pretend, config, workspace):
    pretend("torch", "2.11.0+cu128")
    assert _by_area(config, workspace)["versions"].verdict == "ok"


@pytest.mark.parametrize(("index", "name"), [(1, "constraints.txt"), (0, "constraints-colab.txt")])
def test_the_tested_versions_are_those_of_the_constraints(index, name):
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not there")
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / name).read_text(), flags=re.M))
    tested = {
        package: both[index]
        for package, both in versions.TESTED.items()
        if both[index] and package in pinned
    }
    if index == 0:  # the CPU build that is tested in its place may be another
        tested.pop("torch", None)
    assert tested == {package: pinned[package] for package in tested} and len(tested) > 8


def test_floors_are_those_of_the_requirements():
    assert (
        Version("0.20") in versions.floors()["peft"].specifier
        and "torch" not in versions.floors()
        and "nbval" not in versions.floors()
    )


# Estimates, against what the README reports


def test_the_expected_plan_is_near_the_measured_ones():
    rows = re.findall(
        r"^\| ([\d.]+) \| (\d+) \| (\d+)(?: of 32)? \| [\d.]+ \| [\d.]+ \|$",
        (ROOT / "README.md").read_text(),
        flags=re.M,
    )
    assert len(rows) == 6
    size = model_size(MistralConfig())
    for gib, micro, layers in rows:
        expected = expected_plan(size, T4, float(gib))
        assert expected[0] == int(micro) and abs(expected[1] - int(layers)) <= 2, (gib, expected)
    assert [rows_on_cpu(T4, gib) for gib in (4, 2, 0.3, 0.1)] == [16, 8, 2, None]
    assert (
        expected_plan(size, T4, 4.0) == (0, 32)
        and expected_plan(dataclasses.replace(size, layers=16), T4, 40) is None
    )


def test_the_minutes_are_those_of_the_readme():
    said = re.findall(
        r"^\| (\d\d)_\w+ \|.*\| (\d+) \| \[!", (ROOT / "README.md").read_text(), flags=re.M
    )
    assert len(said) == 5
    expected = minutes(T4, 4_130_000_000)
    for name, count in said:
        assert abs(expected[name] - int(count)) <= 1.5, name
    assert minutes(dataclasses.replace(T4, num_epochs=6), 0)["03"] > 1.7 * minutes(T4, 0)["03"]


def test_sizes_are_those_of_the_models(tmp_path):
    shape = MistralConfig(
        vocab_size=500,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
    )
    MistralForCausalLM(shape).save_pretrained(tmp_path)
    model = load_base_model(dataclasses.replace(T4, base_model=str(tmp_path)))
    layers = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    stored = sum(
        w.nbytes + w.quant_state.absmax.nbytes + w.quant_state.state2.absmax.nbytes for w in layers
    )
    size, mistral = model_size(shape), model_size(MistralConfig())
    assert size.linear * 4.127 / 8 == pytest.approx(stored, rel=0.01)
    assert size.other == sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in layers)
    assert (
        model_size(AutoConfig.from_pretrained(embedded_checkpoint())).lora * 8 == 2_442_240
    )  # what 03 prints
    assert model_size(CLIPConfig()) is None
    assert mistral.linear + mistral.other == 7_241_732_096 and mistral.gib == pytest.approx(
        3.84, abs=0.01
    )  # README: 3.84 GiB
    assert bytes_written(mistral, T4) == pytest.approx(1.09e9, rel=0.01)


# The form, and the table


def test_an_untouched_form_leaves_the_profiles_defaults(monkeypatch):
    monkeypatch.setenv("QLORA_EPOCHS", "2")
    form = dict.fromkeys(
        ("profile", "base_model", "train_size", "num_epochs", "learning_rate"), "default"
    )
    assert RunConfig.from_form(**form) == RunConfig.from_environment()


def test_what_is_typed_wins_over_the_profile_and_the_environment_over_that(monkeypatch, capsys):
    config = RunConfig.from_form(train_size="16", num_epochs=2, learning_rate="5e-4")
    assert (config.train_size, config.num_epochs, config.learning_rate) == (
        16,
        2,
        5e-4,
    ) and capsys.readouterr().out == ""
    monkeypatch.setenv("QLORA_EPOCHS", "3")
    assert RunConfig.from_form(num_epochs="2").num_epochs == 3
    assert (
        capsys.readouterr().out
        == "QLORA_NUM_EPOCHS in the environment is 3: it wins over the form's 2.\n"
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"num_epochs": "two"}, "num_epochs in the form is 'two': it must be a whole number."),
        ({"num_epochs": "0"}, "num_epochs is 0: it must be at least 1."),
        ({"learning_rate": "fast"}, "learning_rate in the form is 'fast': it must be a number."),
        ({"profile": "tpu"}, "profile is 'tpu': choose 't4'"),
        ({"rows": "5"}, "unknown setting 'rows'"),
    ],
)
def test_a_bad_answer_is_named(answer, message, monkeypatch):
    monkeypatch.delenv("QLORA_PROFILE")
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig.from_form(**answer)


def test_the_table_says_its_verdicts_in_words_and_colours():
    findings = [
        doctor.Finding("GPU", "none", "stop", "Choose one."),
        doctor.Finding("data", "here"),
    ]
    html = findings_table(findings).to_html()
    assert all(word in html for word in (">stop<", ">ok<", "#fbd5d5", "#d9f2d9", "Choose one."))
