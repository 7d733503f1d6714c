"""Answers prompts with a base in this process: alone, with one expert, or with a pool that mixes them."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch

from pipeline.config import BaseModelConfig, RouterConfig
from pipeline.data.encoded.packing import PACKED, unpack_row
from pipeline.data.errors import StreamError
from pipeline.evaluation.answers import Answer
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.pool_at_address import pool_at_address
from pipeline.evaluation.prompts import kept_columns
from pipeline.models.answering import routed_answers
from pipeline.models.encoding import Encoded
from pipeline.models.inference import FrozenBase, InferenceWorkers
from pipeline.routing.expert import Expert
from pipeline.routing.features import project_prompts
from pipeline.routing.pool import Pool
from pipeline.routing.prompt_hooks import PromptFeatureHook
from pipeline.routing.routed_model import RoutedModel
from pipeline.storage.mirror import Folder, Mirror


class Predictor(FrozenBase):
    """Holds a base; answers prompts with the pool attached to it."""

    def __init__(self, base: BaseModelConfig, workers: InferenceWorkers, *, vision: bool = True) -> None:
        super().__init__(base, workers, vision=vision)
        self.routed: RoutedModel | None = None

    def attach(self, pool: Pool | None) -> None:
        """Attaches `pool` (None: the bare base) instead of the former one."""
        if self.routed is not None:
            self.routed.detach()
        self.routed = None
        if pool is not None:
            self.routed = RoutedModel(self.base.model, pool, expert_memory=self.workers.expert_memory)

    def attach_expert(self, expert: Expert) -> None:
        """Attaches one expert, alone: beside experts of other ranks it would round differently."""
        self.attach(Pool(self.base.label, self.base.fingerprint, RouterConfig(), [expert]))

    def by_expert(self, rows: Sequence[Encoded], expert: str | None, max_new_tokens: int) -> list[Answer]:
        """Answers with one expert of the attached pool, or with the base (None)."""
        if self.routed is None:
            return [Answer(text, BASE) for text in self._texts(rows, max_new_tokens)]
        with self.routed.forced(expert):
            return [Answer(text, expert or BASE) for text in self._texts(rows, max_new_tokens)]

    def by_router(self, rows: Sequence[Encoded], max_new_tokens: int) -> list[Answer]:
        """Answers with the attached pool's router."""
        assert self.routed is not None, "routers belong to pools"
        answers = routed_answers(self, self.routed, rows, max_new_tokens)
        return [Answer(answer.text, answer.expert or BASE) for answer in answers]

    def _texts(self, rows: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        texts = [""] * len(rows)
        for members, batch in self.batches(rows):
            for i, text in zip(members, self.answer(batch, max_new_tokens), strict=True):
                texts[i] = text
        return texts

    def features(self, rows: Sequence[Encoded], width: int) -> np.ndarray:
        """Returns the prompt features (N, `width`), float32, with no pool attached.

        One row at a time, so they do not depend on the batch; the language model does not run.
        """
        features: list[torch.Tensor] = []

        def keep_features(features_BS: torch.Tensor | None, tokens_BT: torch.Tensor | None) -> None:
            assert features_BS is not None, "no cache holds a prompt already"
            features.append(project_prompts(features_BS, width).cpu())
            raise _FeaturesReady

        hook = PromptFeatureHook(self.base.model, keep_features)
        try:
            for row in rows:
                try:
                    self.read([row])
                except _FeaturesReady:
                    continue
        finally:
            hook.remove()
        return torch.cat(features).float().numpy() if features else np.zeros((0, width), np.float32)


class _FeaturesReady(Exception):
    """Stops the forward pass: a prompt's features are there."""


class PagePredictor:
    """A predictor as an actor: attaches the author, and takes rows out of blocks that Ray delivers."""

    def __init__(self, base: BaseModelConfig, workers: InferenceWorkers, vision: bool) -> None:
        self._predictor = Predictor(base, workers, vision=vision)
        self._attached: str | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        """Holds the files of the attached pool, where they came from an address."""

    def record(self, width: int, block: pa.Table) -> pa.Table:
        """Returns a `PromptTable`'s columns for a block of encoded rows; features of bad rows are zeros."""
        self._attach(None, lambda: None)
        good = np.flatnonzero(block["reason"].to_numpy() == "")
        features_NF = np.zeros((len(block), width), np.float32)
        features_NF[good] = self._predictor.features(_encoded(block.take(good)), width)
        return kept_columns(block, features_NF)

    def by_expert(
        self,
        author: str,
        expert: Sequence[ray.ObjectRef],
        prompts: Sequence[str],
        max_new_tokens: int,
        rows: Sequence[Sequence[int]],
        *blocks: pa.Table,
    ) -> list[Answer]:
        """Answers a page's prompts, which are among `rows` of `blocks`, with the one `expert`, or with the base (none).

        `author` is the name in the answer store.
        """
        self._attach(author if expert else None, lambda: self._predictor.attach_expert(ray.get(expert[0])))
        routed = self._predictor.routed
        name = None if routed is None else routed.pool.names[0]
        return self._predictor.by_expert(_rows(prompts, rows, blocks), name, max_new_tokens)

    def by_router(
        self,
        author: str,
        pool: Folder,
        prompts: Sequence[str],
        max_new_tokens: int,
        rows: Sequence[Sequence[int]],
        *blocks: pa.Table,
    ) -> list[Answer]:
        """Answers a page's prompts as the router of the pool in folder `pool` decides."""
        self._attach(author, lambda: self._predictor.attach(self._opened(pool)))
        return self._predictor.by_router(_rows(prompts, rows, blocks), max_new_tokens)

    def _opened(self, folder: Folder) -> Pool:
        """Reads a pool's folder; from an address into this node's caches."""
        place = Mirror.of(folder)
        if place.remote is None:
            return Pool.load(place.local)
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        return pool_at_address(place.remote, Path(self._scratch.name) / "pool")

    def _attach(self, author: str | None, attach: Callable[[], None]) -> None:
        if author != self._attached:
            self._attached = None  # should attaching fail
            self._predictor.attach(None)
            if author is not None:
                attach()
            self._attached = author


def _rows(prompts: Sequence[str], rows: Sequence[Sequence[int]], blocks: Sequence[pa.Table]) -> list[Encoded]:
    """Returns the encoded rows of prompts, in their order; raises StreamError where they have changed since the first read."""
    table = pa.concat_tables([block.take(list(indices)) for indices, block in zip(rows, blocks, strict=True)])
    row_of = {prompt: row for row, prompt in enumerate(table["prompt"].to_pylist())}
    if missing := [prompt for prompt in prompts if prompt not in row_of]:
        task, source = table["column"][0].as_py(), table["source"][0].as_py()
        raise StreamError(
            f"task {task!r}: {len(missing)} prompts of {source} have changed since this run began; leave files and "
            "images as they are while a job runs, and run the same command again"
        )
    return _encoded(table.take([row_of[prompt] for prompt in prompts]))


def _encoded(table: pa.Table) -> list[Encoded]:
    return [unpack_row(*(table[name][i].as_buffer() for name in PACKED)) for i in range(len(table))]
