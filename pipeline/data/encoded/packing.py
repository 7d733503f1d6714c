"""Encoded rows as columns of a table, and back without copying.

Rows differ in shape and families in what they hold, so arrays travel as bytes: one column for the tokens, one for the
labels, one for all other arrays, and one that says where each of these begins and what it is.
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
    layout, parts, offset = [], [], 0
    for kind, arrays in (("images", encoded.images), ("marks", encoded.marks)):
        for name, array in arrays.items():
            layout.append([kind, name, array.dtype.str, array.shape, offset])
            parts.append(np.ascontiguousarray(array).tobytes())
            offset += len(parts[-1])
    if encoded.picture is not None:
        layout.append(["picture", str(encoded.picture), "", (), 0])
    return {
        "input_ids": encoded.input_ids.tobytes(),
        "labels": encoded.labels.tobytes(),
        "arrays": b"".join(parts),
        "layout": json.dumps(layout).encode(),
    }


def prompt_digest(packed: Mapping[str, bytes]) -> str:
    """Returns 32 hex digits that name an encoded row by all that a base reads of it."""
    found = hashlib.sha256()
    for name in PACKED:
        found.update(len(packed[name]).to_bytes(8, "little") + packed[name])
    return found.hexdigest()[:32]


def unpack(batch: Mapping[str, Any]) -> list[Encoded]:
    """Reads encoded rows from a batch of columns; arrays are views of the columns' memory."""
    return [unpack_row(*values) for values in zip(*(batch[name] for name in PACKED), strict=True)]


def unpack_row(ids: Any, labels: Any, arrays: Any, layout: Any) -> Encoded:
    """Reads one encoded row from its columns."""
    found: dict[str, dict[str, np.ndarray]] = {"images": {}, "marks": {}}
    picture = None
    for kind, name, dtype, shape, offset in json.loads(bytes(layout)):
        if kind == "picture":
            picture = int(name)
            continue
        flat = np.frombuffer(arrays, dtype, int(np.prod(shape)), offset)
        found[kind][name] = flat.reshape(shape)
    tokens = np.frombuffer(ids, np.int64), np.frombuffer(labels, np.int64)
    return Encoded(*tokens, found["images"], found["marks"], picture)
