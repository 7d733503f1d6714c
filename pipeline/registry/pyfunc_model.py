"""The model that MLflow loads ("model from code"): prompts in, answers and experts out.

Every pool version carries a copy of this file (`served_code`), which answers there.
"""

import base64
import io
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, MlflowException
from PIL import Image
from pydantic import ByteSize, TypeAdapter

from pipeline.config import BaseModelConfig
from pipeline.errors import UserError
from pipeline.models.answering import routed_answers
from pipeline.models.bases import as_loadable_here
from pipeline.models.encoding import IMAGE_PLACEHOLDER, Encoded, PromptError, encode
from pipeline.models.inference import FrozenBase, InferenceWorkers, gpus_to_serve
from pipeline.registry.bases import base_folder
from pipeline.registry.loading import read_pool
from pipeline.routing.routed_model import RoutedModel

MAX_NEW_TOKENS = 64
"""Default limit of an answer in tokens; most answers are much shorter."""

BATCH_SIZE = 32
"""Default limit of prompts per batch."""

WINDOW_BATCHES, WINDOW_BYTES = 4, 256 << 20
"""Rows that are encoded at a time, in batches, and the bytes of their images at which a window ends before: prompts of similar
length share a batch, and memory does not grow with a request."""

OUTPUTS = ("answer", "expert", "error")
"""Columns of a prediction; a row has either an answer with its expert or an error."""

_BYTES: TypeAdapter[int | None] = TypeAdapter(ByteSize | None)

BASE = "base"
"""Value of column `expert` where the frozen base answered."""

_logger = logging.getLogger(__name__)


class RowError(UserError):
    """A row of the input that cannot be answered; the message is the reason."""


class RequestError(UserError, MlflowException):
    """A request that cannot be answered at all; the message says why.

    A subclass of MLflow's exception: of any other `mlflow models serve` sends the traceback to the client.
    """

    def __init__(self, message: str, error_code: int = INVALID_PARAMETER_VALUE) -> None:
        MlflowException.__init__(self, message, error_code=error_code)


class RoutedPool(mlflow.pyfunc.PythonModel):
    """A base with a pool attached."""

    def load_context(self, context: Any) -> None:
        """Loads the artifact `pool` and its base, on a GPU if available, on several if the base needs them.

        Experts and statistics of base prompts come from the user's cache and are fetched on first use; a base is used where it
        lies on this machine, another comes from that cache too. `model_config` limits the memory of experts' weights:
        `load_model(address, model_config={"expert_memory": "2GiB"})`. Raises RegistryError where any of them is missing,
        ValueError if the base does not match.
        """
        settings = dict(context.model_config)
        folder = base_folder(settings.pop("base_model_id"))
        threads = torch.get_num_threads()
        memory = _BYTES.validate_python(settings.pop("expert_memory", None))
        workers = InferenceWorkers(
            cpus_per_worker=threads, gpus=gpus_to_serve(folder), batch_size=BATCH_SIZE, expert_memory=memory
        )
        self.frozen = FrozenBase(as_loadable_here(BaseModelConfig(path=str(folder), **settings)), workers)
        base = self.frozen.base
        pool = read_pool(Path(context.artifacts["pool"]), "this pool")
        if pool.base_fingerprint != base.fingerprint:
            raise ValueError(
                f"{folder}: this base has fingerprint {base.fingerprint}, the pool was made for "
                f"{pool.base_fingerprint}; has the registered checkpoint changed? Register the pool again"
            )
        self.processor = base.processor
        self.routed = RoutedModel(base.model, pool, expert_memory=memory)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers the rows of a table; raises RequestError.

        Columns: `prompt` (text) and, if any, `image` (encoded bytes, base64 text or null). `params`: `max_new_tokens`,
        `batch_size`. Returns `answer`, `expert` and `error` under the input's index: a row without an answer has an error,
        null in the others, and costs no other row its answer.
        """
        size, tokens = _limits(params or {})
        if "prompt" not in model_input:
            raise RequestError(f"column prompt is missing; there are: {', '.join(map(str, model_input.columns))}")
        rows: list[tuple[str | None, str | None, str | None]] = []
        try:
            text = self.routed.model.config.get_text_config()
            most = getattr(text, "max_position_embeddings", None) or sys.maxsize
            for window in _windows(_encoded(self.processor, model_input, most), size * WINDOW_BATCHES):
                good = [row for row in window if isinstance(row, Encoded)]
                answers = iter(routed_answers(self.frozen, self.routed, good, tokens, size=size))
                for row in window:
                    if isinstance(row, Encoded):
                        answer = next(answers)
                        rows.append((answer.text, answer.expert or BASE, None))
                    else:
                        rows.append((None, None, str(row)))
        except Exception as error:  # MLflow's server sends the traceback of any other to the client
            _logger.exception("a request failed")
            raise RequestError(
                f"{type(error).__name__} while answering; the server's log says more", INTERNAL_ERROR
            ) from error
        return pd.DataFrame(rows, columns=list(OUTPUTS), index=model_input.index, dtype=object)


def _limits(params: dict[str, Any]) -> tuple[int, int]:
    """Returns prompts per batch and tokens per answer; raises RequestError for what is no number from 1 on."""
    limits = params.get("batch_size", BATCH_SIZE), params.get("max_new_tokens", MAX_NEW_TOKENS)
    for name, limit in zip(("batch_size", "max_new_tokens"), limits, strict=True):
        if not isinstance(limit, int) or limit < 1:
            raise RequestError(f"params: {name} must be a number from 1 on, found {limit!r}")
    return limits


def _windows(rows: Iterator[Encoded | RowError], most: int) -> Iterator[list[Encoded | RowError]]:
    """Yields rows by at most `most`, or until their images reach WINDOW_BYTES."""
    window: list[Encoded | RowError] = []
    size = 0
    for row in rows:
        window.append(row)
        size += sum(array.nbytes for array in row.images.values()) if isinstance(row, Encoded) else 0
        if len(window) == most or size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _encoded(processor: Any, table: pd.DataFrame, most: int) -> Iterator[Encoded | RowError]:
    """Yields each row encoded, or why it cannot be: one of more tokens than the base has positions, for example."""
    images = table["image"] if "image" in table else [None] * len(table)
    for prompt, image in zip(table["prompt"], images, strict=True):
        try:
            row = _encode(processor, prompt, image)
            if len(row.input_ids) > most:
                raise RowError(f"column prompt: {len(row.input_ids):,} tokens, the base takes {most:,}")
            yield row
        except RowError as error:
            yield error


def _encode(processor: Any, prompt: Any, value: Any) -> Encoded:
    if not isinstance(prompt, str):
        raise RowError(f"column prompt: must be text, found {type(prompt).__name__}")
    image = read_image(value)
    if image is not None and IMAGE_PLACEHOLDER not in prompt:
        prompt = IMAGE_PLACEHOLDER + prompt
    if prompt.count(IMAGE_PLACEHOLDER) != (image is not None):
        raise RowError(f"column prompt: {prompt.count(IMAGE_PLACEHOLDER)} x {IMAGE_PLACEHOLDER}, "
                       f"but {int(image is not None)} image")  # fmt: skip
    conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
    try:
        return encode(processor, conversation, [image] if image is not None else [], answer=False)
    except PromptError as error:
        raise RowError(str(error)) from None


def read_image(value: Any) -> Image.Image | None:
    """Decodes an image from encoded bytes or base64 text (None, NaN, pandas' NA, no text: no image); raises RowError."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str) and not value:
        return None
    if not isinstance(value, (str, bytes, bytearray, memoryview)):
        raise RowError(f"column image: must be bytes or base64 text, found {type(value).__name__}")
    try:
        if isinstance(value, str):
            text = value.partition(",")[2] if value.startswith("data:") else value  # a data URL, as browsers make them
            encoded = base64.b64decode(text, validate=True)
        else:
            encoded = bytes(value)
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except Exception:  # noqa: BLE001 - decoders raise anything on broken data (IndexError, struct.error, ...)
        raise RowError(
            "column image: neither an encoded image (PNG, JPEG, ...) that can be read nor base64 text of one"
        ) from None
