"""Delivers encoded rows to training and evaluation: cached in the object store, or streamed from files."""
