"""Time of one linear layer with most of its weights at 0: as an ordinary matrix, and as a sparse one.

Command: python benchmarks/sparse_layer.py [--rows 64 2048] [--repetitions 200]

One thread; dense and sparse calls take turns, minima are compared.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.environment import environment_facts

RESULT = Path(__file__).parent / "results" / "sparse_layer.json"
INPUTS, OUTPUTS = 384, 1536
SPARSITIES = (0.0, 0.5, 0.8, 0.9)


def main() -> int:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 2048], help="tokens in a call")
    parser.add_argument("--repetitions", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    weight = torch.randn(OUTPUTS, INPUTS)
    found = []
    with torch.inference_mode():
        for rows in options.rows:
            inputs = torch.randn(INPUTS, rows)
            matrices = {}
            for sparsity in SPARSITIES:
                limit = weight.abs().flatten().quantile(sparsity) if sparsity else 0.0
                trimmed = torch.where(weight.abs() < limit, 0.0, weight)
                matrices[sparsity] = {"dense": trimmed, "csr": trimmed.to_sparse_csr()}
            times = {(sparsity, kind): [] for sparsity, kinds in matrices.items() for kind in kinds}
            for _ in range(options.repetitions):
                for (sparsity, kind), seconds in times.items():
                    begin = time.perf_counter()
                    matrices[sparsity][kind] @ inputs
                    seconds.append(time.perf_counter() - begin)
            whole = min(times[0.0, "dense"])
            found += [
                {
                    "rows": rows,
                    "sparsity": sparsity,
                    "kind": kind,
                    "minimum_ms": 1000 * min(seconds),
                    "ratio": min(seconds) / whole,
                }
                for (sparsity, kind), seconds in times.items()
            ]
    result = {"layer": [INPUTS, OUTPUTS], "times": found, "environment": environment_facts()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    print("| rows | zeros | kind | ms | against dense without zeros |\n| ---: | ---: | --- | ---: | ---: |")
    for row in found:
        print(
            f"| {row['rows']} | {100 * row['sparsity']:.0f} % | {row['kind']} | {row['minimum_ms']:.3f} | "
            f"{row['ratio']:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
