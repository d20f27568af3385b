"""Serve app.py as a page for this machine alone: what `make app` runs, with Voila's options."""

import secrets
import sys
from contextvars import ContextVar
from pathlib import Path

from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError, RequestHandler
from traitlets import Dict
from traitlets.config import Config
from voila.app import Voila

COOKIE = "qlora_ag_news_visitor"
MOST_PAGES = 3  # each has a kernel with a model of its own
IDLE_SECONDS = 600
TOO_MANY = (
    f"{MOST_PAGES} pages are open: close one and load this again. One that lost its browser is "
    f"closed after {IDLE_SECONDS // 60} minutes"
)
_visitor = ContextVar("visitor")  # whose page is being loaded


class Kernels(AsyncMappingKernelManager):
    """Starts one kernel for each visitor: loading the page again ends the one before.

    There are at most MOST_PAGES in all, counting those that are still starting.
    """

    starting = 0
    of_visitor = Dict()  # the ids of kernels

    async def start_kernel(self, **options) -> str:
        visitor = _visitor.get()
        before = self.of_visitor.pop(visitor, None)
        if before in self:
            await self.shutdown_kernel(before, now=True)
        if len(self) + self.starting >= MOST_PAGES:
            raise HTTPError(503, reason=TOO_MANY)  # Voila's page shows it
        self.starting += 1
        try:
            kernel = await super().start_kernel(**options)
        finally:
            self.starting -= 1
        self.of_visitor[visitor] = kernel
        return kernel


def receive(handler: RequestHandler, **_) -> None:
    """Note who asks for the page, by a cookie. Raise an error if a page of another site, as the
    browser says, asks for this one."""
    if handler.request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        reason = "Another site asked for this page. Type its address instead"
        raise HTTPError(403, reason=reason)
    visitor = handler.get_cookie(COOKIE) or secrets.token_hex(16)
    handler.set_cookie(COOKIE, visitor, httponly=True, samesite="Strict")
    _visitor.set(visitor)


OPTIONS = {
    "Voila": {
        "ip": "127.0.0.1",
        # Only local names are answered: another name could be made to lead here.
        "tornado_settings": {"allow_remote_access": False},
    },
    "VoilaConfiguration": {
        "extension_language_mapping": {".py": "python"},
        "multi_kernel_manager_class": Kernels,
        "prelaunch_hook": receive,
    },
    "MappingKernelManager": {"cull_idle_timeout": IDLE_SECONDS, "cull_interval": 60},
}

if __name__ == "__main__":
    page = Path(__file__).with_name("app.py")
    Voila.launch_instance([str(page), *sys.argv[1:]], config=Config(OPTIONS))
