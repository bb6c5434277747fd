"""All pages, and the files that they load."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app.web import account, compare, docs, jobs, library, provider, signing, submitting, webhooks
from app.web.rendering import STATIC, error_page

_KEPT = "public, max-age=31536000, immutable"  # the address has the file's digest


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = _KEPT if b"v=" in scope["query_string"] else "no-cache"
        return response


def add_pages(app: FastAPI) -> None:
    """Beside the API's own routes. `/jobs/new` is tried before `/jobs/{job_id}`."""
    modules = (signing, provider, submitting, jobs, compare, library, account, webhooks, docs)
    app.state.error_page = error_page
    app.state.pages = [route for module in modules for route in module.router.routes]
    for module in modules:
        app.include_router(module.router)
    app.mount("/static", _Files(directory=STATIC), name="static")
