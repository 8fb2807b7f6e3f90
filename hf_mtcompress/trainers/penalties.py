"""L1 and L2 penalties on the encoder's linear weights, towards a model that loses little when it is trimmed.

L2 is what it is in a formula: `l2 / 2 * sum(w ** 2)` is part of the loss. Its gradient, `l2 * w`, is added once to the
gradients of a whole accumulation window, before they are clipped. So it counts once whatever the window is split into,
on every process alike, and in the precision of the weights, not that of autocast. AdamW's `weight_decay` is something
else: there the pull is not divided by the size of the gradients (Loshchilov and Hutter 2019), and it holds for heads
and embeddings too. With plain SGD both are the same.

L1 is not added to the loss, but done as its proximal step (soft thresholding): after each optimizer step, every weight
moves towards 0 by `learning rate * l1`, and stops there. As a term of the loss it would be wrong twice: a gradient of
constant size jumps over 0 instead of reaching it, so that no weight ever becomes 0; and Adam divides it by the size of
the gradients, so that the weights that matter least are hardly pulled. With SGD the proximal step is the one that finds
the minimum of loss plus penalty.

References:
    Parikh and Boyd: Proximal Algorithms. Foundations and Trends in Optimization 2014.
    Loshchilov and Hutter: Decoupled Weight Decay Regularization. ICLR 2019.
    Han et al.: Learning both Weights and Connections for Efficient Neural Networks. NeurIPS 2015 (L1 against L2 before
        and after trimming).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_mtcompress.errors import TrainingError
from hf_mtcompress.model.matrices import encoder_matrices


class WeightPenalty(TrainerCallback):
    """Both penalties on one model, for `MultiTaskTrainer`; L1 is done where `Trainer` calls it after a step.

    Args:
        model: the model that is trained.
        l1: at least 0.
        l2: at least 0.

    Raises:
        TrainingError: a penalty is negative or not a number, or the encoder's linear weights are not trained.
        UnsupportedEncoderError: the encoder is built in another way, or is quantized.
    """

    def __init__(self, model: PreTrainedModel, l1: float, l2: float) -> None:
        for name, value in (("l1_penalty", l1), ("l2_penalty", l2)):
            if not 0.0 <= value < float("inf"):
                raise TrainingError(f"{name}: expected a finite number of at least 0, found {value}")
        self.l1, self.l2 = l1, l2
        self.weights = _trained(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the weights again, of a trainer that makes its model anew for each training."""
        self.weights = _trained(kwargs["model"])

    @torch.no_grad()
    def pull(self, scale: float) -> None:
        """Add the gradient of L2 to that of a whole window; `scale` is what a gradient scaler multiplied it by."""
        for weight in self.weights if self.l2 else ():
            if weight.grad is not None:
                weight.grad.add_(weight.to(weight.grad.dtype), alpha=self.l2 * scale)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move weights towards 0 by the learning rate times L1, those that are nearer to 0."""
        optimizer: Any = kwargs["optimizer"]
        # With float16, steps whose gradients overflow are left out.
        if not self.l1 or getattr(optimizer, "step_was_skipped", False):
            return
        rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
        for weight in self.weights:
            if weight.grad is not None and id(weight) in rates:
                weight.copy_(torch.nn.functional.softshrink(weight, float(rates[id(weight)]) * self.l1))

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Value of each penalty that is set, and the share of weights that are 0, for the log."""
        found: dict[str, float] = {}
        if self.l1:
            found["penalty_l1"] = self.l1 * sum(float(weight.abs().sum()) for weight in self.weights)
        if self.l2:
            found["penalty_l2"] = self.l2 / 2 * sum(float(weight.square().sum()) for weight in self.weights)
        left = sum(int(weight.count_nonzero()) for weight in self.weights)
        found["zero_weights"] = 1.0 - left / sum(weight.numel() for weight in self.weights)
        return found


def _trained(model: PreTrainedModel) -> list[nn.Parameter]:
    weights = [weight for weight in encoder_matrices(model).values() if weight.requires_grad]
    if not weights:
        raise TrainingError(
            "l1_penalty and l2_penalty: expected an encoder whose linear layers are trained, found a frozen one; leave "
            "them out, or train the encoder"
        )
    return weights
