"""Prints the tables of docs/parity.md from the lines that `MMJAX_PARITY_TABLE=FILE pytest tests/parity` wrote."""

import collections
import json
import re
import sys

TABLES = {  # heading: the test files it is about; the first that matches
    "ImageBind, bind network and input transforms": r"test_imagebind(_text)?\.py",
    "ImageBind-LLM": r"test_imagebind_llm.*\.py",
    "LLaMA-Adapter": r"test_llama_adapter\.py",
    "MiniGPT-4": r".*",
}


def name(stage: str) -> str:
    """A stage without the numbers of layers, blocks and clips, so that each kind is one row."""
    stage = re.sub(r"(layers|visual_blocks)\.\d+\.", r"\1.N.", stage)
    return stage.replace("llama_model.base_model.model.", "…")


def main(path: str) -> None:
    worst: dict[str, dict[str, dict]] = {heading: {} for heading in TABLES}
    counts: collections.Counter = collections.Counter()
    with open(path, encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            file = row["test"].split("::")[0].split("/")[-1]
            heading = next(heading for heading, pattern in TABLES.items() if re.fullmatch(pattern, file))
            stage = name(row["stage"])
            counts[heading, stage] += 1
            if row["relative"] >= worst[heading].get(stage, row)["relative"]:
                worst[heading][stage] = row
    for heading in reversed(TABLES):
        print(f"\n## {heading}\n")
        print("| stage | arrays | largest absolute difference | largest relative difference | in case |")
        print("|---|---|---|---|---|")
        for stage, row in worst[heading].items():
            case = row["test"].split("[")[-1].rstrip("]") if "[" in row["test"] else row["test"].split("::")[-1]
            print(f"| {stage} | {counts[heading, stage]} | {row['absolute']:.1e} | {row['relative']:.1e} | "
                  f"{case.removesuffix('-' + row['stage'])} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
