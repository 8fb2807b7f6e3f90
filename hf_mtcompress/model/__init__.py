"""The multi-task model, its shape, and how it loads."""
