"""The errors that a reader can put right: each message names the thing and the remedy."""


class QLoraError(ValueError):
    """Base of the errors below. In a notebook it shows as its message alone: a traceback would hide the remedy."""

    def _render_traceback_(self):  # IPython asks for this
        return [f"{type(self).__name__}: {self}"]


def reason(error: Exception) -> str:
    """What went wrong, in a line without the path."""
    return (
        getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    )


class ConfigError(QLoraError):
    """A setting that cannot work."""


class DataError(QLoraError):
    """Data that cannot be read, or too little of it."""


class WorkspaceError(QLoraError):
    """A file of the run is missing, changed or stale."""


class ModelError(QLoraError):
    """A base model or adapter that cannot be used."""


class TrainingStopped(QLoraError):
    """A training that was interrupted, and goes on when it is run again."""


class PreflightError(QLoraError):
    """The machine, its packages or the network lack something that this run needs."""
