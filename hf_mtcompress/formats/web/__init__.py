"""A page that runs an ONNX graph inside the browser."""
