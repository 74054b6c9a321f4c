"""Try thousands of damaged and hostile inputs, and print what became of them.

    python -m tools.fuzz --cases 1000 --seed 0          # of each kind
    python -m tools.fuzz --kind models --case 17        # one again, with its traceback

Every case must be refused in one line, or be accepted and give a sensible result, within 10 s and
1 GB. Ends with exit code 1 where a case does not.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch
import typer

from moveimg.tables import markdown_table
from tests.test_training import encode_tiny_digits
from tests.tools.fuzz_cases import KINDS, SECONDS, FuzzFailure, make_material, try_case


def main(cases: int = 100, seed: int = 0, kind: str = "", case: int = -1) -> None:
    torch.set_num_threads(1)
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as base:
        digits = Path(base) / "digits"
        encode_tiny_digits(digits)
        material = make_material(digits, Path(base) / "material")
        for name in [kind] if kind else KINDS:
            counts: Counter[str] = Counter()
            for number in [case] if case >= 0 else range(seed, seed + cases):
                faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # an endless loop in C
                with tempfile.TemporaryDirectory(dir=base) as folder:
                    try:
                        said = try_case(name, number, Path(folder), material)
                    except FuzzFailure as failure:
                        if case >= 0:
                            raise
                        said = str(failure)
                        print(f"{name} {number}: {said}", flush=True)
                        counts[said.partition(":")[0]] += 1
                        continue
                counts["accepted" if said == "accepted" else "refused"] += 1
                if os.environ.get("VERBOSE") or case >= 0:
                    print(f"{name} {number}: {said}", flush=True)
            failed |= bool(set(counts) - {"accepted", "refused"})
            columns = ("accepted", "refused", "traceback", "hang", "memory")
            tried = {"kind": name, "tried": str(sum(counts.values()))}
            rows.append(tried | {key: str(counts[key]) for key in columns})
            print(rows[-1], flush=True)
    print(markdown_table(rows, {key: key for key in rows[0]}))
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
