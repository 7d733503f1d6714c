"""Answers in bulk: every row of a source, answered by a pool, in files beside each other."""
