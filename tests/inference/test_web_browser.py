"""The chat page in a headless Chromium: upload, ask, see the answer grow, stop, reset, and what must not work.

    pip install -e '.[test,demo]' playwright            # Chromium itself comes from the system
    pytest -m browser tests/inference/test_web_browser.py

MMJAX_CHAT_CHECKPOINT names a run to talk to, in place of the embedded default after two steps, which writes captions
but not yet the right ones; MMJAX_CHAT_SCREENSHOT a file for what the page looks like.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mmjax.config import ScenesConfig, load
from mmjax.inference import web
from mmjax.training import run
from tests import small
from tests.inference.test_web import bomb

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
# Letter by letter, so that a small model's answer lasts long enough to be looked at.
PROGRAM = """
import time
from mmjax import cli, loaded
written = loaded.Loaded.stream
def stream(self, sample, **settings):
    for piece in written(self, sample, **settings):
        for letter in piece:
            yield letter
            time.sleep(0.03)
loaded.Loaded.stream = stream
cli.main()
"""
# Notes every length of the last answer that the page ever shows.
WATCH = """() => {
    window.lengths = [];
    new MutationObserver(() => {
        const answers = document.querySelectorAll('#chat .bot .message-content, #chat .bot.message');
        if (answers.length) window.lengths.push(answers[answers.length - 1].innerText.trim().length);
    }).observe(document.querySelector('#chat'), {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, folder of the uploads) of a page on loopback."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "uploads").mkdir()
    checkpoint = os.environ.get("MMJAX_CHAT_CHECKPOINT") or a_run(folder / "run")
    command = [sys.executable, "-u", "-c", PROGRAM, "chat", "--web", "--port", "0", "--checkpoint", str(checkpoint),
               "--max-new-tokens", "60"]
    with open(folder / "log", "w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder / "uploads")})
        try:
            yield wait(lambda: address(folder / "log", child), 120), folder / "uploads"
        finally:
            child.terminate()
            child.wait(30)


def a_run(out):
    config = load("configs/tiny_minigpt4.py")
    base = str(out / "base")
    run.train(dataclasses.replace(
        config, out=str(out), score=False, weights=dataclasses.replace(config.weights, checkpoint=base),
        data=dataclasses.replace(config.data, path=str(out / "scenes"), scenes=ScenesConfig(count=60), batch_size=8),
        optim=dataclasses.replace(config.optim, warmup_steps=1, steps_per_epoch=2)))
    return out


def address(log, child):
    said = log.read_text()
    assert child.poll() is None, said
    return next((word for word in said.split() if word.startswith("http://127.0.0.1:")), None)


def wait(found, seconds=30.0):
    """What `found` gives, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "These tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, headless=True, args=FLAGS, viewport={"width": 1240, "height": 800})
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server):
    """A new visit. Fails if the page asked anybody but its server."""
    made, elsewhere = chromium.new_page(), []
    made.on("request", lambda request: elsewhere.append(request.url))
    made.goto(server[0])
    made.wait_for_selector("#question textarea")
    yield made
    made.close()
    assert [url for url in elsewhere if not url.startswith((server[0], "data:", "blob:"))] == []


def upload(page, path):
    page.set_input_files("#files input[type=file]", str(path))


def answer(page):
    shown = page.query_selector_all("#chat .bot.message")
    return shown[-1].inner_text().strip() if shown else ""


def image():
    return small.images() / "image" / "3.jpg"


def finished(page):
    """The answer, once it is a whole caption."""
    return wait(lambda: words if (words := answer(page)).endswith(".") else None, 120)


def test_upload_ask_stream_and_reset(page, server, tmp_path):
    upload(page, image())
    page.wait_for_selector("#shown img")
    assert list(server[1].rglob("*.jpg")) == []
    page.evaluate(WATCH)
    page.fill("#question textarea", "Describe this image in detail.")
    page.click("#send")
    words = finished(page)
    lengths = [length for length in dict.fromkeys(page.evaluate("window.lengths")) if 0 < length < len(words)]
    assert len(lengths) >= 2 and lengths == sorted(lengths)
    assert page.input_value("#question textarea") == ""
    assert page.query_selector("#chat .user img")
    shot = Path(os.environ.get("MMJAX_CHAT_SCREENSHOT") or tmp_path / "chat.png")
    page.screenshot(path=shot)
    assert shot.stat().st_size > 10_000
    page.click("#reset")
    wait(lambda: not page.query_selector_all("#chat .message"))
    assert "Nothing yet" in page.inner_text("#shown")


def test_stop_keeps_what_was_said_and_frees_the_model(page):
    page.fill("#question textarea", "Describe this image in detail.")
    page.keyboard.press("Enter")
    wait(lambda: len(answer(page)) > 3, 60)
    page.click("#stop")
    time.sleep(1.5)  # long enough for thirty more letters
    kept = answer(page)
    assert 3 < len(kept) < 20
    page.fill("#question textarea", "Describe this image in detail.")
    page.click("#send")
    wait(lambda: len(page.query_selector_all("#chat .user.message")) == 2)
    wait(lambda: not answer(page).startswith(kept) or len(answer(page)) > len(kept) + 10)
    whole = finished(page)
    first = page.query_selector_all("#chat .bot.message")[0].inner_text().strip()
    assert first.startswith(kept) and len(first) < len(whole)


def test_files_that_are_refused(page, tmp_path):
    (tmp_path / "large.jpg").write_bytes(bytes(web.MAX_BYTES + 1))
    (tmp_path / "wide.png").write_bytes(bomb(8000, 6000))
    upload(page, tmp_path / "wide.png")
    wait(lambda: "wide.png was refused: its 8000 x 6000 pixels" in page.inner_text("#notice"))
    upload(page, tmp_path / "large.jpg")
    wait(lambda: any("maximum allowed size" in toast.inner_text() for toast in page.query_selector_all(".toast-body")))
    assert not page.query_selector("#shown img")
    upload(page, image())
    page.wait_for_selector("#shown img")
    wait(lambda: "refused" not in page.inner_text("#notice"))


def test_an_example_is_shown(page):
    page.click("#examples button:has(img)")
    page.wait_for_selector("#shown img")


def test_visits_do_not_share_a_conversation(chromium, server, page):
    upload(page, image())
    page.wait_for_selector("#shown img")
    other = chromium.new_page()
    other.goto(server[0])
    other.wait_for_selector("#question textarea")
    assert "Nothing yet" in other.inner_text("#shown")
    other.close()


def status(url, data=None, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as reply:
            return reply.status, dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers)


def test_what_the_server_refuses(server):
    url, folder = server
    code, headers = status(url)
    assert code == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert status(url, Host="elsewhere.org")[0] == 400
    secret = folder / "secret.txt"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", Path(web.__file__), folder.parent / "log"):
        assert status(f"{url}/gradio_api/file={path}")[0] == 403
    body = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
            + bytes(web.MAX_BYTES + 1) + b"\r\n--x--\r\n")
    assert status(f"{url}/gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})[0] == 413
    assert [file for file in folder.rglob("a.jpg") if file.stat().st_size] == []
