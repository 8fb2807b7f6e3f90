"""A tiny recipe with its encoder and data on disk: every kind of step, seconds to run."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import FEELING_LABELS, tiny_encoder, tiny_text_rows, tiny_tokenizer


def write_tiny_recipe(folder: Path, **sections: Any) -> Path:
    """Write encoder, rows and `recipe.yaml` into `folder`; `sections` replace those of the recipe."""
    encoder = folder / "encoder"
    tiny_encoder("bert", hidden_size=64, intermediate_size=128, num_attention_heads=4).save_pretrained(encoder)
    tiny_tokenizer().save_pretrained(encoder)
    for seed, (split, rows) in enumerate({"train": 48, "validation": 16, "test": 24}.items()):
        data = tiny_text_rows(rows, seed=seed).select_columns(["text", "label", "intensity"])
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    recipe: dict[str, Any] = {
        "name": "tiny",
        "seed": 5,
        "encoder": {"path": "encoder", "hub_id": "someone/tiny-encoder", "max_length": 32},
        "tasks": {
            "mood": {
                "kind": "sequence-classification",
                "data": {
                    "path": "json",
                    "data_files": {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
                },
                "text": "text",
                "label": "label",
                "labels": list(FEELING_LABELS),
            },
            "strength": {
                "kind": "sequence-classification",
                "data": "mood",
                "text": "text",
                "label": "intensity",
                "problem_type": "regression",
            },
        },
        "training": {"batch_size": 8, "epochs": 2, "learning_rate": 2.0e-3, "arguments": {"disable_tqdm": True}},
        "benchmark": {"tokens": 8, "batch_sizes": [1, 4], "repetitions": 2, "warmup": 1, "threads": 1, "wait": 0},
        "steps": [
            {"kind": "finetune", "name": "teacher"},
            {"kind": "distill", "name": "student", "teacher": "teacher", "student": {"layers": 2}},
            {"kind": "export", "name": "plain", "from": "student", "formats": ["vanilla", "onnx"]},
            {
                "kind": "prune",
                "name": "pruned",
                "from": "student",
                "heads": 0.25,
                "feed_forward": 0.4,
                "multiple_of": 16,
                "rows": 16,
                "recover": {"kind": "distill", "teacher": "teacher", "epochs": 1},
            },
            {"kind": "quantize", "name": "small", "from": "pruned", "backend": "bitsandbytes", "bits": 8},
            {"kind": "quantize", "name": "int8", "from": "pruned", "backend": "onnxruntime", "bits": 8},
        ],
        "reference": "teacher",
        "publish": {"repo_id": "someone/tiny", "license": "apache-2.0"},
        "budget": {"latency_b1_ratio": 100.0, "size_mb": 0.000001},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, **sections}, sort_keys=False))
    return path
