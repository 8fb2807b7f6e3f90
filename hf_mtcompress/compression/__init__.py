"""Makes a trained model smaller: whole heads, neurons and layers cut, weights in fewer bits."""

from hf_mtcompress.compression.pruning import PruneReport, prune
from hf_mtcompress.compression.quantization import quantize_bitsandbytes

__all__ = ["PruneReport", "prune", "quantize_bitsandbytes"]
