"""Keeps trimmed weights at 0 while a model is trained."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.matrices import encoder_matrices


class KeepTrimmed(TrainerCallback):
    """Keeps the weights that are 0 now at exactly 0, in any `Trainer`: `callbacks=[KeepTrimmed(model)]`.

    The gradients of these weights are set to 0 where they arise, so that they count neither in the clipping of
    gradients nor in what the optimizer remembers; and after every step the weights are set to 0 again, whatever decay
    and momentum made of them. The places are those of the model that it is made with, not those of a checkpoint:
    a training that goes on from one keeps the same places, also where a penalty has brought further weights to 0.

    Args:
        model: trimmed by `trim_weights`, before it is trained.
        embeddings: whether its word embedding was trimmed too.

    Raises:
        TrainingError: no weight is 0.
        UnsupportedEncoderError: the encoder is built in another way.

    References:
        Han et al.: Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015 (training of the
            weights that are left).
    """

    def __init__(self, model: PreTrainedModel, *, embeddings: bool = False) -> None:
        masks = {
            name: (matrix.detach() == 0).cpu()
            for name, matrix in encoder_matrices(model, embeddings=embeddings).items()
        }
        self.masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
        """By name: where weights are trimmed."""
        if not self.masks:
            raise TrainingError(
                f"{type(model).__name__}: expected a model with trimmed weights, found none that are 0; trim it first, "
                "with trim_weights(model, sparsity=0.5)"
            )
        self._kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the weights in the model that is trained, on its device.

        Raises:
            TrainingError: it is another model, its weights are in pieces, or a checkpoint was trimmed in other places.
        """
        self._release()
        parameters = {name.removeprefix("module."): value for name, value in kwargs["model"].named_parameters()}
        for name, mask in self.masks.items():
            parameter = parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                found = "none" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                raise TrainingError(
                    f"KeepTrimmed: expected the model that it was made with, with '{name}' of shape "
                    f"{tuple(mask.shape)} in one piece (no FSDP, no DeepSpeed), found {found}; make it with the model "
                    "that is trained"
                )
            mask = mask.to(parameter.device)
            if bool(parameter.detach()[mask].any()):
                raise TrainingError(
                    f"KeepTrimmed: expected weights of 0 where the model was trimmed, found others in '{name}'; "
                    "go on from a checkpoint of the same trimmed model, or start anew"
                )
            self._kept.append((parameter, mask))
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(lambda grad, mask=mask: grad.masked_fill(mask, 0.0)))

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take back what the step did to trimmed weights."""
        for parameter, mask in self._kept:
            parameter.masked_fill_(mask, 0.0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the model."""
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._kept, self._hooks = [], []
