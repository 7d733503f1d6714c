"""Rows as model inputs: token ids and pixels, or the image embeddings of the frozen vision tower."""
