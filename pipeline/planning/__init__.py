"""Estimates of memory, operations, hours and disk, before any GPU is rented."""
