"""Trainer subclasses: several tasks, distillation."""
