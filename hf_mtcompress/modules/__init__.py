"""Modules that a saved model consists of."""
