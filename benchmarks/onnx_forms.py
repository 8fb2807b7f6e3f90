"""Size, distance from float, and time of every ONNX form of one encoder, side by side.

Command: python benchmarks/onnx_forms.py --encoder FOLDER_OR_HUB_ID [--threads 1] [--repetitions 20]

The heads are untrained, so the distance (largest difference of any logit over 64 texts, as a fraction of the largest
logit) says how near the arithmetic is, not what a task loses. Times are minima over that of the float graph, one
process for each form, taking turns.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from hf_mtcompress import export_onnx, load_predictor, quantize_onnx
from hf_mtcompress.artifacts import write_text
from hf_mtcompress.config import BenchmarkConfig
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.evaluation.benchmark import benchmark, measure_size
from hf_mtcompress.exporting.onnx import largest_difference
from hf_mtcompress.exporting.onnx_quantization import Calibration
from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.tasks import SequenceClassification, TokenClassification

RESULT = Path(__file__).parent / "results" / "onnx_forms.json"
BATCH_SIZES = (1, 16)
SUBJECTS = ("The ferry", "A neighbour", "The committee", "My old bicycle", "Nobody", "The last train", "A cook", "Rain")
ENDINGS = (
    "left an hour late.",
    "had been painted green, for reasons that were never told to anybody who asked.",
    "came back twice and then stayed away for good, which surprised the whole street!",
    "is said to be worth more than it looks.",
    "waited.",
    "made them all laugh, even those who had sworn that morning to be serious for once.",
    "costs too much?",
    "will not be there tomorrow, or so the man at the counter says, and he should know.",
)
TEXTS = [f"{subject} {ending}" for subject in SUBJECTS for ending in ENDINGS]


def main() -> int:
    """Make all forms, measure them, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a pretrained text encoder")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    logging.set_verbosity_error()
    set_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    tasks: list[Any] = [
        SequenceClassification("topic", labels=tuple("abcd"), text="text", label="label"),
        TokenClassification("words", labels=tuple("abcdefgh"), tokens="tokens", label="tags"),
    ]
    model = MultiTaskModel.from_encoder(options.encoder, tasks).eval()
    rows = [{name: np.asarray(values)[None] for name, values in tokenizer(text).items()} for text in TEXTS]
    forms: dict[str, dict[str, Any]] = {
        "16 bits": {"bits": 16},
        "8 bits, dynamic": {"bits": 8},
        "8 bits, static, percentile": {"bits": 8, "calibration": Calibration(rows, "percentile")},
        "8 bits, static, entropy": {"bits": 8, "calibration": Calibration(rows, "entropy")},
        "8 bits, static, minmax": {"bits": 8, "calibration": Calibration(rows, "minmax")},
        "4 bits, blocks of 64": {"bits": 4},
        "4 bits, blocks of 32, embeddings in 8 bits": {"bits": 4, "block_size": 32, "embedding_bits": 8},
    }
    batch = {name: np.asarray(values) for name, values in tokenizer(TEXTS, padding=True, return_tensors="np").items()}
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        folders = {"torch": place / "torch", "float32": export_onnx(model, tokenizer, place / "float32")}
        model.save_pretrained(folders["torch"])
        tokenizer.save_pretrained(folders["torch"])
        for name, settings in forms.items():
            folders[name] = quantize_onnx(folders["float32"], place / name, **settings)
        expected = load_predictor(folders["float32"]).logits(batch)
        config = BenchmarkConfig(
            tokens=options.tokens,
            batch_sizes=BATCH_SIZES,
            repetitions=options.repetitions,
            threads=options.threads,
        )
        timed = benchmark(folders, reference="torch", config=config, samples=TEXTS)
        minimum = {name: {row.batch_size: row.minimum_ms for row in rows} for name, rows in timed.latency.items()}
        found = {
            name: {
                "megabytes": measure_size(folders[name]).weights_bytes / 1e6,
                "difference": largest_difference(load_predictor(folders[name]).logits(batch), expected),
                "time": {str(size): minimum[name][size] / minimum["float32"][size] for size in BATCH_SIZES},
            }
            for name in ("float32", *forms)
        }
    result = {"texts": len(TEXTS), "forms": found, "conditions": timed.conditions, "environment": environment_facts()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    whole = found["float32"]["megabytes"]
    print("| form | MB | times smaller | difference | time, batch 1 | batch 16 |\n| --- |" + " ---: |" * 5)
    for name, row in found.items():
        times = " | ".join(f"{row['time'][str(size)]:.2f}" for size in BATCH_SIZES)
        smaller = whole / row["megabytes"]
        print(f"| {name} | {row['megabytes']:.1f} | {smaller:.1f} | {row['difference']:.2g} | {times} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
