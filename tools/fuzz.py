"""Try thousands of damaged and hostile inputs, and count how many are accepted or refused.

    python -m tools.fuzz --cases 1000 --seed 0          # 1000 cases of each kind
    python -m tools.fuzz --kind models --case 17        # a single case, with its traceback

Every case must be refused in one line, or be accepted and give a sensible result, within 10 s and
1 GB.
"""

import tempfile
from collections import Counter
from pathlib import Path

import torch
import typer

from tests.test_training import encode_tiny_digits
from tests.tools.fuzz_cases import KINDS, FuzzFailure, make_material, try_case


def main(cases: int = 100, seed: int = 0, kind: str = "", case: int = -1) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as base:
        encode_tiny_digits(Path(base) / "digits")
        material = make_material(Path(base) / "digits", Path(base) / "material")
        for name in [kind] if kind else KINDS:
            counts: Counter[str] = Counter()
            for number in [case] if case >= 0 else range(seed, seed + cases):
                with tempfile.TemporaryDirectory(dir=base) as folder:
                    try:
                        result = try_case(name, number, Path(folder), material)
                    except FuzzFailure as failure:
                        if case >= 0:
                            raise
                        result = f"failed ({name} {number}): {failure}"
                    counts[result if result.startswith(("accepted", "failed")) else "refused"] += 1
            print(name, dict(counts), result if case >= 0 else "", flush=True)


if __name__ == "__main__":
    typer.run(main)
