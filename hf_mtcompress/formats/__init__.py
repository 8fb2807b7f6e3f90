"""The saved forms: how each is written and opened, one `predict` over all of them, proof that a folder reloads."""
