"""Training arguments: those of transformers and a few of our own."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus mixing and fusion. Plain `TrainingArguments` work too, with these defaults."""

    mixing: str = field(
        default="proportional",
        metadata={"help": "How sources of rows are mixed: proportional, temperature, uniform or round_robin."},
    )
    mixing_temperature: float = field(
        default=2.0, metadata={"help": "Temperature of mixing='temperature'; 1 is proportional, large is uniform."}
    )
    normalize_losses: str = field(
        default="chance",
        metadata={"help": "'chance' divides each task's loss by that of an uninformed guess; 'none' leaves it."},
    )


@dataclass
class DistillationTrainingArguments(MultiTaskTrainingArguments):
    """Adds what distillation needs."""

    criteria: str = field(
        default="logits,hidden", metadata={"help": "Comma-separated criteria among logits and hidden."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Softens both distributions; above 0."})
    label_weight: float = field(
        default=0.5, metadata={"help": "Share of the loss on true labels, in [0, 1]; the rest is the criteria's."}
    )
    hidden_weight: float = field(default=1.0, metadata={"help": "Weight of the hidden-state criterion, at least 0."})
