"""One task, one teacher, one student: this package beside TextBrewer 0.2.1 at the same optimizer steps.

Command: pip install --no-deps textbrewer==0.2.1 && pip install tensorboard absl-py
         python benchmarks/textbrewer_one_task.py --data FOLDER --encoder FOLDER_OR_HUB_ID [--task sst2] [--seeds 3]

For each seed the encoder is fine-tuned on the task as a stock model; students of three of its layers are then trained
on labels alone, and on labels, answers and hidden states by `DistillationTrainer` and by TextBrewer's GeneralDistiller,
with the same rows, batch size, optimizer, learning rates, temperature and layer map, all in float32; training rows are
those of the small suite, test rows all there are. Each scales losses in its own way. Resumable: seeds that are in
the JSON are not repeated.
"""

import argparse
import copy
import importlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from multitask_text import FOLDERS, RECIPE
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.utils import logging

from hf_mtcompress import DistillationTrainer
from hf_mtcompress.artifacts import write_text
from hf_mtcompress.data.sources import load_sources
from hf_mtcompress.environment import environment_facts
from hf_mtcompress.losses.criteria import HiddenCriterion, LogitsCriterion
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.surgery import keep_layers
from hf_mtcompress.recipe.load import load_recipe
from hf_mtcompress.runs.compare.statistics import paired_difference

RESULT = Path(__file__).parent / "results" / "textbrewer_one_task.json"
LAYERS, EPOCHS, BATCH, RATE, TEMPERATURE = (1, 3, 5), 4, 32, 2e-4, 2.0


def arguments(folder: str, seed: int) -> TrainingArguments:
    """The same settings for every arm of ours."""
    return TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=0.1,
        seed=seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )


def encoded(rows: Dataset, task: Any, tokenizer: Any) -> Dataset:
    """Model inputs and `labels` of raw rows."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = tokenizer(*(batch[column] for column in task.input_columns), truncation=True, max_length=96)
        return {**inputs, "labels": task.encode_labels(batch[task.label], {})}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def accuracy(model: PreTrainedModel, rows: Dataset, collate: Any) -> float:
    """On all rows, in float32."""
    right = 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            batch = collate([rows[index] for index in range(start, min(start + 64, len(rows)))])
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def student_of(teacher: PreTrainedModel) -> PreTrainedModel:
    """Some layers of the teacher, with its head."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    keep_layers(encoder_of(student), list(LAYERS))
    return student


def by_textbrewer(student: PreTrainedModel, teacher: PreTrainedModel, rows: Dataset, collate: Any, seed: int) -> None:
    """Train a student with TextBrewer, as its documentation shows."""
    from textbrewer import DistillationConfig, GeneralDistiller  # pyright: ignore[reportMissingImports] - the peer
    from textbrewer import TrainingConfig as BrewingConfig  # pyright: ignore[reportMissingImports] - the peer

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        return {"logits": (outputs.logits,), "hidden": outputs.hidden_states, "losses": (outputs.loss,)}

    matches = [
        {"layer_T": layer + 1, "layer_S": own + 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for own, layer in enumerate(LAYERS)
    ]
    config = DistillationConfig(
        temperature=TEMPERATURE, hard_label_weight=0.5, kd_loss_weight=0.5, intermediate_matches=matches
    )
    set_seed(seed)

    def collate_to_dict(items: list[Any]) -> dict[str, Any]:
        # It passes on by name what is a plain dict, and nothing else.
        return dict(collate(items))

    loader = DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collate_to_dict)  # type: ignore[arg-type]  # a Dataset of datasets has what is needed of torch's
    steps = len(loader) * EPOCHS
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=0.0)
    student.config.output_hidden_states = teacher.config.output_hidden_states = True
    with tempfile.TemporaryDirectory() as folder:
        brewing = BrewingConfig(output_dir=folder, log_dir=None, device="cpu", ckpt_frequency=0)
        distiller = GeneralDistiller(brewing, config, teacher, student, adaptor, adaptor)
        student.train()
        with distiller:
            distiller.train(
                optimizer,
                loader,
                EPOCHS,
                scheduler_class=get_linear_schedule_with_warmup,
                scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
                max_grad_norm=1.0,
                callback=None,
            )
    student.config.output_hidden_states = teacher.config.output_hidden_states = False


def main() -> int:
    """Run all seeds, print the means, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of the pretrained encoder")
    parser.add_argument("--task", default="sst2", help="a task of the text suite with one label a text")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    # Said now, not after the trainings of the other arms.
    importlib.import_module("textbrewer")
    logging.set_verbosity_error()
    overrides = [f"tasks.{task}.data.data_dir={options.data / folder}" for task, folder in FOLDERS.items()]
    overrides.append(f'tasks.{options.task}.data.max_rows={{"train": 1000, "validation": 200}}')
    recipe = load_recipe(RECIPE, [*overrides, f"encoder.path={options.encoder}"])
    sources = load_sources({options.task: recipe.tasks[options.task]}, recipe.seed)
    task = sources.tasks[options.task]
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    splits = sources.splits[options.task]
    train, test = (encoded(splits[role], task, tokenizer) for role in ("train", "test"))
    collate = DataCollatorWithPadding(tokenizer)
    facts = {
        "task": options.task,
        "rows": {"train": len(train), "test": len(test)},
        "encoder": Path(options.encoder).name,
        "settings": {
            "layers": list(LAYERS),
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "temperature": TEMPERATURE,
            "precision": "float32",
        },
    }
    before = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    same = all(before.get(key) == value for key, value in facts.items())
    scores: dict[str, list[float]] = before["accuracy"] if same else {}
    for seed in range(1 + min(map(len, scores.values()), default=0), options.seeds + 1):
        set_seed(seed)
        teacher = AutoModelForSequenceClassification.from_pretrained(
            options.encoder, num_labels=task.num_outputs, dtype=torch.float32
        )
        with tempfile.TemporaryDirectory() as folder:
            common: dict[str, Any] = {"train_dataset": train, "data_collator": collate, "processing_class": tokenizer}
            Trainer(model=teacher, args=arguments(folder, seed), **common).train()
            made = {"teacher": teacher, "labels alone": student_of(teacher)}
            Trainer(model=made["labels alone"], args=arguments(folder, seed), **common).train()
            made["hf_mtcompress"] = student_of(teacher)
            DistillationTrainer(
                model=made["hf_mtcompress"],
                teacher=copy.deepcopy(teacher),
                criteria=[LogitsCriterion(temperature=TEMPERATURE), HiddenCriterion(layers=LAYERS)],
                label_weight=0.5,
                args=arguments(folder, seed),
                **common,
            ).train()
        made["TextBrewer"] = student_of(teacher)
        by_textbrewer(made["TextBrewer"], copy.deepcopy(teacher), train, collate, seed)
        for name, model in made.items():
            scores.setdefault(name, []).append(accuracy(model, test, collate))
        print(f"seed {seed}: { {name: round(values[-1], 4) for name, values in scores.items()} }", file=sys.stderr)
        result = {
            **facts,
            "environment": environment_facts(),
            "accuracy": scores,
            "means": {name: float(np.mean(values)) for name, values in scores.items()},
        }
        write_text(RESULT, json.dumps(result, indent=2) + "\n")
    for name, values in scores.items():
        print(f"{name}: {statistics.mean(values):.4f} over {len(values)} seeds")
    for name in ("labels alone", "TextBrewer"):
        found = paired_difference(scores["hf_mtcompress"], scores[name])
        interval = (
            "" if found.low is None or found.high is None else f" ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
        )
        print(f"hf_mtcompress against {name}: {100 * found.mean:+.2f} points{interval}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
