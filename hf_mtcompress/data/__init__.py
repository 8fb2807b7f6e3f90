"""Loading, encoding and mixing the rows of several tasks."""
