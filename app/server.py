"""Start the dashboard: one process, loopback by default, hardened, without torch.

``st.App`` serves Streamlit and one route of ours for files too big for the session (a gigabyte through
``st.download_button`` costs twice that in memory; through this route nothing).
"""

from __future__ import annotations

import argparse
import base64
import gc
import hashlib
import os
import re
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import streamlit as st
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from streamlit import config

from app import engine
from app.memory import keep_small
from core.catalog.migrate import prepare_apart
from core.jobs.supervisor import ensure_supervisor
from core.paths import catalog_url

ROOT = Path(__file__).resolve().parents[1]
ENTRY = ROOT / "app" / "main.py"
LOOPBACK = ("localhost", "127.0.0.1")


def content_security_policy() -> str:
    """The strictest policy Streamlit runs under: own origin only, no eval, its one inline script by its hash."""
    index = (Path(st.__file__).parent / "static" / "index.html").read_text(encoding="utf-8")
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in re.findall(r"<script>(.*?)</script>", index, re.DOTALL)
    )
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' blob: {hashes}".rstrip(),
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "connect-src 'self'",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'self'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


class Hardened:
    """Middleware: refuse foreign Host names (DNS rebinding) and put the security headers on every answer.

    Pure ASGI, because a wrapper around responses would buffer the streams.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.headers = [
            (b"content-security-policy", content_security_policy().encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or websocket."""

        async def send_hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        if scope["type"] in ("http", "websocket") and not _host_allowed(scope):
            await PlainTextResponse("this host name is not allowed", 403)(scope, receive, send_hardened)
            return
        await self.app(scope, receive, send_hardened)


def _host_allowed(scope: Scope) -> bool:
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name.lower() in config.get_option("server.allowedHosts")


def artifact(request: Request) -> FileResponse:
    """Send one file of a stored artifact, by ranges if asked; anything outside the store is a 404."""
    store = engine.catalog().artifacts.root.resolve()
    path = (store / request.path_params["path"]).resolve()
    if not path.is_relative_to(store) or not path.is_file():
        raise HTTPException(404)
    return FileResponse(path, filename=path.name, content_disposition_type="attachment")


@asynccontextmanager
async def lifespan(app: st.App) -> AsyncIterator[dict[str, Any]]:
    """Start the supervisor, and freeze what importing ``app.engine`` has made permanent."""
    ensure_supervisor(catalog_url())
    # Streamlit's collections walk the heap; what was imported by now never becomes garbage.
    gc.collect()
    gc.freeze()
    threading.Thread(target=engine.warm, name="warm", daemon=True).start()
    yield {}


def build_app() -> st.App:
    """The ASGI application."""
    return st.App(
        ENTRY,
        routes=[Route("/api/artifacts/{path:path}", artifact)],
        middleware=[Middleware(Hardened)],
        lifespan=lifespan,
    )


def serve(
    host: str = "127.0.0.1", port: int = 8501, *, catalog: str | None = None, open_browser: bool = False
) -> None:
    """Serve the dashboard until stopped; ``catalog`` is a SQLAlchemy URL.

    A host other than loopback must be asked for and is then the only further name accepted; put a proxy with
    authentication before it, the dashboard has none.
    """
    if catalog:
        os.environ["SLIMSCOPE_CATALOG"] = catalog  # supervisor, workers and inspector inherit it
    keep_small()
    prepare_apart(catalog_url())
    url = f"http://{host}:{port}"
    if open_browser:
        threading.Timer(1.5, webbrowser.open, (url,)).start()
    # Streamlit looks for .streamlit/config.toml beside the program that started it: name the repository's.
    sys.argv = [str(ROOT / "slimscope")]
    build_app().run(
        config={
            "server.address": host,
            "server.port": port,
            "server.allowedHosts": sorted({*LOOPBACK, host}),
            "browser.gatherUsageStats": False,
        }
    )


def main() -> None:
    """``python -m app.server``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8501)
    parser.add_argument("--catalog", help="SQLAlchemy URL of the catalog")
    parser.add_argument("--open-browser", action="store_true")
    args = parser.parse_args()
    serve(args.host, args.port, catalog=args.catalog, open_browser=args.open_browser)


if __name__ == "__main__":
    main()
