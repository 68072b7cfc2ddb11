"""Uploads of the chat page: stores visitors' files, and filters the requests that reach Gradio.

Gradio copies, downloads and serves any path or URL that a request names, in any field, before the page's handlers run;
and visitors who upload the same bytes share one file. Therefore `RequestFilter`, a middleware in front of Gradio,
stores each upload as a file of its own (`Uploads`), and passes on only the page's own requests, rewritten so that they
name no files but those that the same visitor uploaded.
"""

import contextlib
import dataclasses
import json
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mmjax import files

WAIT = 600  # seconds after which an unread file is deleted
MAX_FILES = 64  # of one request
MAX_BODY = 2**20  # bytes of a request that is not an upload
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".wav")  # kept by stored files
COOKIE = "mmjax-visitor"
API = "/gradio_api/"
GET = re.compile(r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(assets|static|svelte)/.+)|" + API +
                 r"(theme\.css|info|app_id|login_check|startup-events|upload_progress|heartbeat/[^/]+|file=.+"
                 r"|queue/(data|status))")
POST = re.compile(API + "(upload|queue/join|run/predict|cancel|reset)")
FIELDS = ("data", "event_data", "fn_index", "trigger_id", "session_hash")  # what the page sends to its handlers
FILE_KEYS = {"path", "url", "meta"}  # Gradio may treat a dict with any of these as a file


@dataclasses.dataclass(frozen=True)
class Upload:
    """An unread file. name: the visitor's name of the file, for messages only"""

    visitor: str
    name: str
    since: float


class Uploads:
    """The uploaded files that are not read yet. Each has an unguessable path, and is read once."""

    def __init__(self, folder: str | Path):
        """folder: in which a new folder for the files is created"""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="visitors-", dir=folder)).resolve()  # for this user alone
        self._waiting: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add(self, visitor: str, name: str, source: BinaryIO) -> str:
        """Writes the bytes of `source` to a new file and returns its path."""
        self._remove(lambda upload: upload.since < time.monotonic() - WAIT)
        name = _shown(name)
        suffix = Path(name).suffix.lower()
        path = self.folder / (secrets.token_urlsafe(24) + (suffix if suffix in SUFFIXES else ""))
        with open(path, "xb") as file:
            shutil.copyfileobj(source, file)
        with self._lock:
            self._waiting[str(path)] = Upload(visitor, name, time.monotonic())
        return str(path)

    @contextlib.contextmanager
    def taken(self, path: str) -> Iterator[str]:
        """Yields the name of a file and deletes the file afterwards. Raises ValueError if it was not uploaded or was
        read before; then no file is opened or deleted."""
        with self._lock:
            upload = self._waiting.pop(str(path), None)
        if upload is None:
            raise ValueError("A file was refused: it was not uploaded on this page, or it was read or removed since. "
                             "Upload it again.")
        try:
            yield upload.name
        finally:
            Path(path).unlink(missing_ok=True)

    def admitted(self, visitor: str, value: Any, pages: Collection[str] = ()) -> Any:
        """Returns the content of a visitor's request, with files reduced to their paths and names.

        pages: paths of the page's own images, which every visitor may name

        Raises ValueError for a file that this visitor did not upload, at any depth.
        """
        if isinstance(value, list):
            return [self.admitted(visitor, item, pages) for item in value]
        if not isinstance(value, dict):
            return value
        if not FILE_KEYS & value.keys():
            return {key: self.admitted(visitor, item, pages) for key, item in value.items()}
        path = value.get("path")
        upload = self._waiting.get(path) if isinstance(path, str) else None
        if not (upload and upload.visitor == visitor) and not (isinstance(path, str) and path in pages):
            raise ValueError("The request names a file that was not uploaded in this visit, or was read before. Upload "
                             "it on the page, with cookies allowed for it.")
        return {"path": path, "orig_name": upload.name if upload else None, "meta": {"_type": "gradio.FileData"}}

    def leave(self, visitor: str) -> None:
        """Deletes a visitor's unread files."""
        self._remove(lambda upload: upload.visitor == visitor)

    def close(self) -> None:
        """Deletes all files."""
        self._remove(lambda upload: True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, which) -> None:
        with self._lock:
            paths = [path for path, upload in self._waiting.items() if which(upload)]
            for path in paths:
                del self._waiting[path]
        for path in paths:
            Path(path).unlink(missing_ok=True)


def _shown(name: str) -> str:
    """Returns a file's name for messages: the last part, printable characters only, at most 100. Never used as a path.
    """
    last = re.split(r"[/\\]", name)[-1]
    return "".join(letter for letter in last if letter.isprintable())[-100:].strip() or "file"


# ---- the middleware ----


class RequestRefused(Exception):
    """A request that is not passed on to Gradio. status: HTTP status of the answer, whose body is the message"""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class RequestFilter:
    """ASGI middleware that filters the requests to a Gradio application.

    pages: paths of the page's own images, the only files that are served
    most:  maximum bytes of an uploaded file
    total: maximum bytes of an upload of several files
    calls: number of inputs of each of the page's handlers, by its number; None to pass on any call

    Requests of other sites are refused: their `Origin` is not the host that the request is for. A handler that fails
    for the content of a call answers with the status 400.

    A cookie identifies a visitor. Unread files are deleted when the last of a visitor's open pages closes (each keeps a
    connection to "heartbeat" open), after `WAIT` seconds, or when the server ends.
    """

    def __init__(self, inner: Any, uploads: Uploads, pages: Collection[str], most: int, total: int,
                 calls: Mapping[int, int] | None = None):
        self.calls = calls
        self.inner, self.uploads, self.pages, self.most, self.total = inner, uploads, frozenset(pages), most, total
        self.open: Counter[str] = Counter()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            try:
                return await self.inner(scope, receive, send)
            finally:
                self.uploads.close()
        if scope["type"] != "http":
            return None  # no websocket is accepted
        visitor, send = _visitor(scope, send)
        try:
            await self._pass(scope, receive, send, visitor)
        except RequestRefused as refused:
            await _answer(send, refused.status, str(refused), b"text/plain; charset=utf-8")

    async def _pass(self, scope, receive, send, visitor):
        path, method = scope["path"], scope["method"]
        if not _is_own_origin(scope):
            raise RequestRefused(403, "This page does not answer requests from other sites.")
        known = {"GET": GET, "HEAD": GET, "POST": POST}.get(method)
        if not known or not known.fullmatch(path):
            raise RequestRefused(403, "This page does not serve that.")
        route = path.removeprefix(API)
        if route.startswith("file=") and route.removeprefix("file=") not in self.pages:
            raise RequestRefused(403, "No file is served from there.")
        if route == "upload_progress":  # the page polls it during an upload
            return await _answer(send, 200, 'data: {"msg": "done"}\n\n', b"text/event-stream")
        if route == "upload":
            return await self._keep(scope, receive, send, visitor)
        if route in ("queue/join", "run/predict"):
            scope, receive = await self._checked(scope, receive, visitor)
            return await self._guarded(scope, receive, send)
        if not route.startswith("heartbeat/"):
            return await self.inner(scope, receive, send)
        self.open[visitor] += 1
        try:
            return await self.inner(scope, receive, send)
        finally:
            self.open[visitor] -= 1
            if not self.open[visitor]:
                del self.open[visitor]
                self.uploads.leave(visitor)

    async def _guarded(self, scope, receive, send):
        """Passes on a call. If Gradio fails for its content, answers with the status 400 in place of 500."""
        begun, failed = False, False

        async def sent(message):
            nonlocal begun, failed
            if message["type"] == "http.response.start":
                failed = message["status"] >= 500
                begun = not failed
            if not failed:
                await send(message)

        try:
            await self.inner(scope, receive, sent)
        except Exception as error:
            if begun:
                raise
            raise RequestRefused(400, "The request cannot be processed.") from error
        if failed:
            raise RequestRefused(400, "The request cannot be processed.")

    async def _checked(self, scope, receive, visitor):
        """Returns (scope, receive) of the same request with only permitted content in its body."""
        body = await _body(receive)
        try:
            content = files.parse_json(body)
            if not isinstance(content, dict):
                raise ValueError("it is not a JSON object")
            content = {key: content[key] for key in FIELDS if key in content}
        except (ValueError, RecursionError) as error:
            raise RequestRefused(400, f"The request is not one of this page: {error}") from error
        try:
            body = json.dumps(self.uploads.admitted(visitor, content, self.pages)).encode()
        except RecursionError as error:
            raise RequestRefused(400, "The request is nested too deeply.") from error
        except ValueError as error:
            raise RequestRefused(403, str(error)) from error
        if problem := _call_problem(content, self.calls):
            raise RequestRefused(400, f"The request is not one of this page: {problem}")
        headers = [(name, value) for name, value in scope["headers"]
                   if name.lower() not in (b"content-length", b"content-type", b"transfer-encoding")]
        headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return messages.pop() if messages else await receive()
        return {**scope, "headers": headers}, again

    async def _keep(self, scope, receive, send, visitor):
        """Stores the files of an upload in place of Gradio, and answers with their paths as Gradio does."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.total:  # otherwise received bytes are counted
            raise RequestRefused(413, f"The request exceeds the maximum allowed size of {self.total} bytes.")
        from starlette.concurrency import run_in_threadpool
        from starlette.exceptions import HTTPException
        from starlette.formparsers import MultiPartException
        from starlette.requests import ClientDisconnect, Request

        try:
            async with Request(scope, _limited(receive, self.total)).form(max_files=MAX_FILES, max_fields=0) as form:
                files = [file for file in form.getlist("files") if not isinstance(file, str)]
                if any(file.size > self.most for file in files):
                    raise RequestRefused(413, f"A file exceeds the maximum allowed size of {self.most} bytes.")
                paths = [await run_in_threadpool(self.uploads.add, visitor, file.filename or "", file.file)
                         for file in files]
        except ClientDisconnect:
            return
        except (HTTPException, MultiPartException) as error:
            raise RequestRefused(400, f"The upload was refused: {getattr(error, 'detail', error)}") from error
        await _answer(send, 200, json.dumps(paths), b"application/json")


def _is_own_origin(scope) -> bool:
    """Returns whether a request is from this page, or has no origin, as one that a visitor types in or follows."""
    headers = dict(scope["headers"])
    if (origin := headers.get(b"origin")) is None:
        return True
    host = origin.partition(b"://")[2].lower()
    return bool(host) and host in (headers.get(b"host", b"").lower(), headers.get(b"x-forwarded-host", b"").lower())


def _call_problem(content: dict[str, Any], calls: Mapping[int, int] | None) -> str | None:
    """Returns what is wrong with a call of a handler; None for one as the page sends it."""
    number, data, session = content.get("fn_index"), content.get("data"), content.get("session_hash")
    if not isinstance(number, int) or isinstance(number, bool) or calls is not None and number not in calls:
        return "fn_index is not the number of a handler"
    if not isinstance(data, list) or calls is not None and len(data) != calls[number]:
        return "data is not the list of the handler's inputs"
    if not isinstance(session, str) or not re.fullmatch(r"[\w-]{1,64}", session, re.ASCII):
        return "session_hash is not the name of a session"
    if not isinstance(content.get("event_data"), (dict, type(None))):
        return "event_data is not an object"
    trigger = content.get("trigger_id")
    if trigger is not None and (not isinstance(trigger, int) or isinstance(trigger, bool)):
        return "trigger_id is not a number"
    return None


def _visitor(scope, send):
    """Returns (the visitor of a request, a `send` that sets the visitor's cookie)."""
    header = b"; ".join(value for name, value in scope["headers"] if name == b"cookie").decode("latin-1")
    known = re.search(rf"(?:^|; *){COOKIE}=([A-Za-z0-9_-]{{32,64}}) *(?:;|$)", header)  # other cookies may be malformed
    if known:
        return known[1], send
    visitor = secrets.token_urlsafe(32)
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    cookie = f"{COOKIE}={visitor}; Path=/; HttpOnly; SameSite=Lax{secure}".encode()

    async def sent(message):
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"set-cookie", cookie)]}
        await send(message)
    return visitor, sent


def _limited(receive, most):
    """Returns a `receive` that raises `RequestRefused` after `most` bytes."""
    seen = 0

    async def received():
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise RequestRefused(413, f"The request exceeds the maximum allowed size of {most} bytes.")
        return message
    return received


async def _body(receive) -> bytes:
    body, receive = b"", _limited(receive, MAX_BODY)
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body
    raise RequestRefused(400, "The request broke off.")


async def _answer(send, status: int, text: str, kind: bytes) -> None:
    body = text.encode()
    await send({"type": "http.response.start", "status": status,
                "headers": [(b"content-type", kind), (b"content-length", str(len(body)).encode()),
                            (b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": body})
