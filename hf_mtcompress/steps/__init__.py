"""What each step of a recipe does, one module a kind of step; `run` picks it."""
