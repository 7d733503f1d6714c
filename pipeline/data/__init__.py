"""Rows of a task, from files to batches; data flow sources -> rows -> encoded -> loading."""
