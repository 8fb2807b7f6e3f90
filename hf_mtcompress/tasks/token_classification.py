"""Tasks that label each word of a text."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_mtcompress.errors import DataError
from hf_mtcompress.tasks.base import UNLABELLED, ProblemType, Task, cross_entropy_sum, register_task, weighted_count
from hf_mtcompress.tasks.classification import label_index
from hf_mtcompress.tasks.metrics import PRIMARY_METRICS, baseline_score, bio_spans, is_bio, token_metrics

logger = logging.getLogger(__name__)


@dataclass
class TokenClassification(Task):
    """One label for each word; labels in BIO form (`B-city`, `I-city`, `O`) are decoded to spans.

    A word's label stands at its first sub-word; the other sub-words are unlabelled.

    Args:
        tokens: column with a list of words.
    """

    kind: ClassVar[str] = "token-classification"
    columns: ClassVar[tuple[str, ...]] = ("label", "tokens")

    _: KW_ONLY
    tokens: str | None = None

    @property
    def problem(self) -> ProblemType:
        return "token_classification"

    @property
    def bio(self) -> bool:
        """Whether the labels mark spans."""
        return bool(self.labels) and is_bio(self.labels or ())

    @property
    def default_metric(self) -> str:
        return "span_f1" if self.bio else "token_accuracy"

    @property
    def primary_metrics(self) -> tuple[str, ...]:
        # Labels that mark no spans have no span scores.
        return PRIMARY_METRICS["token_classification"] if self.bio or not self.labels else ("token_accuracy",)

    @property
    def auto_class(self) -> str:
        return "AutoModelForTokenClassification"

    @property
    def pipeline(self) -> str:
        return "token-classification"

    @property
    def input_columns(self) -> tuple[str, ...]:
        return (self.tokens,) if self.tokens is not None else ()

    def encode_labels(self, values: Sequence[Any], encoding: Mapping[str, Any]) -> list[Any]:
        aligned, cut = [], 0
        texts = encoding.get("words") or [None] * len(values)
        for words, word_ids, text in zip(values, encoding["word_ids"], texts, strict=True):
            reached = max((index for index in word_ids if index is not None), default=-1) + 1
            if words is None:
                aligned.append([UNLABELLED] * len(word_ids))
                continue
            if reached > len(words) or (text is not None and len(_words(text)) != len(words)):
                found = f"at least {reached}" if text is None else len(_words(text))
                raise DataError(
                    f"task '{self.name}': expected one label for each word, found {len(words)} labels in column "
                    f"'{self.label}' for {found} words in column '{self.tokens}'"
                )
            cut += len({index for index in word_ids if index is not None}) < len(words)
            indices = [label_index(self, word) for word in words]
            labels, previous = [], None
            for index in word_ids:
                labels.append(UNLABELLED if index is None or index == previous else indices[index])
                previous = index
            aligned.append(labels)
        if cut:
            logger.warning(
                "task '%s': %d of %d rows have words without a token (beyond max_length, or dropped by the tokenizer); "
                "their labels are not counted",
                self.name,
                cut,
                len(aligned),
            )
        return aligned

    def collate_labels(self, labels: Sequence[Any], length: int | None) -> Tensor:
        length = length if length is not None else max(len(row) for row in labels)
        return torch.tensor([list(row) + [UNLABELLED] * (length - len(row)) for row in labels], dtype=torch.long)

    def loss_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_sum(self, logits.flatten(0, 1), labels.flatten())

    def item_count(self, labels: Tensor) -> Tensor:
        return weighted_count(self, labels.flatten())

    def chance_loss(self, labels: Sequence[Any]) -> float:
        return math.log(max(self.num_outputs, 2))

    def compute_metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        names = self.labels or ()
        best = np.asarray(logits).argmax(-1)
        predictions, references = [], []
        for row, reference in zip(best, np.asarray(labels), strict=True):
            kept = reference != UNLABELLED
            if kept.any():
                predictions.append([names[index] for index in row[: len(reference)][kept]])
                references.append([names[index] for index in reference[kept]])
        return token_metrics(predictions, references)

    def baseline(self, labels: Sequence[Any]) -> float:
        names = self.labels or ()
        references = [[names[index] for index in row if index != UNLABELLED] for row in labels]
        return baseline_score(str(self.metric), references, self.problem)

    def decode(self, logits: np.ndarray, encoding: Mapping[str, Any] | None = None) -> Any:
        names = self.labels or ()
        word_ids = (encoding or {}).get("word_ids", range(len(logits)))
        words = (encoding or {}).get("words")
        best = np.asarray(logits).argmax(-1)
        read: dict[int, str] = {}
        for index, row in zip(word_ids, best, strict=False):
            if index is not None:
                read.setdefault(index, names[int(row)])
        count = max(read, default=-1) + 1 if words is None else len(words)
        answers = [read.get(word) for word in range(count)]
        kept = sorted(read)
        answer: dict[str, Any] = {"labels": answers}
        if self.bio:
            answer["spans"] = [
                {
                    "label": label,
                    "start": kept[start],
                    "end": kept[end - 1] + 1,
                    **({"text": " ".join(words[kept[start] : kept[end - 1] + 1])} if words is not None else {}),
                }
                # A word that was not read neither ends a span nor begins one.
                for label, start, end in bio_spans([read[word] for word in kept])
            ]
        return answer


def _words(row: str | Sequence[str]) -> list[str]:
    return row.split() if isinstance(row, str) else list(row)


register_task(TokenClassification.kind, TokenClassification)
