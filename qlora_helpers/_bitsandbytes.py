"""bitsandbytes, imported before anyone else does it: on a CPU with AVX512-BF16 it warns that a kernel is missing, which is not needed."""

import logging

_logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _logger.level
_logger.setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402, F401

_logger.setLevel(_level)
