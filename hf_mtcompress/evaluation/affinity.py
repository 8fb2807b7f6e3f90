"""Whether tasks want the same of the encoder that they share: cosines of gradients on rows that nobody trained on.

Gradients of training batches say little of that: most of a small batch's gradient is chance, and towards the end all
of it is about the few rows that are not fitted yet. One look says little either: looks 25 steps apart hardly agree,
means of ten do (`measure_on` of `MultiTaskTrainingArguments`).

References:
    Fifty et al. 2021, "Efficiently Identifying Task Groupings for Multi-Task Learning". Deviation: to first order, by
    cosines of gradients of held-out rows, instead of by looking a step ahead on training batches.
    Charikar, Chen and Farach-Colton 2002, "Finding Frequent Items in Data Streams": the sketch that gradients of any
    length are kept in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.preprocessing import EncodedGroup, encode_groups
from hf_mtcompress.data.readers import Reader
from hf_mtcompress.errors import DataError
from hf_mtcompress.losses.gradients import cosine_matrix, gramian
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel

SKETCH = 2**18
"""Numbers that a gradient is kept in; cosines are off by about 1 / sqrt(SKETCH) = 0.002."""


@dataclass(frozen=True)
class HeldOut:
    """What a task wants of the encoder, on rows that it was not trained on.

    Attributes:
        gradient: (SKETCH,), sketch of the gradient of the mean loss with respect to the layers of the encoder.
        loss: the mean loss over labelled items.
    """

    gradient: Tensor
    loss: float


def held_out_cosines(
    model: MultiTaskModel,
    datasets: Mapping[str, Dataset],
    reader: Reader,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Cosines between the gradients of the tasks' losses with respect to all layers of the encoder.

    Args:
        model: trained on the tasks; left as it was.
        datasets: rows by task, raw or encoded, that were not trained on; a few hundred of each are enough.
        reader: of the encoder.
        batch_size: rows of a backward pass.
        progress: show a bar.

    Returns:
        (K, K), in the order of `model.tasks`: 1 where two tasks want the same, below 0 where a step for one undoes the
        other, 0 for a task that wants nothing.

    Raises:
        DataError: a task has no rows, or none with a label.
        UnsupportedEncoderError: tasks read branches, lower layers or adapters, so that they share less.
    """
    refuse_sub_models(model, "comparing what tasks want of the encoder")
    refuse_adapters(model, "comparing what tasks want of the encoder")
    missing = [name for name in model.tasks if name not in datasets]
    if missing:
        raise DataError(
            f"expected validation rows of every task, found none of {', '.join(missing)}; add the split, or leave the "
            "task out"
        )
    own = {name: datasets[name] for name in model.tasks}
    groups = encode_groups(model.tasks, own, reader, "validation")
    collator = MultiTaskCollator(model.tasks, reader)
    found = held_out_gradients(model, groups, collator, batch_size=batch_size, progress=progress)
    for name in model.tasks:
        if name not in found:
            raise DataError(
                f"task '{name}': expected validation rows with a label, found none among {len(datasets[name])}"
            )
    return cosine_matrix(gramian({name: found[name].gradient for name in model.tasks}))


def held_out_gradients(
    model: MultiTaskModel, groups: Sequence[EncodedGroup], collator: Any, *, batch_size: int, progress: bool = False
) -> dict[str, HeldOut]:
    """By task with a label in some row: what it wants of the layers that are trained, or of all where none is.

    Neither weights nor their `grad` are touched, so that training can go on from there.

    Args:
        model: trained on the tasks; left as it was.
        groups: rows that were not trained on.
        collator: makes a batch of them.
        batch_size: rows of a backward pass.
        progress: show a bar.
    """
    training, weights = model.training, list(_layers(model).parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    frozen = [] if trained else weights
    weights = trained or weights
    model.eval()
    for weight in frozen:
        weight.requires_grad_(True)
    found: dict[str, HeldOut] = {}
    try:
        tasks = [(group, name) for group in groups for name in group.own_tasks]
        for group, name in tqdm(tasks, desc="comparing gradients", unit="task", disable=not progress):
            wanted = _held_out(model, name, group.dataset, collator, batch_size, weights)
            if wanted is not None:
                found[name] = wanted
    finally:
        model.train(training)
        for weight in frozen:
            weight.requires_grad_(False)
    return found


def _layers(model: MultiTaskModel) -> nn.ModuleList:
    return nn.ModuleList(layer.module for layer in find_anatomy(model.encoder).layers)


def _held_out(
    model: MultiTaskModel,
    name: str,
    rows: Dataset,
    collator: Any,
    batch_size: int,
    weights: Sequence[nn.Parameter],
) -> HeldOut | None:
    """What one task wants, over all its rows; None without a label."""
    task, labelled, loss = model.tasks[name], 0.0, 0.0
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels = batch[task.label_name]
        inputs = {key: value for key, value in batch.items() if not key.startswith(("labels_", "rows_"))}
        labelled += float(task.item_count(labels))
        summed = task.loss_sum(model(**inputs, tasks=[name])[task.logits_name], labels)
        loss += float(summed.detach())
        # Not `backward`: it would add to gradients of a step, and wake hooks that wait for those.
        parts = torch.autograd.grad(summed, weights, allow_unused=True)
        for sums, part in zip(total, parts, strict=True):
            if part is not None:
                sums += part
    return HeldOut(_sketch(total) / labelled, loss / labelled) if labelled else None


def _sketch(gradient: Sequence[Tensor]) -> Tensor:
    """Every number of the gradient, with a random sign, added to a random place; the same for all tasks."""
    device = gradient[0].device
    found = torch.zeros(SKETCH, device=device)
    for number, part in enumerate(gradient):
        generator = torch.Generator(device).manual_seed(number)
        places = torch.randint(SKETCH, (part.numel(),), generator=generator, device=device)
        signs = torch.randint(2, (part.numel(),), generator=generator, device=device) * 2 - 1
        found.index_add_(0, places, part.flatten() * signs)
    return found.cpu()
