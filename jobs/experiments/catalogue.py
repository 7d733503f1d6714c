"""The experiments by name: what each asks and what it costs. Knows nothing of how they are done, so that help is quick."""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.experiments.experiment import Experiment


@dataclass(frozen=True)
class Entry:
    """An experiment in the list of experiments."""

    title: str
    asks: str
    """The question, one sentence or two."""
    minutes: int
    """What it is made to take with three seeds on two cores, nothing found of other experiments."""

    def load(self, name: str) -> "Experiment":
        """Imports the experiment."""
        return import_module(f"jobs.experiments.{name}").EXPERIMENT


CATALOGUE = {
    "forgetting": Entry(
        "Forgetting",
        "Is the routed pool as good on new tasks as multi-task training on all data at once, and does it keep the base's "
        "abilities? Six tasks in two orders, beside sequential fine-tuning, replay of 5 %, EWC, and multi-task training with "
        "and without base data.",
        40,
    ),
    "scale": Entry(
        "A growing number of tasks",
        "What becomes of accuracy, routing, base abilities and seconds at 5, 10, 20, 50 and 100 trained tasks that are easily "
        "confused?",
        40,
    ),
    "resemblance": Entry(
        "Tasks that resemble one another",
        "How many prompts go astray where tasks are near-duplicates, related, unrelated, or alike to what the base can do?",
        20,
    ),
    "transfer": Entry(
        "Transfer between modalities",
        "What does a task that was learned in text alone give on pictures, and the other way round, by each method?",
        25,
    ),
    "robustness": Entry(
        "Robustness",
        "What do few or many rows, imbalance, wrong labels, other words, other pictures, several pictures or turns, and "
        "prompts of no task do to accuracy and routing?",
        20,
    ),
    "ablation": Entry(
        "Ablation",
        "Which settings of experts and routers matter: rank, Linears, router steps, temperature, k, features, null components, "
        "covariance?",
        35,
    ),
}
"""All experiments, in the order in which `all` does them: later ones find experts of earlier ones."""


def described() -> list[str]:
    """Returns the lines of the help that say what each experiment asks and costs."""
    lines = ["Experiments (minutes: three seeds on two cores; experts that an earlier one has trained are found):", ""]
    for name, entry in CATALOGUE.items():
        lines += [f"{name}  ({entry.minutes} minutes)", f"    {entry.asks}"]
    return lines
