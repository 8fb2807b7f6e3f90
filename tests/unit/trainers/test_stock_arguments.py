"""A walk over all arguments of Trainer: on a `MultiTaskModel` they act as in Trainer, or are refused before training.

Each entry of the table has a value that changes what stock Trainer does to a stock model: losses, scores, files,
loaders or calls. A `MultiTaskModel` with the same encoder, head, rows and arguments has to show the same change. An
argument that was added to transformers has no entry, and fails the walk.
"""

import dataclasses
import inspect
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import EvalLoopContainer

from hf_mtcompress import MultiTaskModel, MultiTaskTrainer
from hf_mtcompress.errors import TrainingError
from tests.tiny import FEELING_LABELS, randomize, tiny_config, tiny_text_rows, tiny_tokenizer

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Acts:
    """Seen in stock Trainer, and the same in ours.

    Attributes:
        value: another one than the default.
        beside: further arguments, in the run that it is compared with too.
        ours: the value for a `MultiTaskModel`, where names of scores are in it.
        moves: whether only that something changes is the same, as of the order of rows, which is drawn otherwise.
        dropout: of the model.
        train: whether anything is trained; else trainers and loaders are made.
    """

    value: Any
    beside: Settings = dataclasses.field(default_factory=dict)
    ours: Any = None
    moves: bool = False
    dropout: float = 0.0
    train: bool = True


@dataclasses.dataclass(frozen=True)
class Refused:
    """Stock Trainer takes it; ours says before training that it has no place."""

    value: Any
    message: str
    beside: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Seen:
    """Compared by a function of its own, which gets the trainer's class and a folder."""

    look: Callable[[type[Trainer], Path], Any]
    without: Callable[[type[Trainer], Path], Any]


@dataclasses.dataclass(frozen=True)
class CannotAct:
    """Nothing to see on one CPU without a network."""

    why: str


Entry = Acts | Refused | Seen | CannotAct

# ---------------------------------------------------------------------------------------------- what is looked at


@cache
def encoded_rows(n: int = 10) -> Dataset:
    rows, tokenizer = tiny_text_rows(n), tiny_tokenizer()
    return rows.map(
        lambda row: {**tokenizer(row["text"]), "label": FEELING_LABELS.index(row["label"])},
        remove_columns=rows.column_names,
    )


def model_for(cls: type[Trainer], dropout: float = 0.0, **settings: Any) -> PreTrainedModel:
    """A stock model; for ours the same encoder with the same head as a multi-task model."""
    names = dict(enumerate(FEELING_LABELS))
    config = tiny_config("bert", id2label=names, hidden_dropout_prob=dropout, num_hidden_layers=2, **settings)
    stock = randomize(AutoModelForSequenceClassification.from_config(config))
    return MultiTaskModel.from_heads({"mood": stock}) if issubclass(cls, MultiTaskTrainer) else stock


class Count(TrainerCallback):
    def __init__(self) -> None:
        self.calls: dict[str, int] = {}

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls["predicted batches"] = self.calls.get("predicted batches", 0) + 1

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls["substeps"] = self.calls.get("substeps", 0) + 1


def hits(output: EvalPrediction) -> dict[str, float]:
    predictions: Any = output.predictions
    # `size` is best at another step than the loss.
    size = float(np.abs(predictions).mean())
    return {"hits": float((predictions.argmax(-1) == output.label_ids).mean()), "size": size}


def trainer_for(cls: type[Trainer], folder: Path, settings: Settings, *, dropout: float = 0.0, **given: Any) -> Trainer:
    """As every run here begins: rows in order, since each of the two draws another order."""
    base: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    model = given.pop("model", None) or model_for(cls, dropout)
    return cls(
        **{
            "model": model,
            "args": TrainingArguments(**{**base, **settings}),
            "train_dataset": encoded_rows(),
            "eval_dataset": encoded_rows(),
            "data_collator": DataCollatorWithPadding(tiny_tokenizer()),
            "processing_class": tiny_tokenizer(),
            "compute_metrics": hits,
            **given,
        }
    )


TIMES = ("runtime", "per_second")


def seen_of(trainer: Trainer, folder: Path, *, train: bool) -> dict[str, Any]:
    """All that an argument may change, in words that both trainers share."""
    count = Count()
    trainer.add_callback(count)
    loaders = [trainer.get_train_dataloader()]
    found: dict[str, Any] = {}
    if train:
        trainer.train()
        names = {"eval_mood_loss": None, "eval_mood_hits": "eval_hits", "eval_mood_size": "eval_size"}
        rows = [
            {
                names.get(key, key): value if "_mem_" not in key else "bytes"
                for key, value in row.items()
                if not key.endswith(TIMES) and key not in ("loss_mood", "total_flos")
            }
            for row in trainer.state.log_history
        ]
        ours = {"eval_average", "eval_model_preparation_time", *(f"eval_mood_{name}" for name in SCORES), None}
        found["log"] = [{key: value for key, value in row.items() if key not in ours} for row in rows]
        weights: Any = {**trainer.model.state_dict()}
        found["weights"] = round(sum(float(value.double().abs().sum()) for value in weights.values()), 3)
    found["files"] = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("training_args.bin", "multi_task_state.json")
    )
    loaders.append(trainer.get_eval_dataloader(None))
    found["loaders"] = [
        {
            name: getattr(loader, name)
            for name in ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "in_order", "drop_last")
            if (name != "drop_last" or number)  # of training rows our sampler knows it, and the log shows it
        }
        | {"context": type(loader.multiprocessing_context).__name__}
        for number, loader in enumerate(loaders)
    ]
    found["callbacks"] = sorted(
        {type(item).__name__ for item in trainer.callback_handler.callbacks} - {"_TellTrainer", "Count"}
    )
    found["calls"] = count.calls
    modules = list(trainer.accelerator.unwrap_model(trainer.model).modules())
    found["checkpointed"] = sum(bool(getattr(module, "gradient_checkpointing", False)) for module in modules)
    found["hooks"] = any(module._forward_hooks for module in modules)
    found["caches"] = {bool(module.config.use_cache) for module in modules if hasattr(module, "encoder")}
    found["accelerator"] = dataclasses.asdict(trainer.accelerator.dataloader_config)
    found["verbosity"] = transformers.logging.get_verbosity()
    found["wrapped"] = type(trainer.model_wrapped).__name__ == "OptimizedModule"
    found["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return found


SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "weighted_f1", "mcc")


def observe(
    cls: type[Trainer], folder: Path, settings: Settings, *, train: bool = True, **given: Any
) -> dict[str, Any]:
    transformers.set_seed(0)
    folder.mkdir(exist_ok=True, parents=True)
    try:
        return seen_of(trainer_for(cls, folder, settings, **given), folder, train=train)
    finally:
        shutil.rmtree(folder)


def close(one: Any, other: Any) -> bool:
    """Equal up to rounding."""
    match one:
        case dict():
            return isinstance(other, dict) and one.keys() == other.keys() and all(close(one[k], other[k]) for k in one)
        case list() | tuple():
            return (
                isinstance(other, list | tuple)
                and len(one) == len(other)
                and all(close(a, b) for a, b in zip(one, other, strict=True))
            )
        case float():
            return isinstance(other, float) and bool(other == pytest.approx(one, rel=2e-3, abs=2e-4))
        case _:
            return one == other


# ------------------------------------------------------------------------------ looks of their own, by argument


def at_place(name: str) -> Callable[[type[Trainer], Path], Any]:
    def look(cls: type[Trainer], folder: Path) -> Any:
        trainer_for(cls, folder, {"output_dir": str(folder / name)}).save_model()
        return sorted(path.name for path in folder.iterdir())

    return look


def halved(wanted: bool) -> Callable[[type[Trainer], Path], Any]:
    class Full(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer._train_batch_size > 2:
                raise RuntimeError("CUDA out of memory.")

    def look(cls: type[Trainer], folder: Path) -> Any:
        nonlocal trainer
        settings = {"auto_find_batch_size": wanted, "per_device_train_batch_size": 4}
        trainer = trainer_for(cls, folder, settings, callbacks=[Full()])
        try:
            trainer.train()
        except RuntimeError as error:
            return str(error)
        return trainer.state.global_step, trainer._train_batch_size

    trainer: Any = None
    return look


def resumed(settings: Settings) -> Callable[[type[Trainer], Path], Any]:
    class Kept(TrainerCallback, ExportableState):
        def __init__(self, value: int = 0) -> None:
            self.value = value

        def state(self) -> dict[str, Any]:
            return {"args": {"value": self.value}, "attributes": {}}

    def look(cls: type[Trainer], folder: Path) -> Any:
        saving = {"save_strategy": "steps", "save_steps": 1}
        trainer_for(cls, folder / "first", saving, callbacks=[Kept(7)]).train()
        trainer = trainer_for(cls, folder / "second", settings, callbacks=[Kept(1)])
        trainer.train(resume_from_checkpoint=str(folder / "first" / "out" / "checkpoint-1"))
        kept = [item.value for item in trainer.callback_handler.callbacks if isinstance(item, Kept)]
        losses = [round(row["loss"], 4) for row in trainer.state.log_history if "loss" in row]
        return kept, trainer.state.global_step, losses

    return look


def asked_for(*names: str) -> Callable[[type[Trainer], Path], Any]:
    def look(cls: type[Trainer], folder: Path) -> Any:
        found: list[Any] = []

        def keep(output: EvalPrediction) -> dict[str, float]:
            losses = None if output.losses is None else round(float(np.mean(np.asarray(output.losses)[:8])), 4)
            found.append((None if output.inputs is None else np.asarray(output.inputs).shape, losses))
            return {}

        trainer_for(cls, folder, {"include_for_metrics": list(names)}, compute_metrics=keep).evaluate()
        return found

    return look


def emptied(steps: int | None) -> Callable[[type[Trainer], Path], Any]:
    def look(cls: type[Trainer], folder: Path) -> Any:
        calls: list[int] = []
        moved = EvalLoopContainer.to_cpu_and_numpy

        def counted(self: EvalLoopContainer) -> None:
            calls.append(1)
            moved(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EvalLoopContainer, "to_cpu_and_numpy", counted)
            settings = {"eval_accumulation_steps": steps, "per_device_eval_batch_size": 2}
            trainer_for(cls, folder, settings).evaluate()
        return len(calls)

    return look


def columns(unused: bool) -> Callable[[type[Trainer], Path], Any]:
    def look(cls: type[Trainer], folder: Path) -> Any:
        seen: set[str] = set()

        def collate(rows: list[dict[str, Any]]) -> Any:
            seen.update(key for row in rows for key in row if not key.startswith("label"))
            label = "labels_mood" if issubclass(cls, MultiTaskTrainer) else "label"
            batch = DataCollatorWithPadding(tiny_tokenizer())(
                [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows]
            )
            labels = torch.tensor([row[label] for row in rows])
            return {**batch, ("labels_mood" if label == "labels_mood" else "labels"): labels}

        rows = encoded_rows().add_column("note", ["x"] * 10)
        settings = {"remove_unused_columns": unused, "max_steps": 1}
        trainer = trainer_for(cls, folder, settings, data_collator=collate, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        trained, _ = set(seen), seen.clear()
        trainer.evaluate()
        return trained, seen

    return look


def given(**values: Callable[[], Any]) -> Callable[[type[Trainer], Path], Any]:
    """Losses and scores with arguments of `Trainer` itself, made anew for every run."""

    def look(cls: type[Trainer], folder: Path) -> Any:
        made = {name: value() for name, value in values.items()}
        return observe(cls, folder / "run", {"eval_strategy": "epoch"}, **made)

    return look


def optimizers(cls: type[Trainer], folder: Path) -> Any:
    model = model_for(cls)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return observe(cls, folder / "run", {"eval_strategy": "epoch"}, model=model, optimizers=(optimizer, schedule))


def preprocessed(wanted: bool) -> Callable[[type[Trainer], Path], Any]:
    def look(cls: type[Trainer], folder: Path) -> Any:
        found = []

        def keep(output: EvalPrediction) -> dict[str, float]:
            found.append(np.asarray(output.predictions).tolist())
            return {}

        function = (lambda logits, labels: logits.argmax(-1) * 10 + labels) if wanted else None
        trainer_for(cls, folder, {}, compute_metrics=keep, preprocess_logits_for_metrics=function).evaluate()
        return found

    return look


def precise(name: str | None) -> Callable[[type[Trainer], Path], Any]:
    def look(cls: type[Trainer], folder: Path) -> Any:
        trainer = trainer_for(cls, folder, {} if name is None else {name: True})
        loss = trainer.evaluate()["eval_loss"]
        return round(loss, 1), {str(value.dtype) for value in trainer.model.parameters()}

    return look


def windows(batches: int) -> Callable[[type[Trainer], Path], Any]:
    """Steps and not losses: with this kind of model stock Trainer forgets to divide them by the number of batches."""

    def look(cls: type[Trainer], folder: Path) -> Any:
        settings = {"gradient_accumulation_steps": batches, "per_device_train_batch_size": 2}
        found = observe(cls, folder / "run", settings)
        return found["calls"], [(row["step"], row["epoch"], row.get("learning_rate")) for row in found["log"]]

    return look


def watched(debug: str) -> Callable[[type[Trainer], Path], Any]:
    """With eager attention, whose masks are numbers: it cannot look at others."""
    return lambda cls, folder: observe(
        cls, folder / "run", {"debug": debug, "max_steps": 1}, model=model_for(cls, attn_implementation="eager")
    )


class Extra(TrainerCallback):
    pass


def other_collator(rows: list[dict[str, Any]]) -> Any:
    batch = DataCollatorWithPadding(tiny_tokenizer())(rows)
    batch["input_ids"][:, 1] = 9
    return batch


def other_model(cls: type[Trainer], folder: Path) -> Any:
    model = model_for(cls)
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    return observe(cls, folder / "run", {"eval_strategy": "epoch"}, model=model)


SGD = (torch.optim.SGD, {"lr": 0.3})
plain = given()

# ------------------------------------------------------------------------------------------------------ the table

EVALUATED: Settings = {"eval_strategy": "steps", "eval_steps": 1}
SAVED: Settings = {"save_strategy": "steps", "save_steps": 1}
BEST: Settings = {**EVALUATED, **SAVED, "metric_for_best_model": "loss", "learning_rate": 0.3}
PROCESSES = CannotAct("it tells several processes what to do; one process has none to tell")
TRACKERS = CannotAct("it speaks to a tracker, of which none is installed here")
HUB = CannotAct("it speaks to the Hub; test_published_by_trainer pushes to a stand-in")
ACCELERATOR = CannotAct("it needs an accelerator (GPU or TPU), and a CPU takes no notice or refuses it")
SCRIPTS = CannotAct("scripts read it; Trainer does not")

TRAINING_ARGUMENTS: dict[str, Entry] = {
    "output_dir": Seen(at_place("there"), at_place("here")),
    "per_device_train_batch_size": Acts(2),
    "num_train_epochs": Acts(2),
    "max_steps": Acts(2),
    "learning_rate": Acts(1e-3),
    "lr_scheduler_type": Acts("cosine"),
    "lr_scheduler_kwargs": Acts({"num_cycles": 3}, {"lr_scheduler_type": "cosine_with_restarts"}),
    "warmup_steps": Acts(2),
    "optim": Acts("sgd"),
    "optim_args": CannotAct("optimizers that read it (galore, lomo, 8-bit ones on a GPU) are not installed here"),
    "weight_decay": Acts(0.9),
    "adam_beta1": Acts(0.1),
    "adam_beta2": Acts(0.5),
    "adam_epsilon": Acts(1e-1),
    "optim_target_modules": CannotAct("optimizers that read it (galore, apollo) are not installed here"),
    "gradient_accumulation_steps": Seen(windows(3), windows(1)),
    "average_tokens_across_devices": PROCESSES,
    "max_grad_norm": Acts(0.01, {"optim": "sgd"}),
    "label_smoothing_factor": Acts(0.4, EVALUATED),
    "bf16": Acts(True),
    "fp16": ACCELERATOR,
    "bf16_full_eval": Seen(precise("bf16_full_eval"), precise(None)),
    "fp16_full_eval": Seen(precise("fp16_full_eval"), precise(None)),
    "tf32": ACCELERATOR,
    "activation_checkpointing": Acts(True),
    "activation_checkpointing_kwargs": Acts({"every_n_layers": 2}, {"activation_checkpointing": True}),
    "gradient_checkpointing": Acts(True),
    "gradient_checkpointing_kwargs": Acts({"every_n_layers": 2}, {"gradient_checkpointing": True}),
    "torch_compile": Acts(True, {}),
    "torch_compile_backend": Acts("eager"),
    "torch_compile_mode": CannotAct("the backend 'eager' takes none, and inductor needs a compiler"),
    "use_liger_kernel": Refused(True, "use_liger_kernel: expected False"),
    "liger_kernel_config": Refused({"rope": True}, "use_liger_kernel: expected False", {"use_liger_kernel": True}),
    "use_cache": Acts(True, train=False),
    "neftune_noise_alpha": Acts(50.0),
    "torch_empty_cache_steps": ACCELERATOR,
    "auto_find_batch_size": Seen(halved(True), halved(False)),
    "logging_strategy": Acts("epoch"),
    "logging_steps": Acts(2),
    "logging_first_step": Acts(True, {"logging_steps": 2}),
    "log_on_each_node": PROCESSES,
    "logging_nan_inf_filter": CannotAct("a loss that is not finite stops the training of a MultiTaskModel"),
    "include_num_input_tokens_seen": Acts("all"),
    "log_level": Acts("critical", train=False),
    "log_level_replica": PROCESSES,
    "disable_tqdm": Acts(False),
    "report_to": TRACKERS,
    "run_name": TRACKERS,
    "project": TRACKERS,
    "trackio_space_id": TRACKERS,
    "trackio_bucket_id": TRACKERS,
    "trackio_static_space_id": TRACKERS,
    "eval_strategy": Acts("epoch"),
    "eval_steps": Acts(2, {"eval_strategy": "steps"}),
    "eval_delay": Acts(2, EVALUATED),
    "per_device_eval_batch_size": Acts(3, EVALUATED),
    "prediction_loss_only": Acts(True, EVALUATED),
    "eval_on_start": Acts(True),
    "eval_do_concat_batches": Refused(False, "eval_do_concat_batches: expected True"),
    "eval_use_gather_object": PROCESSES,
    "eval_accumulation_steps": Seen(emptied(1), emptied(None)),
    "include_for_metrics": Seen(asked_for("inputs", "loss"), asked_for()),
    "batch_eval_metrics": Refused(True, "batch_eval_metrics: expected False"),
    "save_only_model": Acts(True, SAVED),
    "save_strategy": Acts("epoch"),
    "save_steps": Acts(2, {"save_strategy": "steps"}),
    "save_on_each_node": PROCESSES,
    "save_total_limit": Acts(1, SAVED),
    "enable_jit_checkpoint": Acts(True, train=False),
    "push_to_hub": Refused(True, "push_to_hub: expected hub_strategy='end'"),
    "hub_token": HUB,
    "hub_private_repo": HUB,
    "hub_model_id": HUB,
    "hub_strategy": HUB,
    "hub_always_push": HUB,
    "hub_revision": HUB,
    "load_best_model_at_end": Acts(True, BEST),
    "metric_for_best_model": Acts("size", {**BEST, "load_best_model_at_end": True}, ours="mood_size"),
    "greater_is_better": Acts(True, {**BEST, "load_best_model_at_end": True}),
    "ignore_data_skip": Seen(resumed({"ignore_data_skip": True}), resumed({})),
    "restore_callback_states_from_checkpoint": Seen(
        resumed({"restore_callback_states_from_checkpoint": True}), resumed({})
    ),
    "full_determinism": Acts(True, train=False),
    "seed": Acts(7, dropout=0.3),
    "data_seed": Acts(7, {"train_sampling_strategy": "random"}, moves=True),
    "use_cpu": ACCELERATOR,
    "accelerator_config": Acts({"even_batches": False}, train=False),
    "parallelism_config": PROCESSES,
    "dataloader_drop_last": Acts(True),
    "dataloader_num_workers": Acts(2, train=False),
    "dataloader_pin_memory": Acts(False, {"use_cpu": False}, train=False),
    "dataloader_persistent_workers": Acts(True, {"dataloader_num_workers": 1}, train=False),
    "dataloader_prefetch_factor": Acts(5, {"dataloader_num_workers": 1}, train=False),
    "dataloader_multiprocessing_context": Acts("spawn", {"dataloader_num_workers": 1}, train=False),
    "dataloader_in_order": Acts(False, train=False),
    "remove_unused_columns": Seen(columns(False), columns(True)),
    "label_names": Refused(["labels"], r"label_names: expected \['labels_mood'\]"),
    "train_sampling_strategy": Acts("group_by_length", moves=True),
    "length_column_name": Refused(
        "tokens", "length_column_name: expected it left out", {"train_sampling_strategy": "group_by_length"}
    ),
    "ddp_find_unused_parameters": PROCESSES,
    "ddp_bucket_cap_mb": PROCESSES,
    "ddp_broadcast_buffers": PROCESSES,
    "ddp_static_graph": PROCESSES,
    "ddp_backend": PROCESSES,
    "ddp_timeout": PROCESSES,
    "fsdp": PROCESSES,
    "fsdp_config": PROCESSES,
    "deepspeed": PROCESSES,
    "debug": Seen(watched("underflow_overflow"), watched("")),
    "skip_memory_metrics": Acts(False),
    "do_train": SCRIPTS,
    "do_eval": SCRIPTS,
    "do_predict": SCRIPTS,
    "resume_from_checkpoint": SCRIPTS,
    "local_rank": PROCESSES,
}
TRAINER: dict[str, Entry] = {
    "model": Seen(other_model, plain),
    "args": Seen(lambda cls, folder: observe(cls, folder / "run", {"max_steps": 1}), plain),
    "data_collator": Seen(given(data_collator=lambda: other_collator), plain),
    "train_dataset": Seen(given(train_dataset=lambda: encoded_rows(6)), plain),
    "eval_dataset": Seen(given(eval_dataset=lambda: encoded_rows(6)), plain),
    "processing_class": Seen(
        lambda cls, folder: observe(cls, folder / "run", SAVED, data_collator=other_collator, processing_class=None),
        lambda cls, folder: observe(cls, folder / "run", SAVED, data_collator=other_collator),
    ),
    "model_init": Refused(None, "expected a multi-task model, found model_init"),
    "compute_loss_func": Refused(lambda *args, **kwargs: torch.zeros(()), "compute_loss_func: expected none"),
    "compute_metrics": Seen(given(compute_metrics=lambda: None), plain),
    "callbacks": Seen(given(callbacks=lambda: [Extra()]), plain),
    "optimizers": Seen(optimizers, plain),
    "optimizer_cls_and_kwargs": Seen(given(optimizer_cls_and_kwargs=lambda: SGD), plain),
    "preprocess_logits_for_metrics": Seen(preprocessed(True), preprocessed(False)),
}
SLOW_MARKS = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # dynamo and inductor speak of themselves
SLOW = {"torch_compile", "torch_compile_backend", "auto_find_batch_size"}


def without_an_entry(arguments: type, trainer: type) -> list[str]:
    """Names of arguments that the table does not know."""
    names = [field.name for field in dataclasses.fields(arguments)]
    own = [name for name in inspect.signature(trainer.__init__).parameters if name not in ("self", "kwargs")]
    return [*(name for name in names if name not in TRAINING_ARGUMENTS), *(name for name in own if name not in TRAINER)]


# ------------------------------------------------------------------------------------------------------- the walk


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some arguments change the whole process."""
    verbosity = transformers.logging.get_verbosity()
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(verbosity)
    torch.use_deterministic_algorithms(False)


def test_every_argument_has_an_entry_and_every_entry_an_argument() -> None:
    assert without_an_entry(TrainingArguments, Trainer) == []
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert TRAINING_ARGUMENTS.keys() <= fields
    assert TRAINER.keys() <= inspect.signature(Trainer.__init__).parameters.keys()


def test_an_argument_that_is_added_fails_the_walk() -> None:
    """As one of a new version of transformers does."""

    @dataclasses.dataclass
    class More(TrainingArguments):
        brand_new: int = 0

    class MoreTrainer(Trainer):
        def __init__(self, *args: Any, another: int = 0, **kwargs: Any) -> None: ...

    assert without_an_entry(More, Trainer) == ["brand_new"]
    assert "another" in without_an_entry(TrainingArguments, MoreTrainer)


@cache
def _base(cls: type[Trainer], beside: str, dropout: float, train: bool, place: Path) -> dict[str, Any]:
    return observe(cls, place, BESIDE[beside], dropout=dropout, train=train)


BESIDE: dict[str, Settings] = {}


def acts(name: str, entry: Acts, folder: Path, root: Path) -> None:
    key = repr(sorted(entry.beside.items()))
    BESIDE[key] = entry.beside
    stock, ours = (_base(cls, key, entry.dropout, entry.train, root / "base") for cls in (Trainer, MultiTaskTrainer))
    settings = {**entry.beside, name: entry.value}
    common: dict[str, Any] = {"dropout": entry.dropout, "train": entry.train}
    changed = observe(Trainer, folder, settings, **common)
    assert not close(changed, stock), "a value that changes nothing in stock Trainer shows nothing"
    value = entry.value if entry.ours is None else entry.ours
    own = observe(MultiTaskTrainer, folder, {**settings, name: value}, **common)
    if entry.moves:
        assert not close(own, ours)
        return
    for part in stock:
        assert close(ours[part], stock[part]), (part, ours[part], stock[part])
        assert close(own[part], changed[part]), (part, own[part], changed[part])


WALK = [
    *(("args", name, entry) for name, entry in TRAINING_ARGUMENTS.items()),
    *(("init", name, entry) for name, entry in TRAINER.items()),
]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # the old name is walked over, too
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # what it says of a CPU
@pytest.mark.parametrize(
    ("where", "name", "entry"),
    [
        pytest.param(*item, id=item[1], marks=SLOW_MARKS if item[1] in SLOW else [])
        for item in WALK
        if not isinstance(item[2], CannotAct) and item[1] != "model_init"
    ],
)
def test_an_argument_acts_as_in_trainer_or_is_refused_before_training(
    where: str, name: str, entry: Entry, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An argument that does nothing trains another model than was asked for, and nothing says so."""
    match entry:
        case Acts():
            acts(name, entry, tmp_path / "run", tmp_path_factory.getbasetemp())
        case Seen():
            stock = entry.look(Trainer, tmp_path / "a")
            assert not close(entry.without(Trainer, tmp_path / "b"), stock)
            ours = entry.look(MultiTaskTrainer, tmp_path / "c")
            assert close(ours, stock), (ours, stock)
        case Refused():
            settings: Settings = {**entry.beside, name: entry.value} if where == "args" else {}
            given: dict[str, Any] = {} if where == "args" else {name: entry.value}
            if name != "push_to_hub":  # would make a repository
                trainer_for(Trainer, tmp_path, settings, compute_metrics=None, **given)
            with pytest.raises(TrainingError, match=entry.message):
                trainer_for(MultiTaskTrainer, tmp_path, settings, compute_metrics=None, **given)


def test_a_model_that_is_yet_to_be_made_is_refused(tmp_path: Path) -> None:
    """The rest of the walk's table: `model_init`."""
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    Trainer(model_init=lambda: model_for(Trainer), args=args)
    with pytest.raises(TrainingError, match="expected a multi-task model, found model_init"):
        MultiTaskTrainer(model_init=lambda: model_for(MultiTaskTrainer), args=args, train_dataset={"mood": None})


def test_a_sampler_of_ones_own_is_refused_and_a_loader_acts(tmp_path: Path) -> None:
    """Overrides that a subclass of Trainer may have: one that is never called would sample otherwise, silently."""
    calls: list[str] = []

    class Sampling(MultiTaskTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return None

    class Loading(MultiTaskTrainer):
        def get_train_dataloader(self) -> Any:
            calls.append("train")
            return super().get_train_dataloader()

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            calls.append("eval")
            return super().get_eval_dataloader(eval_dataset)

        def get_test_dataloader(self, test_dataset: Any) -> Any:
            calls.append("test")
            return super().get_test_dataloader(test_dataset)

    with pytest.raises(TrainingError, match=r"found Sampling\._get_train_sampler"):
        trainer_for(Sampling, tmp_path, {})
    trainer = trainer_for(Loading, tmp_path, {"max_steps": 1})
    trainer.train()
    trainer.evaluate()
    trainer.predict(encoded_rows())
    assert calls == ["train", "eval", "test"]


def test_a_batch_of_every_kind_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="train_sampling_strategy: expected 'random', 'sequential'"):
        trainer_for(MultiTaskTrainer, tmp_path, {"train_sampling_strategy": "batch_rebalance"})
