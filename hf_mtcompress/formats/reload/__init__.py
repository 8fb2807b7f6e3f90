"""Proof that a saved folder answers in a fresh process as the model did before it was saved."""
