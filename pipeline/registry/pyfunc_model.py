"""The model that MLflow loads ("model from code"): prompts in, answers and experts out.

MLflow copies this file into every pool version and runs it there, with the version's copy of the package on the path.
"""

import base64
import io
from collections.abc import Iterator
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from PIL import Image
from pydantic import ByteSize, TypeAdapter

from pipeline.config import BaseModelConfig
from pipeline.errors import UserError
from pipeline.models.encoding import IMAGE_PLACEHOLDER, Encoded, PromptError, encode
from pipeline.models.inference import FrozenBase, InferenceWorkers, gpus_to_serve
from pipeline.registry.bases import base_folder
from pipeline.registry.experts import registered_experts
from pipeline.routing.pool import Pool
from pipeline.routing.routed_model import RoutedModel

MAX_NEW_TOKENS = 64
"""Default limit of an answer in tokens; most answers are much shorter."""

BATCH_SIZE = 32
"""Default limit of prompts per batch."""

_BYTES: TypeAdapter[int | None] = TypeAdapter(ByteSize | None)

BASE = "base"
"""Value of column `expert` where the frozen base answered."""


class RowError(UserError, MlflowException):
    """A row of the input that cannot be answered; the message names row and column.

    A subclass of MLflow's exception, or `mlflow models serve` would report an unexpected error.
    """

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class RoutedPool(mlflow.pyfunc.PythonModel):
    """A base with a pool attached."""

    def load_context(self, context: Any) -> None:
        """Loads the artifact `pool` and its base, on a GPU if available, on several if the base needs them.

        Experts come from the user's cache and are fetched on first use. `model_config` limits the memory of their weights:
        `load_model(address, model_config={"expert_memory": "2GiB"})`. Raises RegistryError where base or an expert is
        missing, ValueError if the base does not match.
        """
        settings = dict(context.model_config)
        folder = base_folder(settings.pop("base_model_id"))
        threads = torch.get_num_threads()
        memory = _BYTES.validate_python(settings.pop("expert_memory", None))
        workers = InferenceWorkers(
            cpus_per_worker=threads, gpus=gpus_to_serve(folder), batch_size=BATCH_SIZE, expert_memory=memory
        )
        self.frozen = FrozenBase(BaseModelConfig(path=str(folder), **settings), workers)
        base = self.frozen.base
        pool = Pool.load(context.artifacts["pool"], registered_experts())
        if pool.base_fingerprint != base.fingerprint:
            raise ValueError(
                f"{folder}: this base has fingerprint {base.fingerprint}, the pool was made for "
                f"{pool.base_fingerprint}; has the registered checkpoint changed? Register the pool again"
            )
        self.processor = base.processor
        self.routed = RoutedModel(base.model, pool, expert_memory=memory)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Answers the rows of a table; raises RowError.

        Columns: `prompt` (text) and, if any, `image` (encoded bytes, base64 text or null). `params`: `max_new_tokens`,
        `batch_size`. Returns `answer` and `expert` under the input's index.
        """
        params = params or {}
        rows = list(_encoded(self.processor, model_input))
        size = params.get("batch_size", BATCH_SIZE)
        tokens = params.get("max_new_tokens", MAX_NEW_TOKENS)
        answers, experts = [""] * len(rows), [BASE] * len(rows)
        for members, batch in self.frozen.batches(rows, size):
            with self.routed.call() as call:
                texts = self.frozen.answer(batch, tokens)
            for i, text, decision in zip(members, texts, call.decisions, strict=True):
                answers[i], experts[i] = text, decision.expert or BASE
        return pd.DataFrame({"answer": answers, "expert": experts}, index=model_input.index, dtype=object)


def _encoded(processor: Any, table: pd.DataFrame) -> Iterator[Encoded]:
    images = table["image"] if "image" in table else [None] * len(table)
    for number, (prompt, value) in enumerate(zip(table["prompt"], images, strict=True)):
        if not isinstance(prompt, str):
            raise RowError(f"row {number}, column prompt: must be text, found {type(prompt).__name__}")
        image = read_image(value, number)
        if image is not None and IMAGE_PLACEHOLDER not in prompt:
            prompt = IMAGE_PLACEHOLDER + prompt
        if prompt.count(IMAGE_PLACEHOLDER) != (image is not None):
            raise RowError(f"row {number}, column prompt: {prompt.count(IMAGE_PLACEHOLDER)} x {IMAGE_PLACEHOLDER}, "
                           f"but {int(image is not None)} image")  # fmt: skip
        conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
        try:
            yield encode(processor, conversation, [image] if image is not None else [], answer=False)
        except PromptError as error:
            raise RowError(f"row {number}: {error}") from None


def read_image(value: Any, number: int) -> Image.Image | None:
    """Decodes the image of row `number` from encoded bytes or base64 text (None or NaN: no image); raises RowError."""
    if value is None or isinstance(value, float):
        return None
    if not isinstance(value, (str, bytes, bytearray, memoryview)):
        raise RowError(f"row {number}, column image: must be bytes or base64 text, found {type(value).__name__}")
    try:
        encoded = base64.b64decode(value, validate=True) if isinstance(value, str) else bytes(value)
        return Image.open(io.BytesIO(encoded)).convert("RGB")
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowError(
            f"row {number}, column image: neither an encoded image (PNG, JPEG, ...) nor base64 text of one: {error}"
        ) from None


mlflow.models.set_model(RoutedPool())
