"""GET /: a page for people. It is the static files of this folder, and may load and reach nothing else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

from sglang.srt.errors import RequestError

MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text becomes HTML
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The page's routes, with its files in memory. They need no key: the page asks for it."""
    contents = {
        file.name: file.read_bytes()
        for file in files(__package__).iterdir()
        if file.name.rpartition(".")[2] in MEDIA_TYPES
    }
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index() -> Response:
        return _response("index.html")

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def part(name: str) -> Response:
        return _response(name)

    def _response(name: str) -> Response:
        if name not in contents:
            raise RequestError(404, f"the page has no file {name!r}")
        kind = MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(contents[name], media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    return router
