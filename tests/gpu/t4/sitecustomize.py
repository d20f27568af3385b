"""Hold every Python process that has this folder on its path to a T4's terms, and note its peaks.

The terms: compute capability 7.5 for qlora_helpers, 14.4 GiB of GPU memory, no flash and no cuDNN
attention. The rest of torch sees the real card, since kernels must be compiled for it. The peaks
of GPU memory and of anonymous host memory go to $REHEARSAL_PEAKS/<process>.json.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
from pathlib import Path

GIB = 14.4
INTERVAL = 0.25  # seconds between two looks at the memory


class _TorchHook(importlib.abc.MetaPathFinder):
    """Run `_set_terms` right after the first import of torch."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        spec = importlib.machinery.PathFinder.find_spec("torch")
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _set_terms(module)

        spec.loader.exec_module = exec_module
        return spec


def _set_terms(torch) -> None:
    if os.environ.get("REHEARSAL_PEAKS"):
        threading.Thread(target=_watch, args=(torch,), daemon=True).start()
    if not torch.cuda.is_available():
        return
    real = torch.cuda.get_device_capability

    def capability(device=None):
        asked_by = sys._getframe(1).f_code.co_filename
        return (7, 5) if "qlora_helpers" in asked_by else real(device)

    torch.cuda.get_device_capability = capability
    for gpu in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(GIB * 2**30 / total, gpu)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _watch(torch) -> None:
    """Write the peaks whenever one has grown."""
    file = Path(os.environ["REHEARSAL_PEAKS"]) / f"{os.getpid()}.json"
    peaks = {"gpu_gib": 0.0, "host_gib": 0.0}
    wait = threading.Event()
    while not wait.wait(INTERVAL):
        status = Path("/proc/self/status").read_text()
        host = int(status.split("RssAnon:")[1].split()[0]) / 2**20
        gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        gpu = max((torch.cuda.max_memory_reserved(gpu) / 2**30 for gpu in gpus), default=0.0)
        higher = {"gpu_gib": max(gpu, peaks["gpu_gib"]), "host_gib": max(host, peaks["host_gib"])}
        if higher != peaks:
            peaks = higher
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(peaks))
            partial.replace(file)  # the kernel may be killed, or the file read, at any time


sys.meta_path.insert(0, _TorchHook())
