"""Encoded rows as columns of a table, and back without copying.

Shapes differ between rows and array names between families, so arrays travel as bytes: one column for the tokens, one for
the labels, one for all other arrays, and one with the index of these (group, name, dtype, shape, offset).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.models.encoding import Encoded

PACKED = ("input_ids", "labels", "arrays", "layout")
"""Columns of an encoded row."""


def pack(encoded: Encoded) -> dict[str, bytes]:
    """Returns an encoded row as columns."""
    array_index, parts, offset = [], [], 0
    for group, arrays in (("images", encoded.images), ("marks", encoded.token_fields)):
        for name, array in arrays.items():
            array_index.append([group, name, array.dtype.str, array.shape, offset])
            parts.append(np.ascontiguousarray(array).tobytes())
            offset += len(parts[-1])
    if encoded.image_id is not None:
        array_index.append(["picture", str(encoded.image_id), "", (), 0])
    return {
        "input_ids": encoded.input_ids.tobytes(),
        "labels": encoded.labels.tobytes(),
        "arrays": b"".join(parts),
        "layout": json.dumps(array_index).encode(),
    }


def prompt_digest(packed: Mapping[str, bytes]) -> str:
    """Returns a digest (32 hex digits) of all model inputs of an encoded row."""
    digest = hashlib.sha256()
    for name in PACKED:
        digest.update(len(packed[name]).to_bytes(8, "little") + packed[name])
    return digest.hexdigest()[:32]


def unpack(batch: Mapping[str, Any]) -> list[Encoded]:
    """Reads encoded rows from a batch of columns; arrays are views of the columns' memory."""
    return [unpack_row(*values) for values in zip(*(batch[name] for name in PACKED), strict=True)]


def unpack_row(ids: Any, labels: Any, arrays: Any, array_index: Any) -> Encoded:
    """Reads one encoded row from its columns."""
    groups: dict[str, dict[str, np.ndarray]] = {"images": {}, "marks": {}}
    image_id = None
    for group, name, dtype, shape, offset in json.loads(bytes(array_index)):
        if group == "picture":
            image_id = int(name)
            continue
        flat = np.frombuffer(arrays, dtype, int(np.prod(shape)), offset)
        groups[group][name] = flat.reshape(shape)
    tokens = np.frombuffer(ids, np.int64), np.frombuffer(labels, np.int64)
    return Encoded(*tokens, groups["images"], groups["marks"], image_id)
