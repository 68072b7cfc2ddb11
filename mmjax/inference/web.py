"""A chat page for the browser: `mmjax chat --web`. Needs Gradio, the extra `demo`.

The page works offline: it has no external fonts, scripts or trackers, which a content security policy enforces. Images
are read once, when they are uploaded, and their files are deleted; the page embeds the images that it shows, so no URL
serves one visitor's images to another. Only files that the visitor uploaded are opened (`mmjax.inference.uploads`). One
answer is generated at a time; others wait.
"""

import asyncio
import base64
import contextlib
import dataclasses
import html
import io
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from mmjax.config import ScenesConfig
from mmjax.data import images, scenes
from mmjax.inference.chat import IMAGE, ChatSettings, Conversation, add_input, read_input, reply, supported_inputs
from mmjax.inference.loaded import Loaded
from mmjax.inference.uploads import RequestFilter, Uploads

MAX_BYTES = 20 * 2**20  # of an uploaded file
MAX_PIXELS = 40_000_000  # of an image; decoded they take six times the bytes of the largest file
MAX_IMAGES = 16  # of one visitor
MAX_QUESTION = 4_000  # characters
THUMBNAIL = 320  # pixels, the longer side of what the page shows
LOOPBACK = ("127.0.0.1", "localhost")
EXAMPLES = 8
SHUTDOWN_TIMEOUT = 3  # seconds that the server waits for open requests when it ends
SUGGESTIONS = ("Describe this image in detail.", "What is unusual about this image?")
SUGGESTIONS_FOR_SCENES = (scenes.PROMPTS[0], "How many shapes are there?", "What color is the circle?",
                          "Where is the star?")
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
          "'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
          "worker-src 'self' blob:; connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; "
          "form-action 'self'")
STYLE = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important}
#send, #stop, #reset {font-weight: 500; font-size: .95rem}
#title h1 {font-size: 1.5rem; font-weight: 650; margin: 0 0 .35rem 0; letter-spacing: -.01em}
#title span {display: inline-block; margin: 0 .4rem .3rem 0; padding: .12rem .6rem; border-radius: 999px;
    font-size: .8rem; background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
    color: var(--body-text-color-subdued)}
#shown .images {display: flex; flex-wrap: wrap; gap: .5rem; margin: 0}
#shown img {height: 104px; border-radius: 8px; border: 1px solid var(--border-color-primary)}
#shown .sense {padding: .3rem .7rem; border-radius: 8px; background: var(--background-fill-secondary)}
#shown .nothing {color: var(--body-text-color-subdued); font-size: .9rem}
#shown .prose, #notice .prose {padding: 0; margin: 0}
#notice:not(:has(.message)) {display: none}
#notice .message {border-left: 3px solid #c2410c; padding: .35rem .8rem; font-size: .9rem;
    background: color-mix(in srgb, #c2410c 8%, transparent); border-radius: 0 6px 6px 0}
#chat img {height: 120px; width: auto !important; max-width: 100%; border-radius: 8px; margin: 0 .4rem .2rem 0;
    display: inline-block; object-fit: contain}
#files .wrap {font-size: .85rem; line-height: 1.3; padding: 0}
#files .wrap svg {width: 18px; height: 18px}
#examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important; gap: .5rem; padding: 0;
    grid-auto-rows: auto; align-content: start}
#examples .grid-container button {width: 100%; height: auto; aspect-ratio: 1}
#examples, #examples > div, #examples .grid-wrap {border: none !important; outline: none; background: none; padding: 0;
    min-height: 0 !important; height: auto !important; box-shadow: none}
#suggestions {gap: .5rem; flex-wrap: wrap}
#suggestions button {flex: 0 1 auto; border-radius: 999px; background: none; font-weight: 400;
    border: 1px solid var(--border-color-primary); color: var(--body-text-color-subdued); padding: .25rem .8rem}
#suggestions button:hover {color: var(--body-text-color); border-color: var(--body-text-color-subdued)}
"""


def check() -> None:
    """Raises ValueError if Gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(f"The chat page needs Gradio, which is not installed ({error}): pip install 'mmjax[demo]'"
                         ) from error


@dataclasses.dataclass(frozen=True)
class Page:
    """The settings of the page.

    name:     of the model, used as the title
    template: of the conversations, one of `mmjax.inference.chat.TEMPLATES`
    settings: initial decoding options
    scenes:   the scenes shown as examples; None for a model that was not trained on scenes
    """

    name: str
    template: str
    settings: ChatSettings = ChatSettings()
    scenes: ScenesConfig | None = None


@dataclasses.dataclass
class Visit:
    """One visitor's conversation, and its display.

    messages: of the chat, in Gradio's format
    shown:    HTML of the model's inputs, by sense; for images that take slots of the text, by number
    waiting:  the part of `shown` that was added since the last question
    count:    number of images so far
    """

    talk: Conversation
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    shown: dict[str, str] = dataclasses.field(default_factory=dict)
    waiting: dict[str, str] = dataclasses.field(default_factory=dict)
    count: int = 0

    def perceive(self, name: str, element: str, in_text: bool) -> None:
        """Adds an input to the display. An image in the text replaces those of earlier questions, if the template does
        not remember them."""
        if in_text and not self.waiting and not self.talk.remembers:
            self.shown = {}
        self.shown[name] = self.waiting[name] = element

    def ask(self, question: str) -> None:
        """Adds a question to the conversation. Raises ValueError for an invalid one."""
        if not isinstance(question, str):
            raise ValueError("The question is no text.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"A question may have {MAX_QUESTION:,} characters; this one has {len(question):,}.")
        self.talk.ask(question)
        given = "".join(self.waiting.values())
        self.messages += [{"role": "user", "content": f"{given}\n\n{_literal(question)}".strip()},
                          {"role": "assistant", "content": ""}]

    def panel(self) -> str:
        if not self.shown:
            return '<div class="nothing">Nothing yet.</div>'
        return f'<div class="images">{"".join(self.shown.values())}</div>'


# ---- uploaded files ----


def image(path: str, name: str | None = None) -> Image.Image:
    """Reads the image of an uploaded file. Raises ValueError with the visitor's name of the file."""
    name = name or Path(path).name
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ValueError(f"the file is larger than {MAX_BYTES // 2**20} MB")
        with Image.open(path, formats=images.KINDS) as header:
            pixels = header.width * header.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"its {header.width} x {header.height} pixels are more than the {MAX_PIXELS // 10**6} "
                             "million that this page takes")
        return images.rgb(path)
    except Exception as error:  # for damaged files, decoders raise errors of any type
        raise ValueError(f"{name} was refused: " + str(error).replace(str(path), name)) from error


def thumbnail(image: Image.Image) -> str:
    """Returns HTML of a small copy with embedded data."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    if max(small.size) < THUMBNAIL // 2:  # a scene of 48 pixels
        small = small.resize((small.width * 4, small.height * 4), Image.Resampling.NEAREST)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=88)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}" alt="an image">'


def _literal(text: str) -> str:
    """Escapes text for HTML; otherwise a model's box tags would not be shown."""
    return html.escape(text, quote=False)


def _notice(messages: Sequence[str]) -> str:
    return "".join(f'<div class="message">{_literal(message)}</div>' for message in messages)


# ---- the page ----


class Handlers:
    """The event handlers of the page; each takes and returns the values of its components."""

    def __init__(self, model: Loaded, page: Page, uploads: Uploads):
        self.model, self.page, self.uploads = model, page, uploads
        self.examples = list(_examples(model, page.scenes)) if page.scenes else []

    def visit(self) -> Visit:
        return Visit(Conversation(self.page.template))

    def take_images(self, files: Sequence[str] | None, visit: Visit) -> tuple[None, str, str]:
        """Returns (an empty drop area, the panel, the notice). A refused file does not affect the others."""
        refused = []
        for path in files or ():
            try:
                with self.uploads.taken(path) as name:
                    self._see(visit, image(path, name))
            except ValueError as error:
                refused.append(str(error))
        return None, visit.panel(), _notice(refused)

    def take_sound(self, path: str | None, visit: Visit) -> tuple[None, str, str]:
        """Does the same for a .wav file."""
        refused = []
        if path:
            try:
                with self.uploads.taken(path) as name:
                    self._hear(visit, path, name)
            except ValueError as error:
                refused.append(str(error))
        return None, visit.panel(), _notice(refused)

    def take_example(self, number: int, visit: Visit) -> tuple[str, str]:
        """Returns (the panel, the notice). An example replaces the inputs of other senses, and is not mixed with them.
        """
        sense, value, image = self.examples[number]
        try:
            if visit.talk.given:
                visit.talk.given, visit.shown, visit.waiting = {}, {}, {}
            self._see(visit, image, sense, value)
        except ValueError as error:
            return visit.panel(), _notice([str(error)])
        return visit.panel(), ""

    def _hear(self, visit: Visit, path: str, name: str) -> None:
        try:
            add_input(self.model, visit.talk, "audio", read_input(self.model, "audio", path))
        except ValueError as error:
            raise ValueError(f"{name} was refused: " + str(error).replace(str(path), name)) from error
        visit.perceive("audio", f'<div class="sense">sound: {_literal(name)}</div>', in_text=False)

    def _see(self, visit: Visit, image: Image.Image, sense: str = IMAGE, value: Any = None) -> None:
        if visit.count >= MAX_IMAGES:
            raise ValueError(f"A conversation takes {MAX_IMAGES} images; start a new one.")
        add_input(self.model, visit.talk, sense, read_input(self.model, sense, image if value is None else value))
        visit.count += 1
        in_text = self.model.config.image_tokens > 0
        visit.perceive(str(visit.count) if in_text else sense, thumbnail(image), in_text)

    def answer(self, question: str, visit: Visit, temperature: float, beams: float, top_p: float,
               tokens: float) -> Iterator[tuple[list[dict[str, str]], str, str]]:
        """Yields (the chat, the question's field, the notice) for every piece of the answer."""
        try:
            settings = dataclasses.replace(self.page.settings, temperature=float(temperature), num_beams=int(beams),
                                           top_p=float(top_p), max_new_tokens=int(tokens))
            visit.ask(question)
        except (ValueError, TypeError, OverflowError) as error:  # such as NaN, or no number, in a call of a program
            yield visit.messages, question if isinstance(question, str) else "", _notice([str(error)])
            return
        yield visit.messages, "", ""
        try:
            with contextlib.closing(reply(self.model, visit.talk, settings)) as pieces:
                for _ in pieces:
                    visit.messages[-1]["content"] = _literal(visit.talk.turns[-1].answer)
                    visit.waiting = {}
                    yield visit.messages, "", _notice([visit.talk.left_out] * bool(visit.talk.left_out))
        except ValueError as error:
            del visit.messages[-2:]
            yield visit.messages, question, _notice([str(error)])
            return
        if not visit.messages[-1]["content"]:
            visit.messages[-1]["content"] = "(no answer)"
        else:
            visit.messages[-1]["content"] = _literal(visit.talk.turns[-1].answer)
        yield visit.messages, "", _notice([visit.talk.left_out] * bool(visit.talk.left_out))

    def reset(self) -> tuple[Visit, list[dict[str, str]], str, str, str]:
        """Returns (a new visit, the chat, the question's field, the panel, the notice)."""
        fresh = self.visit()
        return fresh, [], "", fresh.panel(), ""


def _examples(model: Loaded, world: ScenesConfig) -> Iterator[tuple[str, Any, Image.Image]]:
    """Yields (sense, input, image to show) of held-out scenes."""
    drawn = scenes.scenes("held_out", EXAMPLES, world.seed, most=world.most)
    for scene in drawn:
        yield IMAGE, None, Image.fromarray(scenes.draw(scene))
    for sense, draw in scenes.MEDIA.items():
        if sense in supported_inputs(model):
            for scene in drawn[:EXAMPLES // 2]:
                yield sense, draw(scene), Image.fromarray(scenes.as_image(draw(scene)))


def _title(model: Loaded, page: Page) -> str:
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    count = f"{total / 1e9:.2f} billion" if total >= 1e9 else f"{total / 1e6:.2f} million"
    memory = "remembers the conversation" if Conversation(page.template).remembers else "takes each question alone"
    facts = (model.family.name, f"{count} parameters", f"perceives {', '.join(supported_inputs(model)) or 'words'}",
             f"template {page.template}: {memory}", jax.devices()[0].platform)
    return f"<h1>{_literal(page.name)}</h1>" + "".join(f"<span>{_literal(fact)}</span>" for fact in facts)


def blocks(model: Loaded, page: Page, uploads: Uploads) -> Any:
    """Returns the page as `gradio.Blocks`; it opens only files of `uploads`. Raises ValueError without Gradio."""
    check()
    import gradio as gr

    handlers, supported = Handlers(model, page, uploads), supported_inputs(model)
    with gr.Blocks(title=f"{page.name} - mmjax", analytics_enabled=False, delete_cache=(600, 600)) as page_blocks:
        visit = gr.State(handlers.visit())
        gr.HTML(_title(model, page), elem_id="title", padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=7, min_width=380):
                chat = gr.Chatbot(show_label=False, height=460, elem_id="chat", buttons=["copy"], latex_delimiters=[],
                                  layout="bubble", placeholder="Show an image, then ask about it.")
                with gr.Row():
                    question = gr.Textbox(show_label=False, placeholder="Ask something", lines=1, max_lines=6, scale=8,
                                          max_length=MAX_QUESTION, autofocus=True, elem_id="question", container=False)
                    send = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="send")
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
                    reset = gr.Button("Reset", scale=1, min_width=80, elem_id="reset")
                notice = gr.HTML("", elem_id="notice", padding=False)
                with gr.Row(elem_id="suggestions"):
                    suggestions = [gr.Button(text, size="sm", min_width=0)
                                   for text in (SUGGESTIONS_FOR_SCENES if page.scenes else SUGGESTIONS)]
            with gr.Column(scale=4, min_width=300):
                gr.Markdown("**What the model perceives**")
                panel = gr.HTML(handlers.visit().panel(), elem_id="shown", padding=False)
                files = gr.File(show_label=False, file_count="multiple", elem_id="files", height=104, buttons=[],
                                visible=IMAGE in supported)
                sound = gr.Audio(label="Sound (.wav)", sources=["upload"], type="filepath", elem_id="sound",
                                 visible="audio" in supported)
                if handlers.examples:
                    gr.Markdown("**Examples**, never seen in training")
                    gallery = gr.Gallery([image.resize((96, 96), Image.Resampling.NEAREST)
                                          for *_, image in handlers.examples], show_label=False, columns=4, buttons=[],
                                         allow_preview=False, interactive=False, height="auto", elem_id="examples")
                with gr.Accordion("Decoding options", open=False, elem_id="settings"):
                    knobs = _sliders(page.settings)

        private = {"api_visibility": "private"}
        model_alone = {"concurrency_limit": 1, "concurrency_id": "model", **private}
        outputs = [chat, question, notice]
        answers = [gr.on([send.click, question.submit], handlers.answer, [question, visit, *knobs], outputs,
                       show_progress="hidden", **model_alone)]
        for button in suggestions:
            answers.append(button.click(_always(handlers.answer, button.value), [visit, *knobs], outputs,
                                      show_progress="hidden", **model_alone))
        stop.click(lambda visit: visit.messages, visit, chat, cancels=answers, queue=False, **private)
        for cleared in (reset.click, chat.clear):
            cleared(handlers.reset, None, [visit, chat, question, panel, notice], cancels=answers, queue=False,
                    **private)
        files.upload(handlers.take_images, [files, visit], [files, panel, notice], show_progress="hidden", **private)
        sound.upload(handlers.take_sound, [sound, visit], [sound, panel, notice], show_progress="hidden", **private)
        if handlers.examples:
            def chosen(visit: Visit, event: gr.SelectData):
                return handlers.take_example(event.index, visit)

            gallery.select(chosen, visit, [panel, notice], show_progress="hidden", **private)
        page_blocks.queue(default_concurrency_limit=4, max_size=64)
    return page_blocks


def _sliders(start: ChatSettings) -> list[Any]:
    """Returns sliders for the decoding options of `Handlers.answer`."""
    import gradio as gr

    return [
        gr.Slider(0, 2, start.temperature, step=0.05, label="temperature",
                  info="0 takes the best token, above 0 samples"),
        gr.Slider(1, 10, start.num_beams, step=1, label="beams",
                  info="above 1: beam search, at temperature 0; the answer is not streamed"),
        gr.Slider(0.05, 1, start.top_p, step=0.05, label="top-p",
                  info="samples from the fewest tokens whose probabilities reach this sum"),
        gr.Slider(1, max(1000, start.max_new_tokens), start.max_new_tokens, step=1, label="longest answer",
                  info="in tokens")]


def _always(answer: Callable, question: str) -> Callable:
    def ask(*rest):
        yield from answer(question, *rest)
    return ask


# ---- the server ----


def app(model: Loaded, page: Page, host: str = LOOPBACK[0]) -> Any:
    """Returns the page as an ASGI application.

    host: the address it will listen at. On loopback it refuses requests with another host name, so that other sites
          cannot reach it by DNS rebinding
    """
    check()
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    theme = gr.themes.Base(primary_hue="teal", neutral_hue="stone", radius_size="md",
                           font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    uploads = Uploads(gr.utils.get_upload_folder())  # Gradio does not copy files in it
    page_blocks = blocks(model, page, uploads)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    config = page_blocks.get_config_file()
    outer.add_middleware(RequestFilter, uploads=uploads, pages=_paths(config), most=MAX_BYTES,
                         total=MAX_BYTES * MAX_IMAGES,
                         calls={call["id"]: len(call["inputs"]) for call in config["dependencies"]})
    outer.add_middleware(Headers)
    if host in LOOPBACK:
        outer.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK])
    return gr.mount_gradio_app(
        outer, page_blocks, path="/", server_name=host, footer_links=[], run_history=False, allowed_paths=[],
        max_file_size=MAX_BYTES, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, theme=theme,
        css=STYLE)


def _paths(shown: Any) -> set[str]:
    """Returns the paths of the page's own files, its examples."""
    if isinstance(shown, dict):
        paths = {shown["path"]} if isinstance(shown.get("path"), str) else set()
        return paths.union(*map(_paths, shown.values()))
    return set().union(*map(_paths, shown)) if isinstance(shown, (list, tuple)) else set()


class Headers:
    """ASGI middleware that adds security headers: the browser loads nothing from other hosts."""

    def __init__(self, inner: Any):
        self.inner = inner

    async def __call__(self, scope, receive, send):
        async def sent(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode()),
                                      (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            await send(message)
        await self.inner(scope, receive, sent)


def serve(model: Loaded, page: Page, host: str = LOOPBACK[0], port: int = 7860) -> None:
    """Serves the page until it is interrupted. Raises ValueError if it cannot listen at the address."""
    check()
    import uvicorn

    with tempfile.TemporaryDirectory(prefix="mmjax-chat-") as uploads, _listening(host, port) as listening:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        server = uvicorn.Server(uvicorn.Config(app(model, page, host), log_level="warning",
                                               timeout_graceful_shutdown=SHUTDOWN_TIMEOUT))
        shown = f"[{host}]" if ":" in host else host
        print(f"{page.name} is at http://{shown}:{listening.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt), _ended_in_order(server):
            server.run(sockets=[listening])


@contextlib.contextmanager
def _ended_in_order(server: Any) -> Iterator[None]:
    """Ends a server on SIGTERM, or when its terminal closes, as on Ctrl-C, so that its folder is removed."""
    def end(number, frame):  # uvicorn raises SIGTERM again when it is done
        if server.should_exit:
            raise SystemExit(128 + number)
        server.handle_exit(number, frame)

    log = logging.getLogger("uvicorn.error")
    log.addFilter(_is_no_closed_page)
    signals = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        signals = set()
    previous = {number: signal.signal(number, end) for number in signals
                if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        log.removeFilter(_is_no_closed_page)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_no_closed_page(record: logging.LogRecord) -> bool:
    """Returns False for the traceback of a connection that was closed because the server ended."""
    return not (record.exc_info and record.exc_info[0] and issubclass(record.exc_info[0], asyncio.CancelledError))


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"Cannot listen at {host}, port {port}: {error.strerror or error}. Choose another --port (0 "
                         "for a free one) or --host.") from error
