"""`mmjax chat`: a conversation in the terminal, or with `--web` on a page in the browser."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmjax.cli import options
from mmjax.inference.chat import (
    IMAGE,
    TEMPLATES,
    ChatSettings,
    Conversation,
    add_input,
    read_input,
    reply,
    scenes_of,
    supported_inputs,
    template_of,
)
from mmjax.inference.loaded import Loaded

DEFAULTS = ChatSettings()


def chat(args: Sequence[str]) -> None:
    """Talk to a model about images, in the terminal or (--web) in the browser."""
    tyro.cli(options.local(converse, "media"), args=args, prog="mmjax chat")


def converse(
    checkpoint: Path,
    image: tuple[Path, ...] = (),
    media: dict[str, str] | None = None,
    template: Literal[TEMPLATES] | None = None,
    settings: Annotated[ChatSettings, tyro.conf.arg(name="")] = DEFAULTS,
    dtype: str | None = None,
    frozen_dtype: Literal["int8"] | None = None,
    web: bool = False,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Talk to a model about images, in the terminal or (--web) in the browser.

    Args:
        checkpoint: converted checkpoint or run folder
        image: image files to start with
        media: inputs of other senses of ImageBind-LLM to start with, by name: audio FILE.wav, text TEXT, or an array
            in a FILE.npy (video, depth, thermal, imu)
        template: template of the conversation (default: depends on the model's training; docs/chat.md)
        settings: settings of generation
        dtype: float32 or bfloat16 (default: depends on the device)
        frozen_dtype: int8 stores the large matrices in half the memory of bfloat16
        web: serve a page for the browser; needs the extra `demo`
        host: with --web, the address to listen at; 0.0.0.0 gives access to all who can reach this machine
        port: with --web, the port to listen at; 0 for a free one
    """
    from mmjax import compilation
    from mmjax.inference.loaded import load

    compilation.enable()
    if web:
        from mmjax.inference import web as page

        if image or media:
            raise ValueError("--image and --media are for the terminal; with --web images are given on the page.")
        page.check()
    model, scenes = load(checkpoint, dtype=dtype, frozen_dtype=frozen_dtype), scenes_of(checkpoint)
    talk = Conversation(template or template_of(model, scenes))
    if web:
        page.serve(model, page.Page(checkpoint.resolve().name, talk.template, settings, scenes), host, port)
        return
    for sense, source in [(IMAGE, path) for path in image] + [*(media or {}).items()]:
        add_input(model, talk, sense, read_input(model, sense, source))
    Terminal(model, talk, settings).run()


class Terminal:
    """Reads lines to the end of stdin: questions, and commands that begin with "/".

    Answers go to stdout, everything else to stderr. If stdin is not a terminal, there is no prompt and no greeting, so
    a file of questions gives a file of answers.
    """

    def __init__(self, model: Loaded, talk: Conversation, settings: ChatSettings):
        self.model, self.talk, self.settings = model, talk, settings
        self.interactive = sys.stdin.isatty()
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            f"/{sense}": ("TEXT" if sense == "text" else "PATH", f"add an input: {sense}", self._giver(sense))
            for sense in supported_inputs(model)}
        self.commands |= {
            "/reset": ("", "clear the conversation", self._reset),
            "/settings": ("[NAME VALUE]", "show or change the settings of generation", self._set),
            "/help": ("", "this list", self._help),
        }

    def run(self) -> None:
        if self.interactive:
            _remember_lines()
            print_notice(f"{self.model.family}, template {self.talk.template}. Ask, or /help. Ctrl-C stops an "
                         "answer, Ctrl-D leaves.")
            if not self.talk.remembers:
                print_notice("This template keeps inputs but not the conversation: each question is answered "
                             "separately.")
        while (line := self._line()) is not None:
            if line == "/quit":
                break
            if line:
                self._do(line)

    def _line(self) -> str | None:
        """The next line without the spaces around it; None at the end."""
        while True:
            try:
                return input("> " if self.interactive else "").strip()
            except EOFError:
                if self.interactive:
                    print_notice("")
                return None
            except KeyboardInterrupt:  # clears the line, as shells do
                print_notice("")

    def _do(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._ask(line)
            elif name in self.commands:
                self.commands[name][2](rest.strip())
            else:
                print_notice(f"There is no command {name}. There are {', '.join(self.commands)}, /quit.")
        except (ValueError, OSError) as error:
            print_notice(" ".join(str(error).split()))
        except KeyboardInterrupt:
            print_notice("")

    def _ask(self, question: str) -> None:
        """Prints the answer as it is generated. Ctrl-C ends it; the conversation keeps the text so far."""
        self.talk.ask(question)
        begun = False
        try:
            with contextlib.closing(reply(self.model, self.talk, self.settings)) as pieces:
                for piece in pieces:
                    if self.talk.left_out and not begun:
                        print_notice(self.talk.left_out)
                    begun = True
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(end=" (interrupted)" if self.interactive else "")
        if not begun:
            print_notice("(no answer)")
        print(flush=True)

    def _giver(self, sense: str) -> Callable[[str], None]:
        def give(source: str) -> None:
            if not source:
                raise ValueError(f"/{sense} {self.commands[f'/{sense}'][0]}: name one")
            add_input(self.model, self.talk, sense, read_input(self.model, sense, _unquoted(source)))
            mixed = f"; mixed with {', '.join(others)}" if (others := sorted(self.talk.given.keys() - {sense})) else ""
            print_notice(f"{sense}: {source}{mixed}")
        return give

    def _reset(self, _: str) -> None:
        self.talk.reset()
        print_notice("The conversation is empty.")

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ").partition(" ")
            self.settings = self.settings.changed(name.replace("-", "_"), value.strip())
        print_notice("  ".join(f"{name}={value}" for name, value in vars(self.settings).items()))

    def _help(self, _: str) -> None:
        lines = [(f"{name} {takes}".strip(), what) for name, (takes, what, _) in self.commands.items()]
        for usage, what in (*lines, ("/quit", "leave, as Ctrl-D does")):
            print_notice(f"{usage:24}{what}")


def print_notice(message: str) -> None:
    """Prints a line to stderr; answers go to stdout."""
    print(message, file=sys.stderr, flush=True)


def _unquoted(source: str) -> str:
    """Removes the quotes that a terminal puts around a dropped file, and expands ~."""
    if len(source) > 1 and source[0] == source[-1] and source[0] in "\"'":
        source = source[1:-1]
    return os.path.expanduser(source) if source.startswith("~") else source


def _remember_lines() -> None:
    """Turns on line editing, with a history in the user's state folder if it is writable."""
    try:
        import readline
    except ImportError:  # Windows
        return
    import atexit

    history = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mmjax" / "chat_history"
    with contextlib.suppress(OSError):
        history.parent.mkdir(parents=True, exist_ok=True)
        if history.is_file():
            readline.read_history_file(history)
        readline.set_history_length(1000)
        atexit.register(_write_history, readline, history)


def _write_history(readline, history: Path) -> None:
    with contextlib.suppress(OSError):
        readline.write_history_file(history)
