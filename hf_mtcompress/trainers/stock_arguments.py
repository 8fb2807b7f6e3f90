"""Which arguments of transformers' own Trainer have no place on a `MultiTaskModel`, said before training.

All others act as in `Trainer`; `tests/unit/trainers/test_stock_arguments.py` walks over every name.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.tasks import Task
from hf_mtcompress.tasks.metrics import LOWER_IS_BETTER
from hf_mtcompress.trainers.scores import AVERAGE, LOSS, flat_names, known_scores

logger = logging.getLogger(__name__)

ONE_LABEL = ("single_label_classification", "token_classification")
"""Problems whose labels can be smoothed."""


def check_stock_arguments(trainer: Trainer, tasks: Mapping[str, Task], model: Any) -> None:
    """Refuse what would do nothing, or something else than in `Trainer`.

    Args:
        trainer: as `Trainer.__init__` left it.
        tasks: of its model.
        model: the model, not wrapped.

    Raises:
        TrainingError: all that was found.
    """
    args = trainer.args
    several = args.world_size > 1
    accelerate: Any = args.accelerator_config
    label_names = [task.label_name for task in tasks.values()]
    own_sampler = type(trainer)._get_train_sampler is not Trainer._get_train_sampler
    found = [
        text
        for wrong, text in (
            (
                trainer.compute_loss_func is not None,
                "compute_loss_func: expected none, since every task has a loss of its own, found one; override "
                "loss_sum of a Task, or task_losses of the trainer",
            ),
            (
                args.label_smoothing_factor and not any(task.problem in ONE_LABEL for task in tasks.values()),
                "label_smoothing_factor: expected a task with one label for a row or word, found none; leave it out",
            ),
            (
                args.batch_eval_metrics,
                "batch_eval_metrics: expected False, since the tasks' metrics need all rows at once; leave it out",
            ),
            (
                not args.eval_do_concat_batches,
                "eval_do_concat_batches: expected True, since the tasks' metrics need all rows at once; leave it out",
            ),
            (
                args.train_sampling_strategy == "batch_rebalance",
                "train_sampling_strategy: expected 'random', 'sequential' or 'group_by_length', found "
                "'batch_rebalance', which balances rows of one source; choose one of these",
            ),
            (
                args.train_sampling_strategy == "group_by_length" and args.length_column_name != "length",
                f"length_column_name: expected it left out, since tokens are counted, found "
                f"'{args.length_column_name}'",
            ),
            (
                args.label_names is not None and sorted(args.label_names) != sorted(label_names),
                f"label_names: expected {label_names}, found {args.label_names}; leave it out",
            ),
            (
                args.use_liger_kernel,
                "use_liger_kernel: expected False, since it knows no model with several heads; leave it out",
            ),
            (
                args.neftune_noise_alpha is not None and len(model.encoders) > 1,
                "neftune_noise_alpha: expected a model with one word embedding, found "
                f"{len(model.encoders)} encoders; leave it out",
            ),
            (
                several and not args.average_tokens_across_devices,
                "average_tokens_across_devices: expected True with several processes, since losses are divided by the "
                "labelled items of all; leave it out",
            ),
            (
                several and (accelerate.split_batches or accelerate.dispatch_batches),
                "accelerator_config: expected split_batches and dispatch_batches left out, since every process draws "
                "batches of its own",
            ),
            (
                own_sampler,
                f"expected the sampler of task sources, found {type(trainer).__name__}._get_train_sampler, which has "
                "no say over them; choose mixing= or train_sampling_strategy=, or override get_train_dataloader",
            ),
            (
                getattr(args, "head_learning_rate", None) and trainer.optimizer is not None,
                "head_learning_rate: expected it left out beside optimizers=, found both; give the heads a parameter "
                "group of your own",
            ),
        )
        if wrong
    ]
    if found:
        raise TrainingError("\n".join(found))


def check_uploads(args: TrainingArguments | None) -> None:
    """Before `Trainer.__init__` makes a repository.

    Raises:
        TrainingError: uploads while it trains.
    """
    if args is not None and args.push_to_hub and args.hub_strategy != HubStrategy.END:
        raise TrainingError(
            "push_to_hub: expected hub_strategy='end', since uploads while training hold training_args.bin, a pickle "
            f"with paths of this machine, found '{HubStrategy(args.hub_strategy).value}'"
        )


def check_best_metric(args: TrainingArguments, scored: Collection[Task], tasks: Iterable[Task], *, more: bool) -> None:
    """The score by which checkpoints are chosen has to be one, and the better way round.

    Args:
        args: `greater_is_better` is set right where a smaller value is better: `TrainingArguments` knows that of names
            that end in `loss` only.
        scored: tasks with validation rows.
        tasks: all tasks of the model.
        more: whether functions of the user's add scores, whose names nobody knows yet.

    Raises:
        TrainingError: no evaluation will have it.
    """
    wanted = args.metric_for_best_model
    if wanted is None or not scored:
        return
    wanted = wanted.removeprefix("eval_")
    names = {name: pair for pair, name in flat_names(known_scores(tasks)).items()}
    of_tasks = {task.name for task in scored}
    there = {name: metric for name, (task, metric) in names.items() if task in of_tasks}
    if args.prediction_loss_only:
        there = {name: metric for name, metric in there.items() if metric == LOSS}
    general = [LOSS]
    if not args.prediction_loss_only and any(task.role == "main" for task in scored):
        general.append(AVERAGE)
    if wanted not in there and wanted not in general and not more:
        raise TrainingError(
            f"metric_for_best_model: expected one of {', '.join([*general, *there])}, found '{wanted}'; these are the "
            "scores of the tasks with validation rows"
        )
    if args.greater_is_better and there.get(wanted) in LOWER_IS_BETTER:
        logger.warning("metric_for_best_model='%s': the smallest value is the best (greater_is_better=False)", wanted)
        args.greater_is_better = False
