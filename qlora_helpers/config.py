"""RunConfig: every choice of a run, checked, with its defaults for each profile."""

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_helpers.errors import ConfigError
from qlora_helpers.texts import MOST_LABELS, is_labelled_csv, read_labelled_csv

AG_NEWS = "fancyzhx/ag_news"
SAMPLE = "sample"
LABELS = ("World", "Sports", "Business", "Sci/Tech")  # of AG News and of the sample
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
PROFILES = {
    "t4": {
        "base_model": "unsloth/mistral-7b-bnb-4bit",
        "data": AG_NEWS,
        "learning_rate": 2e-4,
        "train_size": 2000,
        "validation_size": 400,
        "test_size": 7600,
    },
    "cpu": {
        "base_model": EMBEDDED_MODEL,
        "data": SAMPLE,
        "learning_rate": 1e-3,
        "train_size": 280,
        "validation_size": 40,
        "test_size": 80,
    },
}
_KINDS = {int: "a whole number", float: "a number", str: "text"}


def _number(least: float, greatest: float, **default):
    """Return a field of RunConfig with the bounds of its value."""
    return dataclasses.field(metadata={"bounds": (least, greatest)}, **default)


@dataclass(frozen=True)
class RunConfig:
    """Every choice of a run: `from_environment` makes one, from QLORA_<FIELD> for any field.

    `labels` alone come from the data. Sizes are rows, `max_length` is tokens, `warmup_ratio` is a
    share of all steps. Raises ConfigError for a value that cannot work.
    """

    profile: str
    base_model: str
    data: str
    train_size: int = _number(1, 10_000_000)
    validation_size: int = _number(1, 10_000_000)
    test_size: int = _number(1, 10_000_000)
    learning_rate: float = _number(1e-9, 1)
    num_epochs: int = _number(1, 1000, default=3)
    effective_batch_size: int = _number(1, 4096, default=16)
    warmup_ratio: float = _number(0, 0.99, default=0.06)
    max_grad_norm: float = _number(1e-9, 1e9, default=1.0)
    max_length: int = _number(32, 32_768, default=256)
    lora_r: int = _number(1, 1024, default=8)
    lora_alpha: int = _number(1, 65_536, default=16)
    lora_dropout: float = _number(0, 0.99, default=0.05)
    seed: int = _number(0, 2**32 - 1, default=42)
    labels: tuple[str, ...] = LABELS

    def __post_init__(self):
        _check_profile(self.profile)
        names = {label for label in self.labels if isinstance(label, str) and label}
        if not 2 <= len(names) == len(self.labels) <= MOST_LABELS:
            raise ConfigError(
                f"labels are {self.labels!r}: they must be 2 to {MOST_LABELS} different names."
            )
        for name in _FIELDS:
            _check(name, getattr(self, name))

    @classmethod
    def from_environment(cls, **choices) -> "RunConfig":
        """Return the profile's defaults, changed by `choices`, then by the QLORA_ variables.

        Raises ConfigError for an unknown variable or field, a value that cannot work, data that are
        not there, or profile t4 without a GPU.
        """
        choices = choices | _environment_choices()
        profile = choices.setdefault("profile", default_profile())
        _check_profile(profile)
        if profile == "t4" and not torch.cuda.is_available():
            raise ConfigError(
                "profile 't4' needs a CUDA GPU and there is none here. In Colab: Runtime > Change "
                "runtime type > T4 GPU. For the small model on the CPU, set QLORA_PROFILE=cpu."
            )
        for name in choices.keys() - _FIELDS.keys():
            raise ConfigError(f"unknown setting {name!r}. The settings are: {', '.join(_FIELDS)}.")
        for name, value in choices.items():
            _check(name, value)
        defaults = dict(PROFILES[profile])
        # The temperature and the choice of the epoch need validation rows in proportion.
        share = choices.get("train_size", 0) // 7
        defaults["validation_size"] = max(defaults["validation_size"], share)
        data = choices.get("data", defaults["data"])
        if is_labelled_csv(data) and os.path.isfile(data):
            defaults |= _labels_and_sizes(Path(data), defaults, choices)
        elif data not in (AG_NEWS, SAMPLE) and not os.path.isdir(data):
            raise ConfigError(
                f"data is {data!r}, which is not here. Give a folder that holds train.csv and "
                "test.csv in AG News' layout, or a CSV file with the header text,label, "
                f"or {SAMPLE!r} (bundled), or {AG_NEWS!r} (from the hub)."
            )
        return cls(**defaults | choices)

    @classmethod
    def from_form(cls, **answers: str) -> "RunConfig":
        """Return `from_environment` of a form's answers; "default" leaves the profile's value.

        A QLORA_ variable wins over an answer, since the other notebooks read it too, and says so.
        """
        given = {name: text for name, text in answers.items() if text not in ("default", "")}
        choices = {name: _parsed(f"{name} in the form", name, given[name]) for name in given}
        for name, value in _environment_choices().items():
            if choices.get(name, value) != value:
                variable = f"QLORA_{name.upper()} in the environment"
                print(f"{variable} is {value}: it wins over the form's {choices[name]}.")
        return cls.from_environment(**choices)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Return the config that `to_json` wrote. Raises ConfigError for text that is not one."""
        try:
            fields = json.loads(text)
            return cls(**fields | {"labels": tuple(fields["labels"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(
                f"this is not a run's config ({error}): run notebooks/01_setup.ipynb again."
            ) from error

    def check_environment(self) -> None:
        """Raise ConfigError if a QLORA_ variable asks for something other than this config."""
        for name, value in _environment_choices().items():
            if value != (own := getattr(self, name)):
                raise ConfigError(
                    f"QLORA_{name.upper()} asks for {value!r}, but this workspace was set up with "
                    f"{own!r}: run notebooks/01_setup.ipynb again, or unset the variable."
                )


_FIELDS = {field.name: field.type for field in dataclasses.fields(RunConfig)[:-1]}  # not labels
_VARIABLES = {f"QLORA_{name.upper()}": name for name in _FIELDS} | {"QLORA_EPOCHS": "num_epochs"}
# where a run lives and reports, not what it is
_NOT_FIELDS = ("QLORA_WORKSPACE", "QLORA_DRIVE", "QLORA_REPORT_TO")


def default_profile() -> str:
    """Return $QLORA_PROFILE, else "t4" where a CUDA GPU is, else "cpu"."""
    profile = os.environ.get("QLORA_PROFILE") or ("t4" if torch.cuda.is_available() else "cpu")
    _check_profile(profile)
    return profile


def drive_wanted(otherwise: bool = True) -> bool:
    """Return whether Google Drive shall hold a copy of runs: as $QLORA_DRIVE says, 1 or 0."""
    asked = os.environ.get("QLORA_DRIVE", "")
    if asked not in ("", "0", "1"):
        raise ConfigError(
            f"QLORA_DRIVE is {asked!r}: it must be 1 (Google Drive, where Colab can mount it) "
            "or 0 (the local disk)."
        )
    return asked == "1" if asked else otherwise


def tracker() -> str:
    """Return where training reports to, beside its own history: $QLORA_REPORT_TO, else "none".

    Raises ConfigError unless it is a tracker that Transformers knows and that is installed.
    """
    name = os.environ.get("QLORA_REPORT_TO") or "none"
    if name != "none":
        from transformers.integrations import get_available_reporting_integrations

        installed = get_available_reporting_integrations()
        if name not in installed:
            raise ConfigError(
                f"QLORA_REPORT_TO is {name!r}, which is not installed here, or is no tracker that "
                f"Transformers knows. Run pip install {name}, or choose one that is here: "
                f"{', '.join(['none', *installed])}."
            )
    return name


def project_folder() -> Path:
    """Return the folder that relative paths start from: above notebooks/, where Jupyter starts."""
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def workspace_folder() -> Path:
    """Return where a run lives: $QLORA_WORKSPACE, else runs/<profile>."""
    named = os.environ.get("QLORA_WORKSPACE")
    return project_folder() / (named or f"runs/{default_profile()}")


def _labels_and_sizes(path: Path, defaults: dict, choices: dict) -> dict:
    """Return the labels of a CSV file, and sizes that its rows can fill: a fifth of them tests and
    a tenth validates, and no size is above the profile's default."""
    rows = read_labelled_csv(path)
    labels = rows.attrs["labels"]
    test = min(defaults["test_size"], max(len(labels), len(rows) // 5))
    validation = min(defaults["validation_size"], max(1, len(rows) // 10))
    sizes = {"test_size": test, "validation_size": validation} | choices
    train = len(rows) - sizes["test_size"] - sizes["validation_size"]
    sizes["train_size"] = max(1, min(defaults["train_size"], train))
    return sizes | {"labels": labels}


def _check(name: str, value) -> None:
    """Raise ConfigError if the field `name` cannot have `value`."""
    kind, bounds = _FIELDS[name], RunConfig.__dataclass_fields__[name].metadata.get("bounds")
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ConfigError(f"{name} is {value!r}: it must be {_KINDS[kind]}.")
    if kind is str and not value.strip():
        raise ConfigError(f"{name} is {value!r}: it must be more than spaces.")
    if bounds and not bounds[0] <= value <= bounds[1]:
        words = f"at least {bounds[0]:,}. The greatest possible value is {bounds[1]:,}."
        raise ConfigError(f"{name} is {value!r}: it must be {words}")


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ConfigError(
            f"profile is {profile!r}: choose 't4' (a CUDA GPU, Mistral-7B) or 'cpu' (no GPU, the "
            "small embedded model), or leave QLORA_PROFILE unset to let the machine decide."
        )


def _environment_choices() -> dict:
    """Return the values of the fields that QLORA_ variables set."""
    drive_wanted()  # refuses a value that cannot work
    tracker()  # so does this
    choices = {}
    for variable, text in sorted(os.environ.items()):
        if not variable.startswith("QLORA_") or variable in _NOT_FIELDS or not text:
            continue
        if variable not in _VARIABLES:
            similar = difflib.get_close_matches(variable, [*_VARIABLES, *_NOT_FIELDS], 1)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise ConfigError(f"{variable} is not a setting.{hint}")
        choices[_VARIABLES[variable]] = _parsed(variable, _VARIABLES[variable], text)
    return choices


def _parsed(where: str, name: str, text: str):
    """Return `text` as the value of the field `name`; a path becomes absolute."""
    if name in ("data", "base_model") and text not in (AG_NEWS, SAMPLE, EMBEDDED_MODEL):
        path = os.path.abspath(project_folder() / text)
        # A base model that is not a folder is a name on the hub.
        if name == "data" or os.path.isdir(path):
            return path
    kind = _FIELDS.get(name, str)
    try:
        return kind(text)
    except ValueError:
        shown = repr(text) if len(text) <= 40 else f"{text[:40]!r} ..."
        raise ConfigError(f"{where} is {shown}: it must be {_KINDS[kind]}.") from None
