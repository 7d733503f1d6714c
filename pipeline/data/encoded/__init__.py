"""Rows as a base reads them: token ids and pixels, or the image embeddings of its frozen vision tower."""
