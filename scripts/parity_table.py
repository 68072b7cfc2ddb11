"""Prints the table of docs/parity.md from the lines that `MMJAX_PARITY_TABLE=FILE pytest tests/parity` wrote."""

import collections
import json
import re
import sys


def main(path: str) -> None:
    worst: dict[str, dict] = {}
    counts: collections.Counter = collections.Counter()
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            stage = re.sub(r"layers\.\d+\.", "layers.N.", row["stage"])
            row["stage"] = stage.replace("llama_model.base_model.model.", "…")
            counts[row["stage"]] += 1
            if row["relative"] >= worst.get(row["stage"], row)["relative"]:
                worst[row["stage"]] = row
    print("| stage | arrays | largest absolute difference | largest relative difference | in case |")
    print("|---|---|---|---|---|")
    for stage, row in worst.items():
        case = row["test"].split("[")[-1].rstrip("]").removesuffix("-" + stage)
        print(f"| {stage} | {counts[stage]} | {row['absolute']:.1e} | {row['relative']:.1e} | {case} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
