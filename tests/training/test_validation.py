"""What held-out rows say: the loss of their answers, and whether greedy decoding gives them."""

from dataclasses import replace

import pytest
import torch

from pipeline.models.bases import Base
from pipeline.models.encoding import IGNORED, collate_for
from pipeline.training import loop
from pipeline.training.loss import answer_loss
from pipeline.training.validation import validate
from tests.helpers import ask


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(loop.dist, "get_world_size", lambda: 1)


def answered_greedily(base: Base, question: str, answer: str):
    """Encodes a row whose answer's tokens are those that the base gives."""
    row = ask(base.processor, question, answer=answer)
    learned = row.labels != IGNORED
    tokens, labels = row.input_ids.copy(), row.labels.copy()
    for at in learned.nonzero()[0]:
        with torch.no_grad():
            logits = base.model(input_ids=torch.from_numpy(tokens[None, :at])).logits
        tokens[at] = labels[at] = int(logits[0, -1].argmax())
    return replace(row, input_ids=tokens, labels=labels)


def test_rows_that_greedy_decoding_answers_are_right(tiny_base):
    right = [answered_greedily(tiny_base, "reverse : one two", "two one"), answered_greedily(tiny_base, "echo 3", "3")]
    wrong = [ask(tiny_base.processor, "echo 4", answer="4 4 4")]
    point = validate(tiny_base.model, tiny_base, [right, wrong, None], 7)
    assert (point.step, point.accuracy) == (7, pytest.approx(2 / 3))
    batch = collate_for(tiny_base.processor, [*right, *wrong])
    with torch.no_grad():
        assert point.loss == pytest.approx(answer_loss(tiny_base.model, batch).item(), rel=1e-5)
    assert tiny_base.model.training, "as training needs it"
    tiny_base.model.eval()
