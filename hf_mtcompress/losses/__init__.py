"""Fusing the losses of several tasks, and the criteria of distillation."""
