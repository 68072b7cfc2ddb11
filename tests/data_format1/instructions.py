"""The vector instructions of this machine's processor: with others the last bit of a sum may differ."""

from pathlib import Path


def instructions() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return sorted(flag for flag in flags if flag.startswith(("avx", "fma", "amx")))
