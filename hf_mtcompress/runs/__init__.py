"""A recipe from beginning to end, and the commands around it."""
