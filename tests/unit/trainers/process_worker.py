"""Trains three tasks and writes what came out; run once alone and once as two processes by `test_processes.py`."""

import json
import sys
from pathlib import Path

import torch
from transformers import set_seed

from hf_mtcompress import (
    DistillationTrainer,
    DistillationTrainingArguments,
    GradualPruning,
    MultiTaskModel,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
)
from hf_mtcompress import SequenceClassification as Sequence
from hf_mtcompress import TokenClassification as Tokens
from hf_mtcompress.losses.criteria import RelationsCriterion
from tests.tiny import FEELING_LABELS, TAG_LABELS, tiny_encoder, tiny_text_rows, tiny_token_rows, tiny_tokenizer


def main(
    folder: Path,
    batch_size: int,
    find_unused: bool,
    mixed: bool,
    adapters: bool,
    distill: bool,
    gradual: bool,
    branch: bool,
    window: bool,
) -> None:
    set_seed(0)
    tasks = [
        Sequence("mood", labels=FEELING_LABELS, text="text", label="label"),
        Sequence("strength", problem_type="regression", text="text", label="intensity"),
        Tokens("tags", labels=TAG_LABELS, tokens="tokens", label="tags"),
    ]
    place = {"branches": {"side": ["tags"]}, "branch_layers": 1} if branch else {}
    encoder = tiny_encoder("bert", hidden_size=16 if distill else 32)
    model = MultiTaskModel.from_encoder(encoder, tasks, max_length=32, **place)
    teaching = {}
    if distill:  # a narrow student learns through projections; its teacher is asked before by both processes
        teacher = MultiTaskModel.from_encoder(tiny_encoder("bert", seed=1), tasks, max_length=32)
        criteria = ["logits", "hidden", RelationsCriterion(relation_heads=4), "embedding"]
        teaching = {"teacher": teacher, "criteria": criteria, "teacher_cache": folder / "cache", "probe_rows": 0}
    if adapters:
        model.add_adapters(["mood", "tags"])
    # Neither source fills its last batch, and the rows of the last evaluation batch are fewer than the processes.
    texts, tokens = tiny_text_rows(13), tiny_token_rows(7)
    data = {"mood": texts, "strength": texts, "tags": tokens}
    trainer = (DistillationTrainer if distill else MultiTaskTrainer)(
        model=model,
        args=(DistillationTrainingArguments if distill else MultiTaskTrainingArguments)(
            str(folder),
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            learning_rate=1e-3,
            optim="sgd",  # Adam turns rounding of tiny gradients into steps of full size
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            ddp_find_unused_parameters=find_unused,
            batches="mixed" if mixed else "one_source",
            fusion="gradient_norm" if mixed else "sum",
            fusion_options={"share": 0.3} if mixed else None,
            gradient_combination="upgrad" if mixed or window else None,
            measure_interference=2 if window or mixed else None,
            measure_on="validation" if mixed else "train",
            l1_penalty=0.05 if distill else 0.0,
            l2_penalty=0.1 if distill else 0.0,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tiny_tokenizer(),
        callbacks=[GradualPruning(heads=0.5, feed_forward=0.5, multiple_of=1)] if gradual else None,
        **teaching,
    )
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder)
        losses = [
            {key: value for key, value in row.items() if key.startswith(("loss", "penalty"))}
            for row in trainer.state.log_history
        ]
        result = {
            "processes": trainer.args.world_size,
            "metrics": {
                key: value for key, value in metrics.items() if not key.endswith(("runtime", "per_second", "epoch"))
            },
            "losses": [row for row in losses if row],
            "looks": trainer.interference(),
        }
        (folder / "result.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    modes = sys.argv[3:]
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        find_unused="find" in modes,
        mixed="mixed" in modes,
        adapters="adapters" in modes,
        distill="distill" in modes,
        gradual="gradual" in modes,
        branch="branch" in modes,
        window="window" in modes,
    )
