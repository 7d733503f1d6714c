"""A worker that answers pages of rows with one pool, as an actor."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.data.encoded.packing import PACKED, unpack_row
from pipeline.evaluation.matrix import BASE
from pipeline.evaluation.predictor import Predictor
from pipeline.models.answering import RoutedAnswer, routed_answers
from pipeline.models.encoding import Encoded
from pipeline.models.inference import InferenceWorkers
from pipeline.prediction.parts import ANSWERS, ASIDE
from pipeline.prediction.pool_source import PoolSource, check_base
from pipeline.routing.routed_model import RoutedModel


class PoolPredictor:
    """Holds the base with the pool; `told` is who answers everything, or None."""

    def __init__(self, source: PoolSource, workers: InferenceWorkers, max_new_tokens: int, told: str | None) -> None:
        base, pool = source.base(), source.pool()
        self._predictor = Predictor(base, workers)
        check_base(base, self._predictor.base.fingerprint, pool, source.address)
        self._routed = RoutedModel(self._predictor.base.model, pool, expert_memory=workers.expert_memory)
        self._max_new_tokens, self._told = max_new_tokens, told

    def answer(self, rows: Sequence[Sequence[int]], *blocks: pa.Table) -> pa.Table:
        """Answers a page, which is `rows` of `blocks`; returns its rows, good and bad, in their order (`ANSWERS`, `ASIDE`)."""
        page = pa.concat_tables([block.take(list(indices)) for indices, block in zip(rows, blocks, strict=True)])
        columns = {name: page[name].to_pylist() for name in (*ANSWERS.names, *ASIDE.names) if name in page.column_names}
        told = self._told_of(page, columns["reason"])
        answers: list[RoutedAnswer | None] = [None] * len(page)
        for expert in dict.fromkeys(told):
            members = [i for i, reason in enumerate(columns["reason"]) if not reason and told[i] == expert]
            if not members:
                continue
            encoded = [unpack_row(*(page[name][i].as_buffer() for name in PACKED)) for i in members]
            for i, answer in zip(members, self._answered(encoded, expert), strict=True):
                answers[i] = answer
        columns["answer"] = [None if answer is None else answer.text for answer in answers]
        columns["expert"] = [None if answer is None else answer.expert or BASE for answer in answers]
        columns["posterior"] = [None if answer is None else answer.posterior for answer in answers]
        return pa.table(columns, schema=pa.schema([*ANSWERS, *ASIDE]))

    def _told_of(self, page: pa.Table, reasons: list[str]) -> list[str | None]:
        """Returns who is told to answer each row (None: the router decides); gives rows that name nobody a reason."""
        if "task" not in page.column_names:
            return [self._told] * len(page)
        told, known = page["task"].to_pylist(), self._routed.pool.names
        for i, name in enumerate(told):
            if not reasons[i] and name not in (BASE, *known):
                reasons[i] = f"no expert {name!r} in the pool; there are: {', '.join(known) or 'none'}, and {BASE}"
        return told

    def _answered(self, rows: Sequence[Encoded], expert: str | None) -> list[RoutedAnswer]:
        if expert is None:
            return routed_answers(self._predictor, self._routed, rows, self._max_new_tokens)
        with self._routed.forced(None if expert == BASE else expert):
            return routed_answers(self._predictor, self._routed, rows, self._max_new_tokens)
