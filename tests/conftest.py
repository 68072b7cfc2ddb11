"""The tests compile many small programs and run each of them once, so JAX is told to spend little on optimising them.

`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest ...` compiles as users do; docs/parity.md was measured so.
"""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["MMJAX_TAR_INDEX"] = os.environ["MMJAX_COMPILATION_CACHE"] = "off"  # the user's cache folder stays as it is
