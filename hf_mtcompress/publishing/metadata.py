"""The front matter of a card: what the Hub reads of a model before anybody does."""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from hf_mtcompress.publishing.facts import ancestors, delivered_artefact, delivered_step, final_scores, tasks_of
from hf_mtcompress.publishing.repository import repository_layout
from hf_mtcompress.records import FORMS, RunRecord

LIBRARY = "hf_mtcompress"
"""What opens the repository, and a tag to find it by.

Of a repository of `transformers` the Hub prints `pipeline("text-classification", model=...)`, which needs this package
and fails where several tasks are of that kind; `pipeline(model=...)` guesses the same. Of other libraries neither does.
"""
PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
}
"""Pipeline tag by kind of task."""
HUB_METRICS = {
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "weighted_f1": "f1",
    "span_f1": "f1",
    "span_precision": "precision",
    "span_recall": "recall",
    "token_accuracy": "accuracy",
}
"""Names of the Hub for our metrics, where they differ."""
KIND_TAGS = {"distill": "distillation", "prune": "pruned", "trim_weights": "sparse", "quantize": "quantized"}
_REPO_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*|[\w][\w.-]*")


def card_metadata(record: RunRecord, repo_id: str | None = None) -> dict[str, Any]:
    """The front matter of the card as a dictionary; what is not known is left out."""
    return metadata_of(record, repo_id).to_dict()


def metadata_of(record: RunRecord, repo_id: str | None = None) -> ModelCardData:
    """What the Hub reads at the top of a card; what is not known is left out."""
    publish = record.publish or {}
    delivered = delivered_step(record)
    chain = ancestors(record, delivered)
    tags = [LIBRARY]
    tasks = tasks_of(record, delivered)
    if len(tasks) > 1:
        tags.append("multi-task")
    tags += [tag for kind, tag in KIND_TAGS.items() if any(step.kind == kind for step in chain)]
    forms = [artefact.form for _, artefact in repository_layout(record).values()]
    tags += [form.name for form in FORMS.values() if form.layout == "graph" and form.name in forms]
    tags += [form.name for form in FORMS.values() if form.in_few_bits and form.name in forms]
    pipelines = list(dict.fromkeys(PIPELINES[task.kind] for task in tasks.values() if task.kind in PIPELINES))
    datasets = [task.dataset_id for task in record.tasks.values() if task.dataset_id]
    base = base_model(record)
    metrics = [hub_metric(task.metric) for task in tasks.values()]
    language = list(publish.get("language") or [])
    extra = {}
    if base is not None:
        untrained = all(step.kind in ("quantize", "export") and step.training is None for step in chain)
        extra["base_model_relation"] = "quantized" if untrained else "finetune"
    return ModelCardData(
        language=language or None,
        license=publish.get("license") or record.encoder.get("license"),
        library_name=LIBRARY,
        pipeline_tag=pipelines[0] if pipelines else None,
        base_model=base,
        datasets=[name for name in dict.fromkeys(datasets) if _REPO_ID.fullmatch(name)] or None,
        metrics=list(dict.fromkeys(metrics)) or None,
        tags=[*tags, *pipelines[1:]],
        model_name=(repo_id or record.name).rpartition("/")[2],
        eval_results=_eval_results(record) or None,
        **extra,
    )


def base_model(record: RunRecord) -> str | None:
    """Hub id of the checkpoint that the delivered model started from, or None where that is not known."""
    chain = ancestors(record, delivered_step(record))
    if any((step.settings.get("student") or {}).get("path") for step in chain):
        return None
    return record.encoder.get("hub_id")


def hub_metric(name: str) -> str:
    """What the Hub calls one of our metrics."""
    return HUB_METRICS.get(name, name)


def _eval_results(record: RunRecord) -> list[EvalResult]:
    scores = final_scores(delivered_artefact(record))
    if scores is None:
        return []
    results = []
    for name, task in record.tasks.items():
        if name not in scores.tasks or task.kind not in PIPELINES:
            continue
        dataset = task.dataset_id if task.dataset_id and _REPO_ID.fullmatch(task.dataset_id) else None
        metrics = scores.tasks[name].metrics
        # The primary metric first: it is the one that the Hub shows.
        for metric in sorted(metrics, key=lambda metric: metric != task.metric):
            # An undefined metric is null in the record.
            if metrics[metric] is None:
                continue
            results.append(
                EvalResult(
                    task_type=PIPELINES[task.kind],
                    task_name=name,
                    dataset_type=dataset or name,
                    dataset_name=task.dataset_id or name,
                    # Results of one task type and data set are merged by the Hub, so the task tells them apart.
                    dataset_config=name,
                    dataset_split=scores.split,
                    dataset_revision=task.dataset_revision,
                    metric_type=hub_metric(metric),
                    metric_name=metric,
                    metric_value=metrics[metric],
                )
            )
    return results
