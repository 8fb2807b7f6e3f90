"""The shared encoder with one head for each task."""

import contextlib
import copy
import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from hf_mtcompress.errors import ArtifactError, TaskError, UnsupportedEncoderError
from hf_mtcompress.model.adapter_folders import load_adapters, save_adapters
from hf_mtcompress.model.adapters import adapted, adapter_of, build_adapters, describe_adapters, new_adapters
from hf_mtcompress.model.anatomy import encoder_of
from hf_mtcompress.model.base import SharedModel, align_weights
from hf_mtcompress.model.branches import Branch, check_depth, run_branch, run_depth
from hf_mtcompress.model.configuration import MultiTaskConfig
from hf_mtcompress.model.inputs import check_picture_size, check_repeatable, input_names
from hf_mtcompress.model.loading import load_whole, opening, read_config, refuse_oversized, refuse_partial
from hf_mtcompress.model.stock_heads import check_one_family, head_weights, load_stock, task_of_stock
from hf_mtcompress.model.surgery import apply_structure, describe_structure, is_vanilla
from hf_mtcompress.model.trial import check_trainable
from hf_mtcompress.model.vanilla import export_folder, stock_class, to_stock
from hf_mtcompress.modules.heads import PooledHead, SharedEncoder, build_stock_head
from hf_mtcompress.recipe import AdapterConfig, AdapterTargets
from hf_mtcompress.tasks import Task, build_tasks
from hf_mtcompress.tasks.base import NAME_PATTERN, divisor

_ALSO_MADE = ("attention_mask", "token_type_ids")
"""Tokenizers make them for encoders that take none, too: heads read the one, nobody then reads the other."""
_MAY_BE_FRESH = re.compile(r"(^|\.)pooler\.|mask_token$|masked_spec_embed$")
"""Parts that pretrained encoders come without: heads train a pooler, and masks are for pretraining alone."""
_Place = tuple[str, int | None, str | None]
"""Encoder or branch, depth, and task whose adapter is used; None for the last layer, and for no adapter."""


@functools.lru_cache(maxsize=256)
def output_class(tasks: tuple[str, ...]) -> type[ModelOutput]:
    """The output of a model with these tasks: flat tensors, one `logits_<task>` field each.

    Flat fields are what the ONNX exporter can name; a dict of tensors is not.
    """
    fields = [
        ("loss", Tensor | None, None),
        *((f"logits_{task}", Tensor | None, None) for task in tasks),
        ("last_hidden_state", Tensor | None, None),
        ("hidden_states", tuple | None, None),
    ]
    return dataclasses.make_dataclass(
        "MultiTaskOutput", fields, bases=(ModelOutput,), namespace={"__module__": __name__}
    )


class MultiTaskModel(SharedModel):
    """One encoder, several heads; saved and loaded like any transformers model.

    Build it from a pretrained encoder with `from_encoder`, reload it with `from_pretrained` (or `AutoModel`). What it
    holds is listed in `SharedModel`.
    """

    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Losses are normalised by the trainer over the whole accumulation window, never by the model.
    accepts_loss_kwargs = False

    def __init__(self, config: MultiTaskConfig, encoders: Mapping[str, PreTrainedModel] | None = None) -> None:
        super().__init__(config)
        self.tasks = build_tasks(config.tasks or [])
        self.encoders = nn.ModuleDict(
            {name: self._build_encoder(name) for name in config.encoders or {}} if encoders is None else dict(encoders)
        )
        self._taken = {name: input_names(type(encoder)) for name, encoder in self.encoders.items()}  # type: ignore[arg-type]  # encoders
        self.branches = nn.ModuleDict(
            {
                name: Branch(self.encoders[place["encoder"]], place["layers"])  # type: ignore[arg-type]  # an encoder
                for name, place in (config.branches or {}).items()
            }
        )
        check_depth(self)
        self.heads = nn.ModuleDict({task.head_name: self._build_head(task) for task in self.tasks.values()})
        self.adapters = build_adapters(self)
        self._drop_unread_parts()
        self.model_tags = ["hf_mtcompress", "multi-task"]
        self.post_init()
        if len(self.adapters):
            self.freeze_encoder()

    # ---- building ----

    @classmethod
    def from_encoder(
        cls,
        encoder: str | os.PathLike[str] | PreTrainedModel,
        tasks: Sequence[Task],
        *,
        max_length: int | None = None,
        image_size: int | None = None,
        branches: Mapping[str, Sequence[str]] | None = None,
        branch_layers: int | None = 2,
        **kwargs: Any,
    ) -> "MultiTaskModel":
        """Put a new head for each task on a pretrained encoder.

        Args:
            encoder: Hub id, local folder, or an encoder in memory (used as it is, not copied).
            tasks: tasks with known labels and different names.
            max_length: longest input in tokens, saved with the model.
            image_size: side of the input in pixels, saved with the model.
            branches: by name: tasks that read a branch of their own; the others read the encoder itself.
            branch_layers: top layers that each branch has for itself, starting as copies, while embeddings and lower
                layers are shared and run once; None for a whole encoder of its own.
            **kwargs: for `AutoModel.from_pretrained`, such as `revision`.

        Raises:
            TaskError: two tasks share a name, labels are missing, or branches name tasks that are not there or twice.
            UnsupportedEncoderError: the checkpoint lacks weights of the encoder, it takes no pictures of this size,
                what it says of a picture changes from call to call, it cannot be saved, a head does not answer a text,
                or answers it otherwise beside a longer one.
        """
        names = [task.name for task in tasks]
        if len(set(names)) != len(names) or not names:
            raise TaskError(f"expected at least one task and different names, found {names}; rename the doubles")
        loaded = encoder if isinstance(encoder, PreTrainedModel) else load_encoder(encoder, **kwargs)
        check_repeatable(loaded)
        if image_size is not None:
            check_picture_size(loaded.config, image_size, image_size)
        tasks = _assigned(tasks, branches or {})
        preprocessing = {"max_length": max_length, "image_size": image_size}
        whole = list(branches or {}) if branch_layers is None else []
        config = MultiTaskConfig(
            encoders={name: _config_dict(loaded.config) for name in ["main", *whole]},
            tasks=[task.to_dict() for task in tasks],
            preprocessing={"main": {key: value for key, value in preprocessing.items() if value is not None}},
            branches={
                name: {"encoder": "main", "layers": branch_layers} for name in branches or {} if name not in whole
            },
        )
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            # Trainer aligns these with the tokenizer's, and says so, where they are missing.
            setattr(config, key, getattr(loaded.config, key, None))
        with contextlib.nullcontext() if loaded is encoder else opening(encoder):
            model = cls(config, encoders={"main": loaded, **{name: copy.deepcopy(loaded) for name in whole}})
        for task in tasks:
            # The data columns are not in the config, but useful while the model lives.
            model.tasks[task.name] = task
        check_trainable(model)
        return model

    @classmethod
    def from_heads(
        cls,
        checkpoints: Mapping[str, str | os.PathLike[str] | PreTrainedModel],
        encoder: str | os.PathLike[str] | PreTrainedModel | None = None,
        *,
        max_length: int | None = None,
        image_size: int | None = None,
    ) -> "MultiTaskModel":
        """Put the heads of fine-tuned stock checkpoints on one encoder, as a start for training them together.

        Args:
            checkpoints: by task name: folder, Hub id or model of the family's AutoModelFor class; labels are theirs.
            encoder: the encoder to share; default: a copy of the first checkpoint's. Logits of that checkpoint's task
                then equal the checkpoint's; the other heads have to get used to it.
            max_length: longest input in tokens, saved with the model.
            image_size: side of the input in pixels, saved with the model.

        Raises:
            TaskError: no checkpoint, one without a head that is known here, or checkpoints of different families.
        """
        if not checkpoints:
            raise TaskError("expected at least one checkpoint by task name, found none")
        stocks = {name: load_stock(checkpoint) for name, checkpoint in checkpoints.items()}
        check_one_family(stocks)
        tasks = [task_of_stock(name, stock) for name, stock in stocks.items()]
        first = copy.deepcopy(encoder_of(next(iter(stocks.values())))) if encoder is None else encoder
        model = cls.from_encoder(first, tasks, max_length=max_length, image_size=image_size)
        for task in tasks:
            head = model.heads[task.head_name]
            head.load_state_dict(head_weights(stocks[task.name]))
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, bit-equal to the one that was saved; see `PreTrainedModel.from_pretrained`.

        Raises:
            ArtifactError: it is no multi-task model, damaged, or not whole: nothing is drawn at random.
        """
        place = pretrained_model_name_or_path
        with_info = kwargs.pop("output_loading_info", False)
        # Mis-shaped tensors are told apart from missing ones below, unless they are wanted.
        redraw = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        with opening(place):
            if place is not None and not isinstance(kwargs.get("config"), MultiTaskConfig):
                _refuse_other_models(place, kwargs)
            options = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded: Any = super().from_pretrained(place, *args, **options)
            model, info = loaded
            if place is not None:
                refuse_partial(place, info | ({"mismatched_keys": ()} if redraw else {}))
        align_weights(model)
        if len(model.adapters):
            # Weights from a file are trainable, whatever stood in their place.
            model.freeze_encoder()
        return (model, info) if with_info else model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Between building on the meta device and taking memory."""
        place = load_config.pretrained_model_name_or_path
        if not (model.encoders and model.tasks):
            raise ArtifactError(
                f"expected a saved model with encoders and tasks in {place}, found {len(model.encoders)} encoders and "
                f"the tasks {list(model.tasks)}; give the folder of a multi-task model"
            )
        refuse_oversized(model, checkpoint_files or [], place)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def _build_encoder(self, name: str) -> PreTrainedModel:
        config = self.config.encoder_config(name)
        # "sdpa" is what this class itself defaults to; an encoder that lacks it chooses its own kernel.
        if self.config._attn_implementation_internal not in (None, "sdpa"):
            config._attn_implementation = self.config._attn_implementation_internal
        encoder = AutoModel.from_config(config)
        structure = (self.config.structure or {}).get(name)
        if structure:
            apply_structure(encoder, structure)
        return encoder

    def _build_head(self, task: Task) -> nn.Module:
        config = self.config.encoder_config(task.encoder)
        task.configure(config)
        stock = stock_class(task, config) if task.head == "stock" else None
        if stock is not None:
            head: nn.Module = build_stock_head(stock, config)
        else:
            with torch.device("meta"):
                head = PooledHead(
                    config.hidden_size,
                    task.num_outputs,
                    pooling=task.pooling,
                    dense=task.head == "mlp",
                    dropout=float(config.to_dict().get("hidden_dropout_prob") or 0.0),
                    per_token=task.problem == "token_classification",
                )
        if torch.get_default_device().type != "meta":
            head.to_empty(device=torch.get_default_device())
            with torch.no_grad():
                for module in head.modules():
                    _initialize(module, config, head)
        return head

    def _drop_unread_parts(self) -> None:
        """Take out parts of an encoder that no head reads, as stock classes do (a pooler under token heads).

        Raises:
            UnsupportedEncoderError: a head reads a pooler that the encoder came without.
        """
        for name, encoder in self.encoders.items():
            if name in (self.config.without_pooler or []):
                setattr(encoder, "pooler", None)  # noqa: B010 - the type of an attribute says a module
            if _lacks_pooler(encoder):
                for task in self.tasks.values():
                    head = self.heads[task.head_name]
                    reads = isinstance(head, PreTrainedModel) and _reads_pooler(type(head), head.config)
                    if task.encoder == name and reads:
                        raise UnsupportedEncoderError(
                            f"task '{task.name}': expected an encoder with a pooler for its stock head, found a "
                            f"{type(encoder).__name__} without; load it without add_pooling_layer=False, or use head "
                            "'linear'"
                        )
                continue
            readers = [self.heads[task.head_name] for task in self.tasks.values() if task.encoder == name]
            stocks = [reader for reader in readers if isinstance(reader, PreTrainedModel)]
            if len(stocks) < len(readers) or not stocks:
                continue
            for part in [key for key, module in encoder.named_children() if key == "pooler" and module is not None]:
                if not any(_reads_pooler(type(stock), stock.config) for stock in stocks):
                    setattr(encoder, part, None)

    # ---- heads over time ----

    def add_task(self, task: Task) -> None:
        """Put one more head, freshly drawn, on the encoder; the answers of the other tasks do not change.

        Raises:
            TaskError: there is a task of this name, its labels are missing, or its head reads a part of the encoder
                that was dropped because no head read it.
        """
        head = self.new_head(task)
        self.tasks[task.name] = task
        self.heads[task.head_name] = head
        self.refresh_config()

    def new_head(self, task: Task) -> nn.Module:
        """What `add_task` puts on the encoder, which the model does not hold yet; same errors."""
        if task.name in self.tasks:
            raise TaskError(f"expected a new task name, found '{task.name}' among {list(self.tasks)}; choose another")
        if task.encoder not in self.encoders or task.layer is not None:
            raise TaskError(
                f"task '{task.name}': expected a new task on a whole encoder {list(self.encoders)}, found encoder "
                f"'{task.encoder}' and layer {task.layer}; build the model with this task"
            )
        encoder = self.encoders[task.encoder]
        assert isinstance(encoder, PreTrainedModel)
        with torch.device(encoder.device):
            head = self._build_head(task)
        parts = dict(encoder.named_children())
        if isinstance(head, PreTrainedModel) and _reads_pooler(type(head), head.config) and parts.get("pooler") is None:
            raise TaskError(
                f"task '{task.name}': expected an encoder with a pooler for its stock head, found one whose pooler was "
                "dropped because no head read it; use head 'linear', or build the model with this task"
            )
        return nn.Module.to(head, encoder.dtype).train(self.training)

    def remove_task(self, name: str) -> None:
        """Take a task out, with its head and adapter and a branch or encoder that no other task reads.

        The answers of the other tasks do not change. Auxiliary tasks can so be dropped when training is over.

        Raises:
            TaskError: there is no such task, or it is the only one.
        """
        if name not in self.tasks or len(self.tasks) == 1:
            raise TaskError(f"expected one of at least two tasks, found '{name}' and the tasks {list(self.tasks)}")
        head_name = self.tasks.pop(name).head_name
        del self.heads[head_name]
        if head_name in self.adapters:
            del self.adapters[head_name]
        read = {task.encoder for task in self.tasks.values()}
        for branch in [branch for branch in self.branches if branch not in read]:
            del self.branches[branch]
        roots = {"main", *(self.config.root_of(place) for place in read)}
        for encoder in [encoder for encoder in self.encoders if encoder not in roots]:
            del self.encoders[encoder]
        self.config.branches = {key: value for key, value in (self.config.branches or {}).items() if key in read}
        self.config.encoders = {key: value for key, value in (self.config.encoders or {}).items() if key in roots}
        self.refresh_config()

    def freeze_encoder(self, tasks: Sequence[str] | None = None, *, frozen: bool = True) -> None:
        """Keep the encoder as it is while heads, and adapters where there are some, are trained.

        Args:
            tasks: those whose heads and adapters are trained; the others are kept as they are too. Default: all.
            frozen: False trains everything again, except for an encoder with adapters, which stays frozen.

        Raises:
            TaskError: there is no such task.
        """
        unknown = [name for name in tasks or () if name not in self.tasks]
        if unknown:
            raise TaskError(f"expected tasks among {list(self.tasks)}, found {unknown}")
        for part in self.children():
            # Quantized weights cannot be trained at all, so asking for it would fail.
            part.requires_grad_(not frozen and not (part is self.encoders and len(self.adapters)))
        for name, task in self.tasks.items():
            for part in (self.heads[task.head_name], adapter_of(self, name)):
                if part is not None:
                    part.requires_grad_(not frozen or tasks is None or name in tasks)

    def add_adapters(
        self,
        tasks: Sequence[str] | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: AdapterTargets = "attention",
    ) -> None:
        """Freeze the encoder and give tasks low-rank layers of their own on it (LoRA), trained with the heads.

        No answer changes until they are trained, and training one task changes no answer of another. A call encodes
        once for each task with an adapter that is asked, and once for all others together.

        Args:
            tasks: which; default: all.
            rank: width between the two matrices whose product is added to a layer.
            alpha: the product is multiplied by alpha / rank.
            dropout: share of a layer's inputs that the adapter does not see in training, 0..1.
            targets: projections and output of the `attention`, inputs and output of the `feed_forward` part, or `all`.

        Raises:
            TaskError: settings out of range, tasks that are not there, or that have an adapter already.
            UnsupportedEncoderError: tasks read a branch or a lower layer.
        """
        settings = AdapterConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
        for name, adapter in new_adapters(self, list(self.tasks if tasks is None else tasks), settings).items():
            self.adapters[self.tasks[name].head_name] = adapter
        self.freeze_encoder()
        self.refresh_config()

    def save_adapters(
        self, folder: str | os.PathLike[str], tasks: Sequence[str] | None = None, base_model: str | None = None
    ) -> list[Path]:
        """Write adapters and heads alone, without the encoder, one folder below `folder` for each task.

        A task's folder opens with `load_adapters`, and with `PeftModel.from_pretrained` on the family's own model.

        Args:
            folder: where; a task's adapter that is there is replaced.
            tasks: which; default: all that have an adapter.
            base_model: Hub id of the encoder, noted for `peft`.

        Raises:
            TaskError: tasks without an adapter, or a `base_model` that is no Hub id.
            ArtifactError: the folder cannot be written, or a task's folder holds something else.
        """
        return save_adapters(self, Path(folder), tasks, base_model)

    def load_adapters(self, folder: str | os.PathLike[str], tasks: Sequence[str] | None = None) -> list[str]:
        """Put saved adapters with their heads on the encoder that they were trained on, in float or in few bits.

        Tasks that are not there are added, adapter and head of those that are there are replaced, and the encoder is
        frozen. Nothing changes where something is wrong.

        Args:
            folder: written by `save_adapters`, or one task's folder in it.
            tasks: which; default: all that are found.

        Returns:
            The tasks.

        Raises:
            ArtifactError: files that cannot be read, or adapters of another encoder. In few bits an encoder is known
                by its shape, norms and biases alone.
            TaskError: the model has another task of that name, or cannot have a head like that.
            UnsupportedEncoderError: the encoder is quantized by torchao, or the task reads a part of it.
        """
        found = load_adapters(self, Path(folder), tasks, self.new_head)
        # Nothing fails from here on.
        for name, (task, head, adapter) in found.items():
            self.tasks.setdefault(name, task)
            self.heads[task.head_name] = head
            self.adapters[task.head_name] = adapter
        self.freeze_encoder()
        self.refresh_config()
        return list(found)

    # ---- running ----

    def get_input_embeddings(self) -> nn.Module:
        """That of the first encoder, for tools that ask any model for it."""
        encoder = next(iter(self.encoders.values()))
        assert isinstance(encoder, PreTrainedModel)
        return encoder.get_input_embeddings()

    @property
    def main_input_name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride] - that of its encoder
        """What its encoder calls its main input."""
        return self.encoder.main_input_name

    @property
    def input_names(self) -> list[str]:
        """What the encoders take."""
        return list(dict.fromkeys(name for key in self.encoders for name in self._taken[key]))

    def inputs_in(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that an encoder takes."""
        names = self.input_names
        return {name: value for name, value in values.items() if name in names}

    def forward(
        self,
        *,
        tasks: Sequence[str] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **inputs: Tensor | None,
    ) -> ModelOutput:
        """Encode once (with adapters: once for each that is asked), answer every task.

        Args:
            tasks: names of the tasks to answer; default: those with labels, or all when none has.
            output_hidden_states: also return the hidden states of all layers.
            return_dict: accepted for compatibility; the answer is always a `ModelOutput`.
            **inputs: what the encoders take, by the names of their own `forward`; and `labels_<task>`: encoded labels;
                the loss is the weighted sum of the tasks' mean losses. Without an `attention_mask` all tokens count.

        Returns:
            A `ModelOutput` with `loss`, `logits_<task>` of shape (batch, labels) or (batch, tokens, labels),
            `last_hidden_state` and `hidden_states`: those of the encoder itself where a task reads it, or of the only
            run; None where tasks with different adapters were asked, and no other.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        labels = {name: given.pop(task.label_name) for name, task in self.tasks.items() if task.label_name in given}
        names = self.input_names
        if unknown := [name for name in given if name not in names and name not in _ALSO_MADE]:
            raise TypeError(f"expected inputs among {names} and labels_<task> of {list(self.tasks)}, found {unknown}")
        if tasks is None:
            tasks = list(labels) or list(self.tasks)
        elif isinstance(tasks, str):
            tasks = [tasks]
        if unknown := [name for name in tasks if name not in self.tasks]:
            raise TaskError(f"tasks: expected names among {list(self.tasks)}, found {unknown}")
        for encoder in self.encoders.values():
            main = given.get(str(encoder.main_input_name))
            # Whole numbers are tokens.
            if main is not None and not main.is_floating_point():
                given.setdefault("attention_mask", torch.ones_like(main))
        read = self._read(tasks, given, output_hidden_states)
        logits = {name: self.answer(name, read[self._place(name)], given.get("attention_mask")) for name in tasks}
        several = len({adapter for *_, adapter in read}) > 1
        outputs = read.get(("main", None, None), {} if several else next(iter(read.values())))
        loss = None
        for name in tasks:
            task = self.tasks[name]
            target = labels.get(name)
            if target is not None:
                mean = task.loss_sum(logits[name], target) / divisor(task.item_count(target))
                loss = task.weight * mean + (0.0 if loss is None else loss)
        return output_class(tuple(self.tasks))(
            loss=loss,
            **{f"logits_{name}": value for name, value in logits.items()},
            last_hidden_state=outputs.get("last_hidden_state"),
            hidden_states=outputs.get("hidden_states") if output_hidden_states else None,
        )

    def _place(self, name: str) -> _Place:
        """What a task reads."""
        adapter = name if self.tasks[name].head_name in self.adapters else None
        return self.tasks[name].encoder, self.tasks[name].layer, adapter

    def _read(self, tasks: Sequence[str], inputs: Mapping[str, Tensor], output_hidden_states: bool | None) -> Any:
        """Outputs by place, for all places that these tasks read: each of them is run once."""
        places = list(dict.fromkeys(self._place(name) for name in tasks)) or [("main", None, None)]
        found: dict[_Place, Any] = {}
        for place in (place for place in places if place[2] is not None):
            found[place] = self.encode(inputs, output_hidden_states, name=place[0], adapter=place[2])
        places = [place for place in places if place[2] is None]
        for root in dict.fromkeys(self.config.root_of(name) for name, *_ in places):
            deeper = [place for place in places if self.config.root_of(place[0]) == root and place[:2] != (root, None)]
            wanted = bool(deeper) or output_hidden_states
            outputs = found[root, None, None] = self.encode(inputs, wanted, name=root)
            encoder = self.encoders[root]
            assert isinstance(encoder, PreTrainedModel)
            given = self._inputs_of(root, inputs)
            for name, layer, _ in deeper:
                if layer is not None:
                    found[name, layer, None] = run_depth(encoder, layer, outputs.hidden_states, given)
                else:
                    branch = self.branches[name]
                    assert isinstance(branch, Branch)
                    found[name, layer, None] = run_branch(encoder, branch, outputs.hidden_states, given)
        return found

    def encode(
        self,
        inputs: Mapping[str, Any],
        output_hidden_states: bool | None = None,
        name: str = "main",
        adapter: str | None = None,
    ) -> Any:
        """Run one encoder, with the adapter of the task `adapter` on it where one is named; its own output object."""
        given = self._inputs_of(name, inputs)
        if output_hidden_states:
            given["output_hidden_states"] = True
        encoder = self.encoders[name]
        if adapter is not None and (own := adapter_of(self, adapter)) is not None:
            assert isinstance(encoder, PreTrainedModel)
            encoder = adapted(encoder, own)
        return encoder(**given, return_dict=True)

    def _inputs_of(self, encoder: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What one encoder takes of the inputs."""
        return {name: value for name, value in inputs.items() if name in self._taken[encoder]}

    def answer(self, name: str, outputs: Any, attention_mask: Tensor | None) -> Tensor:
        """Logits of one task from an encoder's output."""
        head = self.heads[self.tasks[name].head_name]
        if isinstance(head, PooledHead):
            return head(outputs, attention_mask)
        assert isinstance(head, PreTrainedModel)
        stand_in = getattr(head, head.base_model_prefix)
        assert isinstance(stand_in, SharedEncoder)
        arguments = {} if attention_mask is None else {"attention_mask": attention_mask}
        return stand_in.answer_with(outputs, lambda: head(**arguments, return_dict=True)).logits

    # ---- saving ----

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write config (with the encoder's present config and structure) and weights; see `PreTrainedModel`."""
        # A task that was taken out may have been the last one that read a part; without it the folder loads so.
        self._drop_unread_parts()
        self.refresh_config()
        super().save_pretrained(save_directory, *args, **kwargs)

    def refresh_config(self) -> None:
        for name, encoder in self.encoders.items():
            assert isinstance(encoder, PreTrainedModel)
            assert self.config.encoders is not None
            self.config.encoders[name] = _config_dict(encoder.config)
        self.config.structure = {
            name: describe_structure(encoder)
            for name, encoder in self.encoders.items()
            if isinstance(encoder, PreTrainedModel) and not is_vanilla(encoder)
        }
        self.config.without_pooler = [name for name, encoder in self.encoders.items() if _lacks_pooler(encoder)]
        self.config.tasks = [task.to_dict() for task in self.tasks.values()]
        self.config.adapters = describe_adapters(self)

    def to_stock(self, name: str) -> PreTrainedModel:
        """One task as a model of the family's own AutoModelFor class, with copies of the weights.

        Raises:
            TaskError: no such task, or its head is not the stock one.
        """
        return to_stock(self, name)

    def export_task(self, name: str, folder: str | os.PathLike[str], processor: Any | None) -> Path:
        """Write one task as a plain transformers folder, with its tokenizer or image processor.

        Whole layers, uniform feed-forward width and vocabulary may have been cut: the folder then loads without this
        package. After uneven cuts it loads with `import hf_mtcompress`.

        Args:
            name: of the task.
            folder: where to write.
            processor: tokenizer or image processor. None is for folders whose texts somebody else tokenizes:
                transformers makes up a tokenizer for them that knows five tokens, and every text has the same answer.

        Raises:
            TaskError: no such task, or its head is not the stock one.
        """
        return export_folder(self, name, Path(folder), processor)


def _assigned(tasks: Sequence[Task], branches: Mapping[str, Sequence[str]]) -> list[Task]:
    """Tasks that say which branch they read."""
    named = [name for names in branches.values() for name in names]
    known = [task.name for task in tasks]
    wrong = [name for name in named if name not in known or named.count(name) > 1]
    bad = [name for name in branches if not NAME_PATTERN.fullmatch(name) or name == "main"]
    if wrong or bad or not all(branches.values()):
        raise TaskError(
            f"branches: expected names of lower-case letters other than 'main', each with different tasks among "
            f"{known}, found {dict(branches)}; every task is in one branch or in none"
        )
    place = {name: branch for branch, names in branches.items() for name in names}
    return [dataclasses.replace(task, encoder=place[task.name]) if task.name in place else task for task in tasks]


def load_encoder(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a pretrained encoder in float32 and make sure that its weights were found.

    A pooler may be missing, as it is from masked language models: it is then as fresh as the heads.

    Raises:
        UnsupportedEncoderError: other weights of the encoder are not in the checkpoint.
        ArtifactError: the folder is damaged.
    """
    encoder, missing = load_whole(AutoModel, path, partly=True, dtype=torch.float32, **kwargs)
    needed = [name for name in missing if not _MAY_BE_FRESH.search(name)]
    if needed:
        raise UnsupportedEncoderError(
            f"expected a checkpoint with the weights of {type(encoder).__name__} in {path}, but {len(needed)} of "
            f"{len(encoder.state_dict())} are missing (such as '{needed[0]}'); check that the folder holds a whole "
            "pretrained encoder"
        )
    return encoder


def _refuse_other_models(place: Any, options: Mapping[str, Any]) -> None:
    """Such as an encoder, of which transformers would make a model without a part."""
    if Path(str(place)).is_dir() and not options.get("subfolder"):
        values = read_config(Path(str(place)))
    else:
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        values, _ = PreTrainedConfig.get_config_dict(
            place, **{name: options[name] for name in names if name in options}
        )
    if (kind := values.get("model_type")) != MultiTaskConfig.model_type:
        raise ArtifactError(
            f"expected a multi-task model in {place}, found a model of type '{kind}'; put heads on an encoder with "
            "MultiTaskModel.from_encoder, or on fine-tuned checkpoints with from_heads"
        )


def _reads_pooler(stock: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether a stock model keeps the pooler of its encoder."""
    with torch.device("meta"):
        base = stock._from_config(config).base_model
    return any(key == "pooler" and module is not None for key, module in base.named_children())


def _lacks_pooler(encoder: nn.Module) -> bool:
    return getattr(encoder, "pooler", encoder) is None


def _initialize(module: nn.Module, config: PreTrainedConfig, head: nn.Module) -> None:
    """Initial weights as the family draws them, or normal with the family's spread for a pooled head."""
    if isinstance(head, PreTrainedModel):
        if not isinstance(module, SharedEncoder):
            head._init_weights(module)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=float(config.to_dict().get("initializer_range") or 0.02))
        nn.init.zeros_(module.bias)


def _config_dict(config: PreTrainedConfig) -> dict[str, Any]:
    """An encoder's config as plain values, without traces of where it was loaded from."""
    values = config.to_dict()
    for key in (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "quantization_config",
        "torch_dtype",
        "dtype",
    ):
        values.pop(key, None)
    for key in ("id2label", "label2id", "problem_type"):
        values.pop(key, None)
    return values
