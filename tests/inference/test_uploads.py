"""Which files a visitor of the chat page may have opened: the check, without Gradio. With it:
tests/inference/test_web_gradio.py."""

import asyncio
import io
import json

import pytest
from PIL import Image

from mmjax.inference import uploads
from mmjax.inference.uploads import RequestFilter, Uploads

META = {"_type": "gradio.FileData"}
ANNA, BERT = "a" * 43, "b" * 43


@pytest.fixture
def kept(tmp_path):
    return Uploads(tmp_path / "kept")


def image():
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (9, 200, 9)).save(file, "PNG")
    return file.getvalue()


def sent(kept, visitor=ANNA, name="a.png"):
    return kept.add(visitor, name, io.BytesIO(image()))


def forms(path):
    """Ways in which a request may name a file."""
    yield {"path": path, "meta": META}
    yield {"path": path}
    yield {"path": path, "meta": META, "is_stream": True}
    yield {"path": path, "meta": META, "orig_name": "../../a\0.png"}
    yield {"url": f"/gradio_api/file={path}", "meta": META}
    yield {"image": {"path": path, "meta": META}, "caption": None}
    yield {"video": {"path": "a.mp4", "deeper": [{"path": path, "meta": META}]}}


def strange(tmp_path, theirs):
    """Paths of files that nobody uploaded, or another did."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(image())
    link = tmp_path / "kept" / "link.png"
    link.symlink_to(secret)
    folder = theirs.rpartition("/")[0]
    return ["/etc/passwd", str(secret), str(link), f"{folder}/../../secret.png", theirs, f"{folder}/./x.png", folder,
            "", "http://127.0.0.1:1/a.png", "https://example.org/a.png", "file:///etc/passwd", "//host/share/a.png",
            "data:image/png;base64,AAAA", "a\0.png", "\ud800.png", "/gradio_api/file=/etc/passwd"]


# ---- the files ----


def test_equal_files_are_not_shared(kept):
    anna, bert, again = sent(kept), sent(kept, BERT), sent(kept)
    assert len({anna, bert, again}) == 3
    with kept.taken(anna) as name:
        assert name == "a.png"
    for path in (bert, again):
        with kept.taken(path), open(path, "rb") as file:
            assert file.read() == image()
    assert not any(kept.folder.iterdir())


def test_a_file_is_taken_once_also_if_its_reader_fails(kept):
    path = sent(kept)
    with pytest.raises(ZeroDivisionError), kept.taken(path):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="read or removed since"), kept.taken(path):
        pass


@pytest.mark.parametrize(("name", "shown", "suffix"), [
    ("a.JPG", "a.JPG", ".jpg"), ("../../etc/passwd", "passwd", ""), ("C:\\x\\b.png", "b.png", ".png"), ("", "file", ""),
    ("..", "..", ""), ("a\0\n\x1b[31m.wav", "a[31m.wav", ".wav"), ("x" * 5000 + ".png", "x" * 96 + ".png", ".png"),
    ("evil.svg", "evil.svg", ""), ("\ud800/\u202e.png", ".png", "")])
def test_odd_names_are_shown_and_no_file_is_called_so(kept, name, shown, suffix):
    path = sent(kept, name=name)
    assert [str(file) for file in kept.folder.iterdir()] == [path] and path.rpartition("/")[2][32:] == suffix
    with kept.taken(path) as known:
        assert known == shown


def test_what_is_admitted_is_written_anew(kept):
    path = sent(kept)
    asked = {"data": [[{"path": path, "url": "http://x", "is_stream": True, "meta": META}], None, 0.5, "words"]}
    assert kept.admitted(ANNA, asked)["data"] == [[{"path": path, "orig_name": "a.png", "meta": META}], None, 0.5,
                                                  "words"]
    page = {"index": 1, "value": {"image": {"path": "/page/1.webp", "url": "/x"}, "caption": None}}
    assert kept.admitted(ANNA, page, {"/page/1.webp"})["value"]["image"]["path"] == "/page/1.webp"


def test_other_files_are_refused_in_whatever_form(kept, tmp_path):
    sent(kept)
    for path in strange(tmp_path, sent(kept, BERT)):
        for form in forms(path):
            for data in ([form], [[form]], {"event_data": form}):
                with pytest.raises(ValueError, match="not uploaded in this visit"):
                    kept.admitted(ANNA, data)
    for path in (None, 3, ["x"], {"path": 1}):
        with pytest.raises(ValueError, match="not uploaded in this visit"):
            kept.admitted(ANNA, {"path": path, "meta": META})


def test_files_are_removed_when_visits_end_and_when_they_waited_too_long(kept, monkeypatch):
    anna, bert = sent(kept), sent(kept, BERT)
    kept.leave(ANNA)
    assert [str(file) for file in kept.folder.iterdir()] == [bert]
    monkeypatch.setattr(uploads, "WAIT", -1)
    late = sent(kept)
    assert [str(file) for file in kept.folder.iterdir()] == [late] and anna != late
    kept.close()
    assert not kept.folder.exists()


# ---- the gate ----


class Inner:
    """An application that notes what reaches it."""

    def __init__(self):
        self.seen = []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            body = (await receive())["body"] if scope["method"] == "POST" else b""
            if scope["path"].startswith("/gradio_api/heartbeat/"):
                await receive()
            self.seen.append((scope["path"], dict(scope["headers"]), body))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"inner"})


@pytest.fixture
def gate(kept):
    return RequestFilter(Inner(), kept, {"/page/1.webp"}, most=100, total=1000)


def ask(gate, path, body=None, cookie=f"mmjax-visitor={ANNA}", method=None, headers=()):
    """(status, headers, body) of the answer."""
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    scope = {"type": "http", "method": method or ("GET" if body is None else "POST"), "path": path, "scheme": "http",
             "headers": [(b"cookie", cookie.encode()), (b"content-length", b"%d" % len(body or b"")), *headers]}
    half = len(body or b"") // 2
    coming = [{"type": "http.request", "body": (body or b"")[:half], "more_body": True},
              {"type": "http.request", "body": (body or b"")[half:], "more_body": False}]
    answers = []

    async def receive():
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message):
        answers.append(message)

    asyncio.run(gate(scope, receive, send))
    return answers[0]["status"], answers[0]["headers"], answers[1]["body"].decode()


@pytest.mark.parametrize("route", ["queue/join", "run/predict"])
def test_a_request_passes_with_the_visitors_own_files_alone(gate, kept, tmp_path, route):
    own, theirs = sent(kept), sent(kept, BERT)
    asked = {"fn_index": 9, "session_hash": "s", "trigger_id": 1, "event_data": None, "batched": True}
    for path in strange(tmp_path, theirs):
        for form in forms(path):
            for more in ({"data": [form]}, {"data": [], "event_data": {"value": form}}, {"data": form}):
                assert ask(gate, f"/gradio_api/{route}", {**asked, **more})[0] == 403
    assert ask(gate, f"/gradio_api/{route}", {**asked, "data": [{"path": own}]}, cookie="")[0] == 403
    assert gate.inner.seen == []
    assert ask(gate, f"/gradio_api/{route}", {**asked, "data": [[{"path": own, "is_stream": True}], None]})[0] == 200
    (path, headers, body), = gate.inner.seen
    assert json.loads(body) == {"fn_index": 9, "session_hash": "s", "trigger_id": 1, "event_data": None, "data": [
        [{"path": own, "orig_name": "a.png", "meta": META}], None]}
    assert headers[b"content-length"] == str(len(body)).encode()


@pytest.mark.parametrize(("body", "status"), [
    (b"", 400), (b"[]", 400), (b"{", 400), (b"\xff", 400), (b"[" * 100_000, 400),
    (b'{"data": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400), (b'{"data": "' + bytes(2**20) + b'"}', 413)])
def test_a_request_that_cannot_be_checked_does_not_pass(gate, body, status):
    assert ask(gate, "/gradio_api/queue/join", body)[0] == status
    assert gate.inner.seen == []


def test_an_upload_that_is_too_large_is_not_read(gate, kept):
    assert ask(gate, "/gradio_api/upload", bytes(1001))[0] == 413
    assert not any(kept.folder.iterdir())


def test_no_address_serves_files_or_calls_handlers_unchecked(gate, kept):
    own = sent(kept)
    files = (own, "/etc/passwd", "http://127.0.0.1:1/", "https://example.org/a.png", "/page/../page/1.webp",
             "/page/1.webp\n")
    for path in (*(f"/gradio_api/file={path}" for path in files), "/gradio_api/file//etc/passwd",
                 "/gradio_api/proxy=http://127.0.0.1:1/", "//gradio_api/file=/etc/passwd",
                 "/gradio_api/stream/s/0/1/playlist-file", "/gradio_api/custom_component/1/a/b/c",
                 "/gradio_api/vibe-code"):
        for method in ("GET", "HEAD", "OPTIONS"):
            assert ask(gate, path, method=method)[0] == 403, path
    for route in ("component_server", "call/answer", "call/v2/answer", "run/answer", "api/predict", "api/answer",
                  "queue/join/", "process_recording", "stream/1", "vibe-edit", "run/predict/"):
        assert ask(gate, f"/gradio_api/{route}", {"data": []})[0] == 403, route
    assert gate.inner.seen == []
    for path in ("/", "/config", "/assets/a.js", "/theme.css", "/gradio_api/file=/page/1.webp",
                 "/gradio_api/queue/data"):
        assert ask(gate, path)[0] == 200, path


@pytest.mark.parametrize("cookie", ["", "a=b", "mmjax-visitor=short", "mmjax-visitor=" + "a" * 43 + "!"])
def test_who_has_no_cookie_gets_one(gate, cookie):
    given = [dict(ask(gate, "/", cookie=cookie)[1])[b"set-cookie"].decode() for _ in range(2)]
    assert given[0] != given[1] and given[0].endswith("; Path=/; HttpOnly; SameSite=Lax")
    assert b"set-cookie" not in dict(ask(gate, "/", cookie=given[0].partition(";")[0])[1])
    assert b"set-cookie" not in dict(ask(gate, "/", cookie=f'x=["}}; mmjax-visitor={ANNA}; y=2')[1])


def test_what_was_not_read_goes_with_the_last_page(gate, kept):
    own, theirs = sent(kept), sent(kept, BERT)
    gate.open[ANNA] += 1  # another page of hers
    ask(gate, "/gradio_api/heartbeat/s")
    assert len([*kept.folder.iterdir()]) == 2
    gate.open[ANNA] -= 1
    ask(gate, "/gradio_api/heartbeat/s")
    assert [str(file) for file in kept.folder.iterdir()] == [theirs] and own != theirs
    asyncio.run(gate({"type": "lifespan"}, None, None))
    assert not kept.folder.exists()


CALL = {"fn_index": 9, "session_hash": "s", "data": []}


@pytest.mark.parametrize(("wrong", "problem"), [
    ({"fn_index": None}, "fn_index"), ({"fn_index": "9"}, "fn_index"), ({"fn_index": True}, "fn_index"),
    ({"fn_index": 10**30}, "fn_index"), ({"fn_index": -1}, "fn_index"), ({"data": None}, "data"),
    ({"data": "text"}, "data"), ({"data": [1]}, "data"), ({"session_hash": None}, "session_hash"),
    ({"session_hash": "../x"}, "session_hash"), ({"session_hash": "x" * 65}, "session_hash"),
    ({"event_data": [1]}, "event_data"), ({"trigger_id": "1"}, "trigger_id")])
def test_malformed_calls_do_not_pass(gate, wrong, problem):
    gate.calls = {9: 0}
    assert ask(gate, "/gradio_api/run/predict", CALL)[0] == 200
    status, _, said = ask(gate, "/gradio_api/run/predict", {**CALL, **wrong})
    assert status == 400 and problem in said and len(gate.inner.seen) == 1


@pytest.mark.parametrize(("origin", "host", "forwarded", "passes"), [
    (None, b"127.0.0.1:7860", None, True), (b"http://127.0.0.1:7860", b"127.0.0.1:7860", None, True),
    (b"http://LOCALHOST:7860", b"localhost:7860", None, True),
    (b"https://chat.example.org", b"127.0.0.1:7860", b"chat.example.org", True),
    (b"https://evil.example", b"127.0.0.1:7860", None, False), (b"null", b"127.0.0.1:7860", None, False),
    (b"http://127.0.0.1:8000", b"127.0.0.1:7860", None, False), (b"", b"", None, False),
    (b"http://127.0.0.1:7860.evil.example", b"127.0.0.1:7860", None, False),
    (b"http://evil.example@127.0.0.1:7860", b"127.0.0.1:7860", None, False)])
@pytest.mark.parametrize("path", ["/gradio_api/queue/join", "/gradio_api/run/predict", "/config"])
def test_requests_of_other_sites_are_refused(gate, path, origin, host, forwarded, passes):
    headers = [(b"host", host), *([(b"origin", origin)] if origin is not None else []),
               *([(b"x-forwarded-host", forwarded)] if forwarded else [])]
    answer = ask(gate, path, None if path == "/config" else CALL, headers=headers)
    assert (answer[0] != 403) == passes
    assert passes or "other sites" in answer[2]


@pytest.mark.parametrize("fails", ["raises", "answers 500"])
def test_a_handler_that_fails_for_a_call_is_no_server_error(gate, fails):
    async def inner(scope, receive, send):
        if fails == "raises":
            raise TypeError("a handler got something else")
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"Traceback"})

    gate.inner = inner
    status, _, said = ask(gate, "/gradio_api/run/predict", CALL)
    assert status == 400 and said == "The request cannot be processed."
