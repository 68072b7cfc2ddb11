"""How close is close, and a record of how close it was (`MMJAX_PARITY_TABLE=FILE` appends one JSON line each)."""

import json
import os

import numpy as np

# Section 3 of the reference set's description: about ten times the distance of the original's own float32 numbers
# from float64. Gradients and the loss are relative to the largest magnitude of the array.
EMBEDDING, LOGIT, LOSS, GRADIENT = 5e-5, 3e-4, 1e-4, 1e-4


def assert_close(stage: str, got, expected, absolute: float | None = None, relative: float | None = None) -> None:
    """Largest difference over the whole array, absolute or relative to the expected array's largest magnitude."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"{stage}: shape {got.shape}, expected {expected.shape}"
    difference = float(np.abs(got - expected).max(initial=0))
    scale = float(np.abs(expected).max(initial=0)) or 1.0
    if path := os.environ.get("MMJAX_PARITY_TABLE"):
        with open(path, "a", encoding="utf-8") as table:
            test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0]
            table.write(json.dumps({"test": test, "stage": stage, "absolute": difference,
                                    "relative": difference / scale, "bound": absolute or relative}) + "\n")
    bound = absolute if absolute is not None else relative * scale
    assert difference <= bound, f"{stage}: largest difference {difference:.3g} (allowed {bound:.3g})"
