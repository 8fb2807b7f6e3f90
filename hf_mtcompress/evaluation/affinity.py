"""Whether tasks want the same of the encoder that they share: cosines of gradients on rows that nobody trained on.

Gradients of training batches say little of that: most of a small batch's gradient is chance, and towards the end all
of it is about the few rows that are not fitted yet.

References:
    Fifty et al. 2021, "Efficiently Identifying Task Groupings for Multi-Task Learning". Deviation: to first order, by
    cosines of gradients of whole held-out splits at the end of training, instead of by looking a step ahead on training
    batches all along.
    Charikar, Chen and Farach-Colton 2002, "Finding Frequent Items in Data Streams": the sketch that gradients of any
    length are kept in.
"""

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_mtcompress.data.collator import MultiTaskCollator
from hf_mtcompress.data.preprocessing import encode_groups
from hf_mtcompress.errors import DataError
from hf_mtcompress.losses.gradients import cosine_matrix, gramian
from hf_mtcompress.model.adapters import refuse_adapters
from hf_mtcompress.model.anatomy import find_anatomy
from hf_mtcompress.model.branches import refuse_sub_models
from hf_mtcompress.model.modeling import MultiTaskModel

SKETCH = 2**18
"""Numbers that a gradient is kept in; cosines are off by about 1 / sqrt(SKETCH) = 0.002."""


def held_out_cosines(
    model: MultiTaskModel,
    datasets: Mapping[str, Dataset],
    processor: object,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """Cosines between the gradients of the tasks' losses with respect to all layers of the encoder.

    Args:
        model: trained on the tasks; left as it was, without gradients.
        datasets: rows by task, raw or encoded, that were not trained on; a few hundred of each are enough.
        processor: tokenizer or image processor.
        max_length: in tokens, None for the tokenizer's own limit (at most 512).
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
    training, trained = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    model.eval().requires_grad_(False)
    weights = list(_layers(model).requires_grad_(True).parameters())
    own = {name: datasets[name] for name in model.tasks}
    groups = encode_groups(model.tasks, own, processor, max_length, "validation")
    collator = MultiTaskCollator(model.tasks, processor if isinstance(processor, PreTrainedTokenizerBase) else None)
    found: dict[str, Tensor] = {}
    with tqdm(total=len(own), desc="comparing gradients", unit="task", disable=not progress) as bar:
        for group in groups:
            for name in group.tasks:
                found[name] = _gradient(model, name, group.dataset, collator, batch_size, weights)
                bar.update()
    model.zero_grad()
    model.train(training).requires_grad_(False)
    for weight in trained:
        weight.requires_grad_(True)
    return cosine_matrix(gramian({name: found[name] for name in model.tasks}))


def _layers(model: MultiTaskModel) -> nn.ModuleList:
    return nn.ModuleList(layer.module for layer in find_anatomy(model.encoder).layers)


def _gradient(
    model: MultiTaskModel,
    name: str,
    rows: Dataset,
    collator: MultiTaskCollator,
    batch_size: int,
    weights: Sequence[nn.Parameter],
) -> Tensor:
    """Sketch of the gradient of one task's loss over all its rows."""
    task, labelled = model.tasks[name], 0.0
    model.zero_grad()
    for start in range(0, len(rows), batch_size):
        batch = collator([rows[index] for index in range(start, min(start + batch_size, len(rows)))])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        labels = batch[task.label_name]
        inputs = {key: value for key, value in batch.items() if not key.startswith(("labels_", "rows_"))}
        labelled += float(task.item_count(labels))
        task.loss_sum(model(**inputs, tasks=[name])[task.logits_name], labels).backward()
    if not labelled:
        raise DataError(f"task '{name}': expected validation rows with a label, found none among {len(rows)}")
    return _sketch(weights)


def _sketch(weights: Sequence[nn.Parameter]) -> Tensor:
    """Every number of the gradient, with a random sign, added to a random place; the same for all tasks."""
    found = torch.zeros(SKETCH)
    for number, weight in enumerate(weights):
        if weight.grad is None:
            continue
        generator = torch.Generator().manual_seed(number)
        places = torch.randint(SKETCH, (weight.numel(),), generator=generator)
        signs = torch.randint(2, (weight.numel(),), generator=generator) * 2 - 1
        found.index_add_(0, places, weight.grad.flatten().float().cpu() * signs)
    return found
