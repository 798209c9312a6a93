"""The dashboard's files, as they lie in service/dashboard: static, without a build step. Open to all: they tell nothing of any job.

Their addresses have a digest of all of them, and what lies at one never changes: browsers keep it, and no page mixes files of two versions.
"""

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Header, Request, Response

from service import etags
from service.errors import NotFound, StorageUnreachable
from service.routes.answers import unchanged
from service.routes.state import StorageDep
from service.storage import Storage

FOLDER = Path(__file__).parent.parent / "dashboard"
PAGE = "index.html"
ICON = "favicon.svg"
_VERSION_MARK = b"{version}"  # in the page, where its files' addresses have the digest
_FOR_EVER = "public, max-age=31536000, immutable"
_ASK_AGAIN = "no-cache"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' {pictures}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Vary": "Accept-Encoding"}
router = APIRouter(include_in_schema=False)
AcceptEncoding = Annotated[str, Header(max_length=4000)]
IfNoneMatch = Annotated[str | None, Header(max_length=4000)]


@dataclass(frozen=True)
class _File:
    content: bytes
    packed: bytes
    media_type: str
    tag: str


@cache
def version() -> str:
    """A digest of all files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in _paths():
        digest.update(f"{path.relative_to(FOLDER)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def _files() -> dict[str, _File]:
    """By name below the folder. Only what is here is ever served."""
    found = {}
    for path in _paths():
        content = path.read_bytes()
        if path.name == PAGE:
            content = content.replace(_VERSION_MARK, version().encode())
        kind = mimetypes.guess_type(path.name)[0] or "text/plain"
        kind = {"application/javascript": "text/javascript"}.get(kind, kind)
        media_type = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        name = path.relative_to(FOLDER).as_posix()
        found[name] = _File(content, gzip.compress(content, mtime=0), media_type, etags.of_values([version(), name]))
    return found


def _paths() -> list[Path]:
    return sorted(path for path in FOLDER.rglob("*") if path.is_file())


@router.api_route("/", methods=["GET", "HEAD"])
def page(storage: StorageDep, accept_encoding: AcceptEncoding = "", if_none_match: IfNoneMatch = None) -> Response:
    answer = _answer(PAGE, accept_encoding, if_none_match, caching=_ASK_AGAIN)
    answer.headers["Content-Security-Policy"] = _POLICY.format(pictures=_pictures(storage))
    return answer


@router.api_route("/favicon.ico", methods=["GET", "HEAD"])
def icon(accept_encoding: AcceptEncoding = "", if_none_match: IfNoneMatch = None) -> Response:
    """What browsers ask for by themselves, also beside other pages of this host."""
    return _answer(ICON, accept_encoding, if_none_match, caching=_ASK_AGAIN)


@router.api_route("/dashboard/{digest}/{file:path}", methods=["GET", "HEAD"])
def file(digest: str, file: str, request: Request, accept_encoding: AcceptEncoding = "", if_none_match: IfNoneMatch = None) -> Response:
    if digest != version() or file not in _files():
        raise NotFound("The dashboard has no such file, or is of another version now: load the page again.")
    return _answer(file, accept_encoding, if_none_match, caching=_FOR_EVER)


def _answer(name: str, accept_encoding: str, known: str | None, *, caching: str) -> Response:
    found = _files()[name]
    headers = _HEADERS | {"ETag": found.tag, "Cache-Control": caching}
    if etags.has(known, found.tag):
        answer = unchanged(found.tag)
        answer.headers.update(headers)
        return answer
    if "gzip" in accept_encoding and len(found.packed) < len(found.content):
        return Response(found.packed, headers=headers | {"Content-Encoding": "gzip"}, media_type=found.media_type)
    return Response(found.content, headers=headers, media_type=found.media_type)


def _pictures(storage: Storage) -> str:
    """Where presigned addresses lead: reconstructions come from there, never through the service."""
    try:
        place = urlsplit(storage.presign(ICON))
    except StorageUnreachable:  # no credentials: then there are no pictures either
        return ""
    return f"{place.scheme}://{place.netloc}"
