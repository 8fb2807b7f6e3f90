"""Scores, size, latency and memory of saved artefacts, and what they keep of the reference."""
