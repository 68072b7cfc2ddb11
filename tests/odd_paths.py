"""A model below a folder of any name: converted, trained, resumed, loaded, exported. What comes out is the same, bit
for bit, as below a folder with a plain name; or all of it is refused before anything is written."""

import contextlib
import dataclasses
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mmjax
from mmjax import cli, trees
from mmjax.checkpoints import frozen as frozen_weights
from tests import small

WORKS, REFUSED = "the same, bit for bit", "refused, nothing written"
CKPT = small.GOLDEN / "ckpt"


def nothing(root: Path) -> None:
    pass


def beside(root: Path) -> None:
    (root / "a").mkdir()


def link(root: Path) -> None:
    (root / "real [1]").mkdir()
    (root / "link").symlink_to("real [1]")


def deep_link(root: Path) -> None:
    """`deep/..` is `real`, and not the folder that `deep` lies in."""
    (root / "real" / "inside").mkdir(parents=True)
    (root / "deep").symlink_to("real/inside")


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder's name below a new one. prepared: what has to be there before"""

    name: str
    expected: str = WORKS
    prepared: Callable[[Path], None] = nothing


CASES = tuple(map(Case, (
    "exp [1]", "[", "]", "[!a]", "[a-z]", "[[]", "a*", "**", "?", "what?*[x]", "[b]/c", "x[/b]", "{a,b}", "{0}", "{}",
    "a b", " a", "sp ", "dot.", "...", ".hidden", "-dash", "--out", "100%", "%s", "%20", "%5B", "a#b", "~", "a~",
    "$HOME", "`x`", "!x", "a&b;c|d", '"q"', "it's", "<a>", "a:b", "c:", "a=b", "@a", "a,b", "a+b", "(1)",
    "5.removed", "x.partial", "1",
    "ü", "日本語", "😀", "e\u0301", "a\nb", "a\tb", "\x01\x7f", "n" * 240, "/".join(["deep"] * 60),
))) + (
    Case("a/../b", prepared=beside), Case("link", prepared=link), Case("link/x", prepared=link),
    Case("deep/../x", prepared=deep_link),
    Case("a\\b", REFUSED), Case(os.fsdecode(b"\xff\xfe"), REFUSED), Case("gs:", REFUSED), Case("a/s3:/b", REFUSED),
    Case("n" * 256, REFUSED), Case("/".join(["n" * 240] * 17), REFUSED))


def command(*args: object) -> tuple[int, str]:
    """(status, what it said) of `mmjax ARGS` in this process."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["mmjax", *map(str, args)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            cli.main()
    except SystemExit as stop:
        return stop.code or 0, said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


def train(place: Path, steps: int) -> tuple[object, ...]:
    config = small.GOLDEN.parents[1] / "faults" / "config.py"
    return ("train", "--config", config, f"--out={place}/run", f"--data.path={place}/images", "--save-every=1",
            "--keep=1", f"--weights.checkpoint={place}/checkpoint", f"--optim.steps-per-epoch={steps}",
            "--optim.accumulate=1")


def convert(place: Path) -> tuple[object, ...]:
    return ("convert", "minigpt4", "--vit", CKPT / "eva_vit.pth", "--llama", CKPT / "llama_hf",
            f"--out={place}/checkpoint", "--qformer", CKPT / "blip2_pretrained.pth",
            "--projector", CKPT / "minigpt4_proj.pth", "--arch", small.GOLDEN / "model_sizes.json")


def export(place: Path) -> tuple[object, ...]:
    return "export", f"--checkpoint={place}/run", "--part=projector", f"--out={place}/projector.pth"


def listing(root: Path) -> list[str]:
    return sorted(os.path.join(folder, name) for folder, *names in os.walk(root) for name in sum(names, []))


def converted(checkpoint: Path) -> dict[str, bytes]:
    """What there is to compare of a converted checkpoint."""
    return {f"converted {path}": array.read().result().tobytes()
            for path, array in frozen_weights.arrays(checkpoint / "weights").items()}


def outcome(place: Path) -> dict[str, bytes]:
    """The same of all that was done below `place`."""
    loaded = trees.flatten(mmjax.load(place / "run", dtype="float32").params)
    return (converted(place / "checkpoint")
            | {f"loaded {path}": np.asarray(leaf).tobytes() for path, leaf in loaded.items()}
            | {"projector.pth": (place / "projector.pth").read_bytes(),
               "steps": ",".join(path.name for path in (place / "run" / "checkpoints").iterdir()).encode()})


def live(place: Path) -> dict[str, bytes]:
    """Raises AssertionError with what a command said that failed."""
    for task, expected in ((convert(place), ""), (train(place, 1), "parameters trained"),
                           (train(place, 2), "Resuming at step 1 of 2"), (export(place), "")):
        status, said = command(*task)
        assert status == 0 and expected in " ".join(said.split()), f"{task[0]}: status {status}\n{said}"
        if not (place / "images").exists():
            shutil.copytree(small.images(), place / "images")
    return outcome(place)


def check(case: Case, root: Path, plain: dict[str, bytes]) -> str:
    """What came of a name in a new folder, `case.expected` if all is well.

    plain: the outcome below a plain name, or a part of it
    """
    case.prepared(root)
    place, before = Path(os.path.join(root, case.name)), listing(root)
    if case.expected == REFUSED:
        for task in (train(place, 1), convert(place)):
            status, said = command(*task)
            if status != 2 or "Name another folder" not in said or "Traceback" in said or listing(root) != before:
                return f"{task[0]}: status {status}, {len(listing(root)) - len(before)} files\n{said}"
        return REFUSED
    try:
        found = live(place)
    except (Exception, SystemExit) as error:  # what the check is there to find
        return f"{type(error).__name__}: {error}"
    other = [path for path in plain if found.get(path) != plain[path]]
    return f"other: {', '.join(other)}" if other else WORKS
