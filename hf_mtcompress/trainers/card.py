"""The card that a trainer writes beside a multi-task model: what it knows, and nothing that it does not.

A run of a recipe has a record, and a card made of it (`hf_mtcompress.publishing.card`); a trainer knows the model, the
scores of its validation rows and its arguments.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import TrainingArguments

from hf_mtcompress.model.modeling import MultiTaskModel
from hf_mtcompress.publishing.markup import code, text
from hf_mtcompress.publishing.metadata import LIBRARY, PIPELINES, hub_metric
from hf_mtcompress.publishing.report import markdown
from hf_mtcompress.tasks import Task
from hf_mtcompress.trainers.scores import Scores, average

_REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*|[\w][\w.-]*")
_SETTINGS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "seed",
    "mixing",
    "fusion",
)
_SHOWN_LABELS = 30


def trainer_card(
    name: str,
    model: MultiTaskModel,
    args: TrainingArguments,
    scores: Scores,
    *,
    steps: int,
    finetuned_from: str | None,
    metadata: Mapping[str, Any],
) -> str:
    """The card as Markdown.

    Args:
        name: of the model, without its owner.
        model: what was trained.
        args: how.
        scores: on the validation rows, of the weights that are saved; empty where they were not scored.
        steps: of the optimizer.
        finetuned_from: Hub id of the encoder; default: what the model says of itself. Local paths are left out.
        metadata: what the user says: `language`, `license`, `tags`, `datasets`; None where nothing is said.
    """
    tasks = model.tasks.values()
    base = finetuned_from or str(getattr(model.encoder, "name_or_path", "") or "")
    base = base if _REPO_ID.fullmatch(base) else ""
    quoted = json.dumps(name, ensure_ascii=False)
    given = {key: value for key, value in metadata.items() if value}
    tags = list(dict.fromkeys([*given.pop("tags", []), *(model.model_tags or [LIBRARY])]))
    results = [
        EvalResult(
            task_type=PIPELINES[task.kind],
            task_name=task.name,
            dataset_type="unknown",
            dataset_config=task.name,  # results of tasks of one kind would become one
            dataset_name=f"validation rows of {task.name}",
            metric_type=hub_metric(metric),
            metric_name=metric,
            metric_value=value,
        )
        for task in tasks
        if task.kind in PIPELINES
        for metric, value in scores.get(task.name, {}).items()
        if metric == task.metric
    ]
    front = ModelCardData(
        library_name=LIBRARY,
        tags=tags,
        base_model=base or None,
        model_name=name if results else None,
        eval_results=results or None,
        **given,
    )
    encoder = f"[{base}](https://huggingface.co/{base})" if base else f"a {model.encoder.config.model_type} encoder"
    lines = [
        f"---\n{front.to_yaml()}\n---",
        f"# {text(name)}",
        f"One model with {len(model.tasks)} task{'s' if len(model.tasks) > 1 else ''} on {encoder}, trained with "
        "hf_mtcompress.",
        "## Tasks",
        markdown([["task", "kind", "answers", "metric", "validation"], *(_row(task, scores) for task in tasks)]),
    ]
    if (mean := average(tasks, scores)) is not None:
        lines.append(f"Average of the main tasks on their validation rows: {mean:.4f}.")
    if not scores:
        lines.append("These weights were not scored while they were trained.")
    lines += [
        "## How to use it",
        "```python\nimport hf_mtcompress  # registers the model\nfrom transformers import pipeline\n\n"
        f'answer = pipeline("multi-task", model={quoted})  # the folder or the repository of this model\n```',
        "## Training",
        markdown([["setting", "value"], ["optimizer steps", str(steps)], *_settings(args)]),
    ]
    return "\n\n".join(lines) + "\n"


def _row(task: Task, scores: Scores) -> list[str]:
    labels = [code(label, in_table=True) for label in (task.labels or ())[:_SHOWN_LABELS]]
    more = len(task.labels or ()) - len(labels)
    answers = ", ".join(labels) + (f" and {more} more" if more else "") if labels else "a number"
    score = scores.get(task.name, {}).get(str(task.metric))
    shown = "not measured" if score is None else f"{score:.4f}"
    return [f"`{task.name}`", text(task.kind), answers, text(str(task.metric)), shown]


def _settings(args: TrainingArguments) -> list[list[str]]:
    found = [(name, getattr(args, name, None)) for name in _SETTINGS]
    return [[name, text(str(getattr(value, "value", value)))] for name, value in found if value is not None]
