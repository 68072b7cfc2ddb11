"""The chat page over HTTP, where Gradio is installed: which files it opens.

The check alone: tests/inference/test_uploads.py.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmjax.families import FAMILIES
from mmjax.families.base import FamilyConfig, ImageSpec
from mmjax.inference import uploads, web
from tests.inference.test_uploads import META, forms, image

if not find_spec("gradio"):  # it is imported by the page's process alone
    pytest.skip("needs Gradio, the extra demo", allow_module_level=True)
httpx = pytest.importorskip("httpx")
PROGRAM = """
from mmjax.inference import web
from tests.inference.test_web_gradio import Seeing
web.serve(Seeing(), web.Page("eyes", "vicuna"), port=0)
"""


class Seeing:
    """What the page asks of a model that sees, before it answers."""

    class config(FamilyConfig):
        images = ImageSpec(32, tokens=4)

    family, params = FAMILIES["llama"], {}

    def batch(self, samples, **settings):
        pass


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(the page's address, the folder of its files, its handlers' numbers by name)"""
    folder = tmp_path_factory.mktemp("gradio")
    with open(folder.parent / "gradio.log", "w") as log, subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM], stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "TMPDIR": str(folder)}) as child:
        try:
            url = next(word for word in child.stdout.readline().split() if word.startswith("http://"))
            config = httpx.get(f"{url}/config", timeout=60).json()
            yield url, folder, {one["api_name"]: one["id"] for one in config["dependencies"]}
        finally:
            child.terminate()
            child.wait(60)
    assert not [*folder.glob("mmjax-chat-*")]


@pytest.fixture
def anna(served):
    yield from visitor(served)


@pytest.fixture
def bert(served):
    yield from visitor(served)


def visitor(served):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        assert client.get("/").status_code == 200 and client.cookies[uploads.COOKIE]
        yield client


def upload(client, name="a.png", data=None):
    return client.post("/gradio_api/upload", files={"files": (name, data or image())})


def tell(served, client, name, data, session):
    """(status, what the handler gave) of a request that the page would make."""
    asked = {"data": data, "fn_index": served[2][name], "session_hash": session}
    answer = client.post("/gradio_api/queue/join", json=asked)
    if answer.status_code != 200:
        return answer.status_code, answer.text
    return 200, client.get("/gradio_api/queue/data", params={"session_hash": session}).text


def test_the_page_opens_what_its_visitor_uploaded_and_nothing_else(served, anna, bert, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(image())
    (hers,), (his,) = upload(anna).json(), upload(bert).json()
    before = sorted(served[1].rglob("*"))
    for path in (str(secret), his, "/etc/passwd", "http://127.0.0.1:1/a.png", "https://example.org/a.png"):
        for form in forms(path):
            for name, data in (("take_images", [[form], None]), ("take_sound", [form, None]),
                               ("answer", [form, None, 0, 1, 0.9, 4]), ("answer", ["What?", None, form, 1, 0.9, 4])):
                assert tell(served, anna, name, data, "anna")[0] == 403
        assert anna.get(f"/gradio_api/file={path}").status_code == 403
    assert secret.exists() and sorted(served[1].rglob("*")) == before
    for client, path, session in ((anna, hers, "anna"), (bert, his, "bert")):  # equal bytes, each once
        status, said = tell(served, client, "take_images", [[{"path": path, "meta": META}], None], session)
        assert status == 200 and "<img src=" in said and "refused" not in said
        assert tell(served, client, "take_images", [[{"path": path, "meta": META}], None], session)[0] == 403
    assert not [path for path in served[1].rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("name", ["../../x.png", "a b%2f..%2fc.png", "<b>.png", "\u202eab\u20ac.png",
                                  "x" * 300 + ".png"])
def test_uploads_of_odd_names(served, anna, name):
    (path,) = upload(anna, name).json()
    assert Path(path).parent.name.startswith("visitors-") and Path(path).parents[2] == served[1]
    data = [[{"path": path, "orig_name": name, "meta": META}], None]
    assert "<img src=" in tell(served, anna, "take_images", data, "odd")[1]


def test_uploads_that_are_refused_leave_nothing(served, anna):
    before = sorted(served[1].rglob("*"))
    assert upload(anna, data=bytes(web.MAX_BYTES + 1)).status_code == 413
    assert anna.post("/gradio_api/upload", content=b"x").json() == []
    many = [("files", (f"{number}.png", b"x")) for number in range(uploads.MAX_FILES + 1)]
    assert anna.post("/gradio_api/upload", files=many).status_code == 400
    broken = anna.post("/gradio_api/upload", content=b"--x\r\nno", headers={"content-type": "multipart/form-data"})
    assert broken.status_code == 400
    assert sorted(served[1].rglob("*")) == before
