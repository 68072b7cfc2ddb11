"""Compiles programs at released width for TPUs that are not there, and compares them with the least that they need.

    pip install 'mmjax[tpu]'
    python -m benchmarks.compiled [--program P ...] [--topology T ...] [--json FILE] [--texts FOLDER]

Nothing runs on a device: every figure is the compiler's. All figures are of one device. For each program it prints

- what it needs: operations of its matrix products as the model is written, and bytes of its weights and inputs, once
  for each pass that reads them;
- what was compiled: operations and bytes in the text of the compiled program, temporaries, and the compiler's own
  estimate of the time, which is the sum of libtpu's `estimated_cycles` over all instructions, times the iterations of
  their loops, over the clock. Copies and collectives that overlap with other work have no cycles;
- the share of peak: the time of the needed operations at the chip's peak over the estimate;
- by part of the model, the estimate, and the waste, which is the time beyond that of its products at peak.

A program takes one to two minutes and 2 GB on an idle machine.
"""

import argparse
import dataclasses
import functools
import gzip
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.programs import PROGRAMS, Needed, Program
from mmjax import files, sharding
from mmjax.config import MeshConfig
from mmjax.cost import estimate, hardware, hlo

TOPOLOGIES = ("v5e", "v5p", "v6e")
GB, TERA = 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    facts: what is known in addition to the text, as JSON: "program", "topology", "slice", "floor_flops", "floor_bytes",
           "fits", "temporaries_bytes", "message" (the compiler's, if it refused), "seconds"
    text:  None if it does not fit
    """

    facts: dict[str, Any]
    text: str | None


# ---- compiling ----


def slice_of(topology: str, devices: int) -> str:
    """Returns the slice for a topology's name: itself if it names one, else as square a slice as so many chips make.

    Raises ValueError for an unknown topology.
    """
    chip, _, grid = topology.partition(":")
    if chip not in hardware.CHIPS:
        raise ValueError(f"--topology {topology}: known are {', '.join(TOPOLOGIES)}, or a slice of one, such as "
                         f"{slice_of(TOPOLOGIES[0], 4)}.")
    if grid:
        return topology
    sides = [1] * hardware.CHIPS[chip].dimensions
    while math.prod(sides) < devices:
        sides[sides.index(min(sides))] *= 2
    return f"{chip}:{'x'.join(map(str, sorted(sides)))}"


def mesh_of(program: Program, topology: hardware.Topology) -> jax.sharding.Mesh:
    """Returns a program's mesh, cut to the number of devices that there are."""
    fsdp = math.gcd(program.mesh.fsdp, len(topology.devices))
    return sharding.make_mesh(dataclasses.replace(program.mesh, fsdp=fsdp), topology.devices)


@functools.cache
def needed(name: str) -> Needed:
    """Returns what a program needs.

    It is counted on a CPU, for which attention is computed in its dense form, so it does not depend on kernels.
    """
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.local_devices(backend="cpu")[:1])
    with sharding.use_mesh(mesh):
        return PROGRAMS[name].build(mesh).count()


def compile_program(name: str, topology: str) -> Compiled:
    """Compiles a program for a topology. One that the compiler refuses, such as for lack of memory, has no text."""
    program = PROGRAMS[name]
    found = hardware.find(slice_of(topology, program.devices))
    start = time.monotonic()
    built = program.build(mesh_of(program, found))
    facts = {"program": name, "topology": topology, "slice": found.name,
             "floor_flops": needed(name).operations // len(found.devices),
             "floor_bytes": built.floor_bytes(needed(name))}
    try:
        compiled = built.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(facts | {"fits": False, "temporaries_bytes": None, "message": str(error),
                                 "seconds": time.monotonic() - start}, None)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return Compiled(facts | {"fits": True, "temporaries_bytes": temporaries, "message": "",
                             "seconds": time.monotonic() - start}, compiled.as_text())


def kept(name: str, topology: str, folder: Path | None) -> Compiled:
    """Returns a compiled program, read from a folder if it is in it, else compiled and written to it."""
    if folder is None:
        return compile_program(name, topology)
    facts, text = (folder / f"{name}@{topology}{ending}".replace(":", "-") for ending in (".json", ".hlo.gz"))
    if facts.is_file():
        read = json.loads(facts.read_text(encoding="utf-8"))
        return Compiled(read | {"read_from": str(facts)}, gzip.open(text, "rt").read() if text.is_file() else None)
    compiled = compile_program(name, topology)
    if compiled.text is not None:
        text.write_bytes(gzip.compress(compiled.text.encode()))
    facts.write_text(json.dumps(compiled.facts, indent=2) + "\n", encoding="utf-8")
    return compiled


# ---- judging ----


def judge(compiled: Compiled) -> dict[str, Any]:
    """Returns the figures of a compiled program, all of one device."""
    facts, program = compiled.facts, PROGRAMS[compiled.facts["program"]]
    row = {"program": facts["program"], "topology": facts["topology"], "floor_flops": facts["floor_flops"],
           "floor_bytes": facts["floor_bytes"]}
    rest = {name: facts[name] for name in facts if name not in (*row, "fits", "temporaries_bytes")}
    if compiled.text is None:
        unknown = dict.fromkeys(("flops", "bytes", "estimate_ms", "share_of_peak", "temporaries_bytes",
                                 "per_call_bytes"))
        return row | unknown | {"fits": False} | rest
    topology = hardware.find(facts["slice"])
    chip, found = topology.chip, estimate.estimate(compiled.text, topology.chip, 1 if program.per_token else None)
    token = found.main_loop() if program.per_token else found
    sent = sum(one.sent for one in hlo.collectives(compiled.text, mesh_of(program, topology)))
    floor_ms = 1e3 * facts["floor_flops"] / chip.flops
    return row | {
        "flops": token.flops, "bytes": token.bytes, "estimate_ms": 1e3 * token.seconds,
        "share_of_peak": floor_ms / (1e3 * token.seconds), "temporaries_bytes": facts["temporaries_bytes"],
        "per_call_bytes": found.bytes - token.bytes, "fits": True, "floor_ms": floor_ms,
        "vmem_only_ms": 1e3 * token.vmem_seconds,
        "share_without_vmem_only": floor_ms / (1e3 * (token.seconds - token.vmem_seconds)),
        "kernel_flops": token.kernel_flops,
        "uncounted_kernels": list(token.uncounted), "sent_bytes": sent,
        "links_ms": 1e3 * sent / topology.links if sent else 0.0,
        "parts": {part.name: {"ms": 1e3 * part.seconds, "wasted_ms": 1e3 * part.wasted, "flops": part.flops,
                              "bytes": part.bytes} for part in (*token.parts, token.recomputed)}} | rest


# ---- showing ----


def show(row: dict[str, Any], console: Console) -> None:
    """Prints the figures of a program by part."""
    where = f"{row['program']} on {row['slice']}"
    console.print(f"\n{where}: {PROGRAMS[row['program']].title}", style="bold", highlight=False)
    if "read_from" in row:
        console.print(f"  not compiled again, read from {row['read_from']}", highlight=False)
    if not row["fits"]:
        console.print(f"  does not fit, or cannot be compiled: {_first_lines(row['message'])}", highlight=False)
        return
    console.print(f"  needs {row['floor_flops'] / TERA:,.3f} T operations ({row['floor_ms']:,.1f} ms at peak), "
                  f"{row['floor_bytes'] / GB:,.2f} GB; compiled {row['flops'] / TERA:,.3f} T, "
                  f"{row['bytes'] / GB:,.2f} GB, {row['temporaries_bytes'] / GB:,.2f} GB of temporaries",
                  highlight=False)
    console.print(f"  estimate {row['estimate_ms']:,.1f} ms, of which {row['vmem_only_ms']:,.1f} ms in VMEM alone; "
                  f"share of peak {row['share_of_peak']:.2f}", highlight=False)
    if row["per_call_bytes"]:
        console.print(f"  and {row['per_call_bytes'] / GB:,.2f} GB for every call", highlight=False)
    if row["sent_bytes"]:
        console.print(f"  sends {row['sent_bytes'] / GB:,.2f} GB, {row['links_ms']:,.1f} ms of the links, which are "
                      "not in the estimate", highlight=False)
    if row["kernel_flops"]:
        console.print(f"  {row['kernel_flops'] / TERA:,.3f} T operations are of kernels. {estimate.RULE}",
                      highlight=False)
    if row["uncounted_kernels"]:
        console.print("  NOT COUNTED, because their operations are unknown: " + ", ".join(row["uncounted_kernels"]),
                      highlight=False)
    table = _table("  part", "ms", "of it wasted", "of the estimate", "T operations", "GB")
    for name, part in row["parts"].items():
        table.add_row(f"  {name}", f"{part['ms']:,.2f}", f"{part['wasted_ms']:,.2f}",
                      f"{part['ms'] / row['estimate_ms']:.1%}", f"{part['flops'] / TERA:,.3f}",
                      f"{part['bytes'] / GB:,.3f}", style="dim" if name == "recomputed" else "")
    console.print(table)


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table of all programs."""
    table = _table("program", "topology", "floor T", "floor GB", "T", "GB", "estimate ms", "of peak", "temporaries GB",
                   "largest wastes, ms")
    for row in rows:
        floors = f"{row['floor_flops'] / TERA:,.2f}", f"{row['floor_bytes'] / GB:,.2f}"
        if not row["fits"]:
            table.add_row(row["program"], row["slice"], *floors, "", "", "does not fit", "", "", "")
            continue
        wastes = [f"{name} {part['wasted_ms']:,.1f}" for name, part in list(row["parts"].items())[:3]]
        table.add_row(row["program"], row["slice"], *floors, f"{row['flops'] / TERA:,.2f}", f"{row['bytes'] / GB:,.2f}",
                      f"{row['estimate_ms']:,.1f}", f"{row['share_of_peak']:.2f}",
                      f"{row['temporaries_bytes'] / GB:,.2f}", ", ".join(wastes))
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of docs/performance.md."""
    names = ("program", "slice", "ms at peak", "estimate, ms", "of peak", "in VMEM alone, ms", "GB needed", "GB",
             "temporaries, GB", "largest wastes, ms")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        start = f"| `{row['program']}` | {row['slice']} |"
        if not row["fits"]:
            lines.append(f"{start} | does not fit | | | {row['floor_bytes'] / GB:,.1f} | | | |")
            continue
        wastes = ", ".join(f"{name} {part['wasted_ms']:,.1f}" for name, part in list(row["parts"].items())[:4])
        lines.append(f"{start} {row['floor_ms']:,.1f} | {row['estimate_ms']:,.1f} | {row['share_of_peak']:.2f} | "
                     f"{row['vmem_only_ms']:,.1f} | {row['floor_bytes'] / GB:,.1f} | {row['bytes'] / GB:,.1f} | "
                     f"{row['temporaries_bytes'] / GB:,.1f} | {wastes} |")
    return "\n".join(lines)


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name.strip() in ("program", "topology", "part") or "wastes," in name
                         else "right", no_wrap=True)
    return table


def _first_lines(message: str, count: int = 2) -> str:
    """Returns the beginning of the compiler's message on one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return re.sub(r"\s+", " ", " ".join(lines[:count]))[:500]


# ---- the command ----


def chosen(names: Sequence[str] | None) -> list[str]:
    """Returns the programs of these names; "step" is the steps of all configs, None everything.

    Raises ValueError for an unknown name.
    """
    found: dict[str, None] = {}
    for name in names or PROGRAMS:
        here = [known for known in PROGRAMS if known == name or known.startswith(f"{name}:") and name == "step"]
        if not here:
            raise ValueError(f"--program {name}: known are {', '.join(PROGRAMS)}, and step for all steps.")
        found |= dict.fromkeys(here)
    return list(found)


def run(programs: Sequence[str], topologies: Sequence[str], out: Path | None, texts: Path | None,
        console: Console) -> list[dict[str, Any]]:
    """Compiles and judges every program for every topology, and returns the rows.

    The JSON is written again after each program, so that an interrupted run leaves what it found.
    """
    if texts is not None:
        texts.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    console.print(f"Compiled, not run. {estimate.RULE}", highlight=False)
    for topology in topologies:
        for name in programs:
            rows.append(judge(kept(name, topology, texts)))
            show(rows[-1], console)
            if out is not None:
                out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print()
    console.print(summary(rows))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", nargs="+", metavar="P", help=f"{', '.join(PROGRAMS)}, or step for all steps "
                        "(default: all)")
    parser.add_argument("--topology", nargs="+", metavar="T", default=TOPOLOGIES,
                        help=f"{', '.join(TOPOLOGIES)}, for which a program has its own slice, or a slice such as "
                        "v5e:4x4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    parser.add_argument("--markdown", action="store_true", help="also print the table of docs/performance.md")
    parser.add_argument("--texts", type=Path, metavar="FOLDER", help="folder for the compiled programs. A program that "
                        "is in it is read and not compiled again: take a new folder after a change of the code")
    args = parser.parse_args(arguments)
    jax.config.update("jax_enable_compilation_cache", False)  # programs for other devices cannot be loaded from it
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # otherwise JAX searches for a TPU, because libtpu is installed
    try:
        programs = chosen(args.program)
        for topology in args.topology:
            hardware.find(slice_of(topology, 1))
        files.require_local({"--json": args.json, "--texts": args.texts})
        if args.json is not None and not args.json.parent.is_dir():
            raise ValueError(f"--json {args.json}: the folder {args.json.parent} does not exist; create it first.")
        rows = run(programs, list(dict.fromkeys(args.topology)), args.json, args.texts,
                   Console(width=200) if not sys.stdout.isatty() else Console())
        if args.markdown:
            print(f"\n{markdown(rows)}")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
