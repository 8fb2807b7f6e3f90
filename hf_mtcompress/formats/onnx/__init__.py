"""One ONNX graph of all heads: written, quantized, run with ONNX Runtime."""
