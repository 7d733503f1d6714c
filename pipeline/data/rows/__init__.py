"""Parsing of rows: conversations, images, bad rows; users' rows become records."""
