"""The errors that a reader can put right: each message names the thing and the remedy."""


class QLoraError(ValueError):
    """Base of the errors below. A notebook shows its message alone, without a traceback."""

    def _render_traceback_(self):  # IPython calls this
        return [f"{type(self).__name__}: {self}"]


def reason(error: Exception) -> str:
    """Return what went wrong, in one line without the path."""
    lines = str(error).splitlines() or [type(error).__name__]
    return getattr(error, "strerror", None) or lines[0]


class ConfigError(QLoraError):
    """A setting that cannot work."""


class DataError(QLoraError):
    """Data that cannot be read, or too few rows."""


class WorkspaceError(QLoraError):
    """A file of the run is missing, changed or stale."""


class ModelError(QLoraError):
    """A base model or adapter that cannot be used."""


class TrainingStopped(QLoraError):
    """A training was interrupted; it goes on when it is run again."""


class PreflightError(QLoraError):
    """The machine, its packages or the network lack something that this run needs."""
