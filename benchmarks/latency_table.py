"""How well a table of block times foretells the time of shapes that were not measured for it.

Command: python benchmarks/latency_table.py --encoder FOLDER_OR_HUB_ID [--runtime onnx_int8] [--shapes 10]

The table is measured as prune steps and searches do it. Then random shapes of the same encoder (one to all layers, each
with its own number of heads and its own width in multiples of 32) are saved in the form of the runtime and timed in
turns. The goal is a prediction within 10 % of the minimum time at batch sizes 1 and 32. Run it on a quiet machine.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_mtcompress.artifacts import write_text
from hf_mtcompress.compression.latency import measure_latency, save_shape
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.evaluation.benchmark import benchmark
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.recipe import BenchmarkConfig
from hf_mtcompress.tasks import SequenceClassification, TokenClassification

RESULT = Path(__file__).parent / "results" / "latency_table.json"
BATCH_SIZES = (1, 32)
TEXTS = ["A plain sentence about nothing in particular, which is only here to be counted in tokens."]


def random_shapes(full: list[tuple[int, int]], count: int, seed: int) -> list[list[tuple[int, int]]]:
    """Different depths, and in each layer some heads and a width in multiples of 32."""
    generator = np.random.default_rng(seed)
    heads, width = full[0]
    return [
        [
            (int(generator.integers(1, heads + 1)), 32 * int(generator.integers(1, width // 32 + 1)))
            for _ in range(int(generator.integers(1, len(full) + 1)))
        ]
        for _ in range(count)
    ]


def main() -> int:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a pretrained text encoder")
    parser.add_argument("--runtime", choices=("torch", "onnx", "onnx_int8"), default="onnx_int8")
    parser.add_argument("--shapes", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    tasks: list[Any] = [
        SequenceClassification("topic", labels=tuple("abcd"), text="text", label="label"),
        TokenClassification("words", labels=tuple("abcdefgh"), tokens="tokens", label="tags"),
    ]
    model = MultiTaskModel.from_encoder(options.encoder, tasks).eval()
    begin = time.monotonic()
    table = measure_latency(
        model,
        tokenizer,
        TEXTS,
        runtime=options.runtime,
        tokens=options.tokens,
        batch_sizes=BATCH_SIZES,
        threads=options.threads,
        repetitions=options.repetitions,
    )
    seconds = time.monotonic() - begin
    shapes = random_shapes(find_anatomy(model.encoder).sizes, options.shapes, options.seed)
    with TemporaryDirectory() as scratch:
        folders = {"reference": Path(scratch) / "reference"}
        model.save_pretrained(folders["reference"])
        tokenizer.save_pretrained(folders["reference"])
        for number, shape in enumerate(shapes):
            place = Path(scratch) / str(number)
            folders[str(number)] = save_shape(model, tokenizer, shape, place, options.runtime)
        config = BenchmarkConfig(
            tokens=options.tokens,
            batch_sizes=BATCH_SIZES,
            repetitions=options.repetitions,
            threads=options.threads,
        )
        timed = benchmark(folders, reference="reference", config=config, samples=TEXTS)
    rows = [
        {
            "shape": shape,
            "batch_size": row.batch_size,
            "predicted_ms": table.milliseconds(shape, row.batch_size),
            "minimum_ms": row.minimum_ms,
            "median_ms": row.median_ms,
            "error": table.milliseconds(shape, row.batch_size) / row.minimum_ms - 1.0,
        }
        for number, shape in enumerate(shapes)
        for row in timed.latency[str(number)]
        if row.minimum_ms is not None  # the machine was busy: run it again when it is quiet
    ]
    summary = {
        str(size): {
            "largest_error": max(abs(row["error"]) for row in rows if row["batch_size"] == size),
            "median_error": statistics.median(abs(row["error"]) for row in rows if row["batch_size"] == size),
            "error_of_measured_shapes": table.batches[size].largest_error,
        }
        for size in BATCH_SIZES
    }
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    known[options.runtime] = {
        "seconds_of_the_table": seconds,
        "summary": summary,
        "rows": rows,
        "conditions": timed.conditions,
        "environment": environment_facts(),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULT, json.dumps(known, indent=2) + "\n")
    for size, found in summary.items():
        print(
            f"{options.runtime}, batch size {size}: error of {options.shapes} random shapes at most "
            f"{100 * found['largest_error']:.1f} %, median {100 * found['median_error']:.1f} %"
        )
    print(f"table: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
