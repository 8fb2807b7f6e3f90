"""Makes a trained model smaller: whole heads, neurons, layers and tokens cut, weights in fewer bits."""

from hf_mtcompress.compression.pruning import PruneReport, prune
from hf_mtcompress.compression.quantization import quantize_bitsandbytes
from hf_mtcompress.compression.schedule import GradualPruning, GradualReport
from hf_mtcompress.compression.sparsity import TrimReport, trim_weights
from hf_mtcompress.compression.vocabulary import VocabularyReport, trim_vocabulary

__all__ = [
    "GradualPruning",
    "GradualReport",
    "PruneReport",
    "TrimReport",
    "VocabularyReport",
    "prune",
    "quantize_bitsandbytes",
    "trim_vocabulary",
    "trim_weights",
]
