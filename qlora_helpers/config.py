"""RunConfig: every choice of a run, validated, with its defaults for each profile."""

import dataclasses
import difflib
import json
import math
import os
from dataclasses import dataclass

import torch

from qlora_helpers.errors import ConfigError

AG_NEWS = "fancyzhx/ag_news"
SAMPLE = "sample"
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"

PROFILES = {
    "t4": {
        "base_model": "unsloth/mistral-7b-bnb-4bit", "data": AG_NEWS, "learning_rate": 2e-4,
        "train_size": 2000, "validation_size": 400, "test_size": 7600,
    },
    "cpu": {
        "base_model": EMBEDDED_MODEL, "data": SAMPLE, "learning_rate": 1e-3,
        "train_size": 280, "validation_size": 40, "test_size": 80,
    },
}
_ALIASES = {"QLORA_EPOCHS": "QLORA_NUM_EPOCHS"}
_NOT_FIELDS = {"QLORA_WORKSPACE"}  # where a run lives, not what it is


@dataclass(frozen=True)
class RunConfig:
    """Every choice of a run. Make one with `from_environment`; each field can be set by `QLORA_<FIELD>`.

    Sizes are rows, `max_length` is tokens, `warmup_ratio` a share of all steps. Raises ConfigError for a value
    that cannot work, before anything is loaded.
    """

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

    def __post_init__(self):
        _check_profile(self.profile)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} is {value}: give a finite number.")
            if isinstance(value, str) and not value.strip():
                raise ConfigError(f"{field.name} is empty: leave it out for the default of profile {self.profile!r}.")
        least = dict.fromkeys(
            ["train_size", "validation_size", "test_size", "num_epochs", "effective_batch_size", "lora_r", "lora_alpha"], 1)
        for name, minimum in (least | {"max_length": 32, "seed": 0}).items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least {minimum}.")
        for name in ["learning_rate", "max_grad_norm"]:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0.")
        for name in ["warmup_ratio", "lora_dropout"]:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1.")

    @classmethod
    def from_environment(cls, **choices) -> "RunConfig":
        """The profile's defaults, then `choices`, then the environment's QLORA_ variables; the last one wins.

        Raises ConfigError for an unknown variable or field, a value of the wrong type, or profile t4 without a GPU.
        """
        choices = choices | _environment_choices(cls)
        profile = choices.setdefault("profile", default_profile())
        _check_profile(profile)
        if profile == "t4" and not torch.cuda.is_available():
            raise ConfigError("profile 't4' needs a CUDA GPU and there is none here. In Colab: Runtime > Change runtime type > "
                              "T4 GPU. To run the small model on the CPU instead, set QLORA_PROFILE=cpu.")
        unknown = set(choices) - _field_types(cls).keys()
        if unknown:
            raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}. The settings are: {', '.join(_field_types(cls))}.")
        config = cls(**(PROFILES[profile] | choices))
        if config.data not in (AG_NEWS, SAMPLE) and not os.path.isdir(config.data):
            raise ConfigError(f"data is {config.data!r}, which is not a folder here. Give a folder that holds train.csv and "
                              f"test.csv, or {SAMPLE!r} (bundled), or {AG_NEWS!r} (from the hub).")
        if os.path.isdir(config.data):
            config = dataclasses.replace(config, data=os.path.abspath(config.data))
        return config

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """The config that `to_json` wrote. Raises ConfigError for text that is not one."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"this is not a run's config ({error}): run notebooks/01_setup.ipynb again.") from error

    def check_environment(self) -> None:
        """Raise ConfigError if a QLORA_ variable asks for something other than this config holds."""
        for name, value in _environment_choices(type(self)).items():
            if name == "data" and os.path.isdir(value):
                value = os.path.abspath(value)
            if getattr(self, name) != value:
                raise ConfigError(f"QLORA_{name.upper()} asks for {value!r}, but this workspace was set up with "
                                  f"{getattr(self, name)!r}: run notebooks/01_setup.ipynb again, or unset the variable.")


def default_profile() -> str:
    """$QLORA_PROFILE, else "t4" where a CUDA GPU is there, else "cpu". Raises ConfigError for any other name."""
    profile = os.environ.get("QLORA_PROFILE") or ("t4" if torch.cuda.is_available() else "cpu")
    _check_profile(profile)
    return profile


def _check_profile(profile: str) -> None:
    if profile not in PROFILES:
        raise ConfigError(f"profile is {profile!r}: choose 't4' (a CUDA GPU, Mistral-7B) or 'cpu' (no GPU, the small "
                          "embedded model), or leave QLORA_PROFILE unset to let the machine decide.")


def _field_types(cls) -> dict[str, type]:
    return {field.name: field.type for field in dataclasses.fields(cls)}


def _environment_choices(cls) -> dict:
    types, choices = _field_types(cls), {}
    for variable, text in os.environ.items():
        if not variable.startswith("QLORA_") or variable in _NOT_FIELDS:
            continue
        name = _ALIASES.get(variable, variable).removeprefix("QLORA_").lower()
        if name not in types:
            near = difflib.get_close_matches(variable, [f"QLORA_{known.upper()}" for known in types] + [*_ALIASES, *_NOT_FIELDS], 1)
            raise ConfigError(f"{variable} is not a setting." + (f" Did you mean {near[0]}?" if near else ""))
        try:
            choices[name] = types[name](text)
        except ValueError:
            raise ConfigError(f"{variable} is {text!r}: it must be {'a whole number' if types[name] is int else 'a number'}.") from None
    return choices
