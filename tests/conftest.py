"""The tests compile many small programs and run each of them once, so XLA is told to spend little on optimising them.

`JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest ...` compiles as users do; docs/parity.md was measured so. An XLA that does not
know a flag stops at once and names it: `XLA_FLAGS= pytest ...` does without.
"""

import os

if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")  # they take most of what is left
os.environ["MMJAX_TAR_INDEX"] = os.environ["MMJAX_COMPILATION_CACHE"] = "off"  # the user's cache folder stays as it is
