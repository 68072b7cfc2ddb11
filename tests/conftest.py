"""The tests compile many small programs and run each of them once, so XLA is told to spend little on optimising them.

`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest ...` compiles as users do; docs/parity.md was measured so. An XLA that does not
know a flag ends the process, so a process that may end is asked first.
"""

import os
import subprocess
import sys

FLAG = "--xla_cpu_use_fusion_emitters=false"  # they take most of what is left
STARTS_XLA = "from jaxlib import xla_client; xla_client.make_cpu_client()"  # 0.3 s


def is_known(flag: str) -> bool:
    """Whether the installed XLA starts with this flag."""
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run([sys.executable, "-c", STARTS_XLA], env=environment, capture_output=True).returncode


if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = FLAG if is_known(FLAG) else ""  # set either way: the workers of `-n` do not ask again
os.environ["MMJAX_TAR_INDEX"] = os.environ["MMJAX_COMPILATION_CACHE"] = "off"  # the user's cache folder stays as it is
