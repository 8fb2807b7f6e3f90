"""Saved forms that run without PyTorch."""
