"""The page's server: files of the page, the gallery's results as JSON, photographs that are dropped."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facetrt.engine.inspector.gallery import Gallery
from facetrt.kernels.errors import FacetrtError, InputError

PAGE = Path(__file__).parent / "page"
FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
MAX_UPLOAD = 32 << 20  # bytes of a photograph that is dropped
MAX_NAME = 200  # characters
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Call = Callable[[Gallery, Request], Any]


def make_app(gallery: Gallery, hosts: list[str]) -> Starlette:
    """The application.

    Args:
        hosts: names that it may be asked by, so that no foreign page reaches it under a name of its own.
    """

    def answered(call: Call) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            return JSONResponse(await run_in_threadpool(call, gallery, request))

        return endpoint

    async def picture(request: Request) -> Response:
        return Response(gallery.photo(int(request.path_params["number"])).picture, media_type="image/jpeg")

    async def upload(request: Request) -> Response:
        name = request.query_params.get("name", "dropped")[:MAX_NAME]
        data = await _body(request)
        broken = await run_in_threadpool(gallery.add, [(name, None, io.BytesIO(data))])
        if broken:
            raise InputError(broken[0])
        return JSONResponse(gallery.about())

    routes = [Route(path, _file(name)) for path, name in FILES.items()]
    routes += [Route(f"/api/{name}", answered(call)) for name, call in CALLS.items()]
    routes += [Route("/api/photo/{number:int}", picture), Route("/api/photos", upload, methods=["POST"])]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), Middleware(_Guard)],
        exception_handlers={FacetrtError: _refused, ValueError: _refused},
    )


class _Guard:
    """Refuses requests that another page's script makes, and tells browsers what this page may do."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            await JSONResponse({"error": f"asked by a page of {origin}: expected this one"}, 403)(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"cross-origin-resource-policy", b"same-origin"),
                    (b"referrer-policy", b"no-referrer"),
                    (b"cache-control", b"no-store"),
                ]
            await send(message)

        await self._app(scope, receive, marked)


def _file(name: str) -> Callable[[Request], Response]:
    return lambda request: FileResponse(PAGE / name)


async def _body(request: Request) -> bytes:
    """What was sent, of a bounded size; raises :class:`InputError` if there is more."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_UPLOAD:
            raise InputError(f"the file has more than {MAX_UPLOAD >> 20} MiB: expected a smaller photograph")
    return bytes(data)


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


def _number(request: Request, name: str, kind: Callable[[str], Any], default: Any) -> Any:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{name}={text!r}: expected a number") from None


def _facet(gallery: Gallery, request: Request, task: str = "match") -> str:
    return request.query_params.get("facet") or gallery.facet(task)


CALLS: dict[str, Call] = {
    "about": lambda gallery, request: gallery.about(),
    "similarity": lambda gallery, request: gallery.similarity(
        _number(request, "photo", int, 0),
        _number(request, "x", float, 0.0),
        _number(request, "y", float, 0.0),
        _facet(gallery, request),
        _number(request, "hierarchy", int, 0),
    ),
    "match": lambda gallery, request: gallery.match(
        _number(request, "a", int, 0),
        _number(request, "b", int, 1),
        _facet(gallery, request),
        _number(request, "hierarchy", int, 2),
        _number(request, "threshold", float, 0.05),
        _number(request, "pairs", int, 10),
    ),
    "cosegment": lambda gallery, request: gallery.cosegment(
        _facet(gallery, request, "cosegment"),
        _number(request, "elbow", float, 0.975),
        _number(request, "votes", float, 75.0),
        _number(request, "threshold", float, 0.065),
    ),
    "parts": lambda gallery, request: gallery.parts(
        _facet(gallery, request, "cosegment"),
        _number(request, "parts", int, 4),
        _number(request, "threshold", float, 0.065),
    ),
    "pca": lambda gallery, request: gallery.pca(
        _facet(gallery, request), joint=request.query_params.get("joint", "1") == "1"
    ),
    "discover": lambda gallery, request: gallery.discover(request.query_params.get("method", "tokencut")),
}
