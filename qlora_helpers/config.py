"""RunConfig: every choice of a run, validated, with its defaults for each profile."""

import dataclasses
import difflib
import json
import math
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
_ALIASES = {"QLORA_EPOCHS": "QLORA_NUM_EPOCHS"}
_NOT_FIELDS = {"QLORA_WORKSPACE", "QLORA_DRIVE"}  # where a run lives, not what it is
_KINDS = {int: "a whole number", float: "a number", str: "text"}
_LEAST = {"max_length": 32, "seed": 0}  # of whole numbers; 1 for the others


@dataclass(frozen=True)
class RunConfig:
    """Every choice of a run. Make one with `from_environment`; each field but `labels`, which the data bring, can be set by
    `QLORA_<FIELD>`. Sizes are rows, `max_length` is tokens, `warmup_ratio` a share of all steps. Raises ConfigError for a value
    that cannot work, before anything is loaded."""

    profile: str
    base_model: str
    data: str
    train_size: int
    validation_size: int
    test_size: int
    learning_rate: float
    num_epochs: int = 3
    effective_batch_size: int = 16
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    max_length: int = 256
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    seed: int = 42
    labels: tuple[str, ...] = LABELS

    def __post_init__(self):
        _check_profile(self.profile)
        if not (
            isinstance(self.labels, tuple)
            and 2 <= len(set(self.labels)) == len(self.labels) <= MOST_LABELS
            and all(isinstance(label, str) and label for label in self.labels)
        ):
            raise ConfigError(
                f"labels are {self.labels!r}: they must be a tuple of 2 to {MOST_LABELS} different names."
            )
        for field in dataclasses.fields(self):
            if field.name == "labels":
                continue
            name, value = field.name, getattr(self, field.name)
            if type(value) is not field.type and not (field.type is float and type(value) is int):
                raise ConfigError(f"{name} is {value!r}: it must be {_KINDS[field.type]}.")
            if field.type is str and not value.strip():
                raise ConfigError(
                    f"{name} is empty: leave it out for the default of profile {self.profile!r}."
                )
            if field.type is float and not math.isfinite(value):
                raise ConfigError(f"{name} is {value}: give a finite number.")
            if field.type is int and value < _LEAST.get(name, 1):
                raise ConfigError(f"{name} is {value}: it must be at least {_LEAST.get(name, 1)}.")
            if name in ("learning_rate", "max_grad_norm") and value <= 0:
                raise ConfigError(f"{name} is {value}: it must be above 0.")
            if name in ("warmup_ratio", "lora_dropout") and not 0 <= value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 0 and below 1.")

    @classmethod
    def from_environment(cls, **choices) -> "RunConfig":
        """The profile's defaults, then `choices`, then the environment's QLORA_ variables; the last one wins.
        Raises ConfigError for an unknown variable or field, a value of the wrong type, or profile t4 without a GPU."""
        choices = choices | _environment_choices()
        profile = choices.setdefault("profile", default_profile())
        _check_profile(profile)
        if profile == "t4" and not torch.cuda.is_available():
            raise ConfigError(
                "profile 't4' needs a CUDA GPU and there is none here. In Colab: Runtime > Change runtime type > "
                "T4 GPU. To run the small model on the CPU instead, set QLORA_PROFILE=cpu."
            )
        for name in choices.keys() - _TYPES.keys():
            raise ConfigError(f"unknown setting {name!r}. The settings are: {', '.join(_TYPES)}.")
        defaults = dict(PROFILES[profile])
        if isinstance(
            choices.get("train_size"), int
        ):  # the temperature and the choice of the epoch need validation rows in proportion
            defaults["validation_size"] = max(
                defaults["validation_size"], choices["train_size"] // 7
            )
        data = choices.get("data", defaults["data"])
        if is_labelled_csv(data) and os.path.isfile(data):
            defaults |= _of_labelled_csv(data, defaults, choices)
        config = cls(**(defaults | choices))
        if (
            config.data not in (AG_NEWS, SAMPLE)
            and not os.path.isdir(config.data)
            and not (is_labelled_csv(config.data) and os.path.isfile(config.data))
        ):
            raise ConfigError(
                f"data is {config.data!r}, which is not here. Give a folder that holds train.csv and test.csv in AG News' "
                "layout, or a CSV file with the header text,label, "
                f"or {SAMPLE!r} (bundled), or {AG_NEWS!r} (from the hub)."
            )
        return config

    @classmethod
    def from_form(cls, **answers: str) -> "RunConfig":
        """`from_environment` with the answers of a form as choices; "default" leaves the profile's. Where the environment asks for
        something else it wins, with a line that says so: the other notebooks hold to it. Raises ConfigError as `from_environment` does."""
        choices = {
            name: _parsed(f"{name} in the form", name, answer)
            for name, answer in answers.items()
            if answer not in ("default", "")
        }
        for name, value in _environment_choices().items():
            if choices.get(name, value) != value:
                print(
                    f"QLORA_{name.upper()} in the environment is {value}: it wins over the form's {choices[name]}."
                )
        return cls.from_environment(**choices)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """The config that `to_json` wrote. Raises ConfigError for text that is not one."""
        try:
            fields = json.loads(text)
            return cls(**fields | {"labels": tuple(fields["labels"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"this is not a run's config ({error}): run notebooks/01_setup.ipynb again."
            ) from error

    def check_environment(self) -> None:
        """Raise ConfigError if a QLORA_ variable asks for something other than this config holds."""
        for name, value in _environment_choices().items():
            if getattr(self, name) != value:
                raise ConfigError(
                    f"QLORA_{name.upper()} asks for {value!r}, but this workspace was set up with "
                    f"{getattr(self, name)!r}: run notebooks/01_setup.ipynb again, or unset the variable."
                )


_TYPES = {
    field.name: field.type for field in dataclasses.fields(RunConfig) if field.name != "labels"
}


def default_profile() -> str:
    """$QLORA_PROFILE, else "t4" where a CUDA GPU is there, else "cpu". Raises ConfigError for any other name."""
    profile = os.environ.get("QLORA_PROFILE") or ("t4" if torch.cuda.is_available() else "cpu")
    _check_profile(profile)
    return profile


def drive_wanted(otherwise: bool = True) -> bool:
    """$QLORA_DRIVE: 1 to keep runs on Google Drive where Colab can mount it, 0 for the local disk. Raises ConfigError for anything else."""
    asked = os.environ.get("QLORA_DRIVE", "")
    if asked not in ("", "0", "1"):
        raise ConfigError(
            f"QLORA_DRIVE is {asked!r}: it must be 1 (Google Drive, where Colab can mount it) or 0 (the local disk)."
        )
    return asked == "1" if asked else otherwise


def project_folder() -> Path:
    """What a relative path is relative to: the folder above, in a notebook that runs in notebooks/, else the current folder."""
    here = Path.cwd()  # Jupyter and nbval start a notebook in its own folder, make and a terminal one above: one run, one folder
    return here.parent if here.name == "notebooks" else here


def workspace_folder() -> Path:
    """Return where a run lives: $QLORA_WORKSPACE, else runs/<profile>."""
    named = os.environ.get("QLORA_WORKSPACE")
    return project_folder() / (named or f"runs/{default_profile()}")


def _of_labelled_csv(data: str, defaults: dict, choices: dict) -> dict:
    """The labels of a CSV file, and sizes that it can fill: a fifth to test, a tenth to validate, at most as many as the profile has."""
    rows = read_labelled_csv(Path(data))
    sizes = (
        defaults
        | {
            "test_size": min(defaults["test_size"], max(len(rows.attrs["labels"]), len(rows) // 5)),
            "validation_size": min(defaults["validation_size"], max(1, len(rows) // 10)),
        }
        | choices
    )
    left = len(rows) - sizes["test_size"] - sizes["validation_size"]
    return {
        "labels": rows.attrs["labels"],
        "test_size": sizes["test_size"],
        "validation_size": sizes["validation_size"],
        "train_size": max(1, min(defaults["train_size"], left)),
    }


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ConfigError(
            f"profile is {profile!r}: choose 't4' (a CUDA GPU, Mistral-7B) or 'cpu' (no GPU, the small "
            "embedded model), or leave QLORA_PROFILE unset to let the machine decide."
        )


def _environment_choices() -> dict:
    choices, _ = {}, drive_wanted()
    for variable in sorted(
        name
        for name in os.environ
        if name.startswith("QLORA_") and os.environ[name] and name not in _NOT_FIELDS
    ):
        text, name = (
            os.environ[variable],
            _ALIASES.get(variable, variable).removeprefix("QLORA_").lower(),
        )
        if name not in _TYPES:
            near = difflib.get_close_matches(
                variable,
                [f"QLORA_{known.upper()}" for known in _TYPES] + [*_ALIASES, *_NOT_FIELDS],
                1,
            )
            raise ConfigError(
                f"{variable} is not a setting." + (f" Did you mean {near[0]}?" if near else "")
            )
        choices[name] = _parsed(variable, name, text)
    if choices.get("data") not in (None, AG_NEWS, SAMPLE):
        choices["data"] = os.path.abspath(project_folder() / choices["data"])
    return choices


def _parsed(where: str, name: str, text: str):
    try:
        return _TYPES.get(name, str)(text)
    except ValueError:
        raise ConfigError(f"{where} is {text!r}: it must be {_KINDS[_TYPES[name]]}.") from None
