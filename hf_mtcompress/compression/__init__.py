"""Makes a trained model smaller: whole heads, neurons, layers and tokens cut, weights in fewer bits."""

from hf_mtcompress.compression.latency import LatencyTable, measure_latency
from hf_mtcompress.compression.pruning import PruneReport, TimeBudget, prune
from hf_mtcompress.compression.quantization import quantize_bitsandbytes, quantize_torchao
from hf_mtcompress.compression.schedule import GradualPruning, GradualReport
from hf_mtcompress.compression.sparsity import TrimReport, trim_weights
from hf_mtcompress.compression.vocabulary import VocabularyReport, trim_vocabulary
from hf_mtcompress.compression.width import prune_width

__all__ = [
    "GradualPruning",
    "GradualReport",
    "LatencyTable",
    "PruneReport",
    "TimeBudget",
    "TrimReport",
    "VocabularyReport",
    "measure_latency",
    "prune",
    "prune_width",
    "quantize_bitsandbytes",
    "quantize_torchao",
    "trim_vocabulary",
    "trim_weights",
]
