"""How one answer is scored: a function of the predicted text and its reference, in [0, 1].

- text: exact match, token F1 (SQuAD), relaxed accuracy (ChartQA), ANLS (DocVQA); the best over the accepted answers.
- consensus: VQA accuracy, agreement with ten people.
- choice: MMBench's option letter, read out of free text.
- Each follows the program behind published numbers; its docstring names it and the differences of others.
- A metric scores one row, independent of tasks and models; `results` combines the rows of a question.
"""

from collections.abc import Callable

from pipeline.data.rows.records import Reference
from pipeline.evaluation.metrics.choice import mmbench
from pipeline.evaluation.metrics.consensus import vqa_accuracy
from pipeline.evaluation.metrics.text import anls, exact_match, relaxed_accuracy, token_f1

METRICS: dict[str, Callable[[str, Reference], float]] = {
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "mmbench": mmbench,
    "vqa_accuracy": vqa_accuracy,
    "token_f1": token_f1,
}
"""The metrics by the names that a task's `metric` field takes."""
