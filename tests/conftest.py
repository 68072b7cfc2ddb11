"""The tests compile many small programs and run each of them once, so XLA is told to spend little on optimising them.

A session has one temporary folder (MMJAX_TESTS_FOLDER), which the workers of `-n` and the processes that tests start
share. It holds what is made once (tests/small.py), and JAX's cache of compiled programs; a JAX_COMPILATION_CACHE_DIR
that is set already is used instead, and stays.

`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest ...` compiles as users do; docs/parity.md was measured so. An XLA that does not
know a flag ends the process, so a process that may end is asked first.
"""

import gc
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

FLAGS = ("--xla_cpu_use_fusion_emitters=false",  # they take most of what is left
         "--xla_cpu_parallel_codegen_split_count=1")  # a program of a few lines is not worth 32 parts
LONGEST = ("test_eight_devices.py", "test_run.py", "test_steps.py", "test_evaluate.py", "test_doctor.py",
           "test_imagebind_llm.py", "test_llama.py", "test_patchwork.py", "test_format1.py")
STARTS_XLA = "from jaxlib import xla_client; xla_client.make_cpu_client()"  # 0.3 s


def are_known(flags: tuple[str, ...]) -> bool:
    """Whether the installed XLA starts with these flags."""
    environment = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return not subprocess.run([sys.executable, "-c", STARTS_XLA], env=environment, capture_output=True).returncode


def known(flags: tuple[str, ...]) -> tuple[str, ...]:
    return flags if are_known(flags) else tuple(flag for flag in flags if are_known((flag,)))


if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(known(FLAGS))  # set either way: the workers of `-n` do not ask again
os.environ["MMJAX_TAR_INDEX"] = "off"  # the user's cache folder stays as it is
os.environ["MMJAX_COMPILATION_CACHE"] = ""  # JAX's own setting counts
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_configure(config: pytest.Config) -> None:
    if "MMJAX_TESTS_FOLDER" in os.environ:  # of the process that started this one
        return
    folder = os.environ["MMJAX_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="mmjax-tests-")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(folder, "compiled"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """A worker gets whole files, as with `--dist loadfile`: what the tests of a file share is made once."""
    from xdist.scheduler import LoadFileScheduling

    if config.option.dist != "load":  # `-n` alone sets this
        return None
    config.option.loadscopereorder = False  # the order of `pytest_collection_modifyitems`
    return LoadFileScheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What is imported by now stays until the end; the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
