"""One graph of all heads for OpenVINO: written, quantized, run."""
