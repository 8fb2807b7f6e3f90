"""Using saved models: one `predict` over every runtime, the pipeline, and proof that a folder reloads."""
