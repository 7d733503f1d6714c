"""Descriptions of versions, in Markdown: what one reads on a version's page.

Lists of versions show its first words as they stand: plain text that tells one version from another.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.registry.names import expert_name
from pipeline.registry.scores import Score, base_kept, mean_accuracy

if TYPE_CHECKING:  # looking at descriptions takes no torch
    from pipeline.routing.expert import ExpertCard

LONGEST = 4900
"""Most characters of a description: MLflow's databases keep 5,000."""

DESCRIBED = "Sample prompts:"
"""Words of a description that has samples: it was written after an evaluation."""

GAP = "&emsp;"
"""An em space: MLflow's pages set tables without any space between columns, and cut off the character itself."""

_CELL = 160
"""Most characters of a question or an answer."""


@dataclass(frozen=True)
class Answered:
    """A sample prompt with its answer."""

    dataset: str
    """Task or base ability that it belongs to."""
    question: str
    answer: str
    expert: str
    """Who answered: an expert, or `base`."""
    correct: bool


@dataclass(frozen=True)
class Origin:
    """How a version came to be."""

    command: str = ""
    """The command line."""
    commit: str | None = None
    """Commit of the code."""
    run: str = ""
    """Address of the MLflow run within MLflow's pages."""
    data: str = ""
    """Where an expert's training rows lie."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation of a pool has shown."""

    scores: Sequence[Score] = ()
    own: Mapping[str, float] = field(default_factory=dict)
    """Share of each data set's prompts that were routed to its expert, or to the base."""
    samples: Sequence[Answered] = ()


def expert_description(
    base_label: str,
    card: "ExpertCard",
    *,
    rows: int | None = None,
    score: Score | None = None,
    samples: Sequence[Answered] = (),
    origin: Origin | None = None,
) -> str:
    """Describes an expert: what it is, how well it does its task, what it has learned from."""
    learned = f"{card.samples:,} samples" + (f" of {rows:,} rows" if rows else "")
    trained = f"Trained on {learned}, with seed {card.seed}."
    if (source := card.trained_with.get("adapter")) is not None:
        trained = f"Its LoRA was trained elsewhere ({_text(str(source))})" + (
            f"; its routing was learned from {rows:,} rows." if rows else "."
        )
    parts = [
        f"LoRA of rank {card.rank} for task `{card.task}` over base `{base_label}`, with its routing vectors and the "
        f"statistics of its prompts. {trained}"
    ]
    if score is not None:
        base = "" if score.base_accuracy is None else f"; the base alone has {score.base_accuracy:.3f}"
        parts.append(f"Accuracy on its evaluation prompts, in the pool that it joined: **{score.accuracy:.3f}**{base}.")
    parts += _samples(samples)
    parts += _origin(origin)
    return _within([parts])


def pool_description(
    base_label: str,
    name: str,
    experts: Mapping[str, int],
    router: str,
    *,
    retired: Sequence[str] = (),
    measured: Measured | None = None,
    verdict: str = "",
    origin: Origin | None = None,
) -> str:
    """Describes a pool: its experts by name and version, accuracies and routing, samples, and whether it was promoted."""
    count = f"{len(experts)} expert{'s' * (len(experts) != 1)}"
    parts = [
        f"{count} behind router `{router}` over base `{base_label}`: pool `{name}`. A prompt is answered by the expert of the "
        "task that it resembles, or by the frozen base."
    ]
    if retired:
        parts.append(f"**Retired:** {', '.join(retired)}; the base answers in their place.")
    if verdict:
        parts.append(f"**Promotion:** {verdict}")
    tail = _origin(origin)
    if measured is None:
        listed = ", ".join(f"[{e}](#/models/{expert_name(base_label, e)}/versions/{v})" for e, v in experts.items())
        return _within([parts, ["Not evaluated yet.", f"Experts: {listed}"], tail])
    accuracy, kept = mean_accuracy(measured.scores), base_kept(measured.scores)
    overall = [f"mean accuracy on its tasks **{accuracy:.3f}**"] if accuracy is not None else []
    overall += [f"base abilities kept **{kept:.1%}**"] if kept is not None else []
    parts.append((", ".join(overall) or "no scores").capitalize() + ".")
    samples = _samples(measured.samples)
    room = LONGEST - sum(len(part) + 2 for part in (*parts, *samples, *tail))
    table = "\n".join(_table(base_label, experts, measured, room))
    return _within([parts, [table], samples, tail])


def _table(base_label: str, experts: Mapping[str, int], measured: Measured, room: int) -> Iterator[str]:
    """Yields the lines of the table of accuracies that `room` characters hold, tasks first."""
    scores = sorted(measured.scores, key=lambda score: score.ability)
    lines = [f"| {GAP} | base{GAP} | this pool{GAP} | routed as it should |", "|---|---|---|---|"]
    yield from lines
    used = sum(len(line) + 1 for line in lines)
    for i, score in enumerate(scores):
        name = score.dataset
        if not score.ability and name in experts:
            name = f"[{name}](#/models/{expert_name(base_label, name)}/versions/{experts[name]})"
        base = "" if score.base_accuracy is None else f"{score.base_accuracy:.3f}"
        share = f"{measured.own[score.dataset]:.1%}" if score.dataset in measured.own else ""
        line = f"| {name}{GAP} | {base}{GAP} | {score.accuracy:.3f}{GAP} | {share} |"
        used += len(line) + 1
        if used + 60 > room:
            yield f"| ... and {len(scores) - i} more, in the run's report | | | |"
            return
        yield line


def _samples(samples: Iterable[Answered]) -> list[str]:
    lines = [
        f"- {_text(s.question)} → **{_text(s.answer) or '(nothing)'}** ({s.expert}{'' if s.correct else '; wrong'})"
        for s in samples
    ]
    return [f"{DESCRIBED}\n\n" + "\n".join(lines)] if lines else []


def _origin(origin: Origin | None) -> list[str]:
    if origin is None:
        return []
    parts = [f"Learned from `{origin.data}`."] if origin.data else []
    parts += [f"Made by `{origin.command}`" + (f", commit {origin.commit[:9]}." if origin.commit else ".")] * bool(
        origin.command
    )
    parts += [f"[Its run]({origin.run}) has curves, configuration and report."] if origin.run else []
    return [" ".join(parts)] if parts else []


def _text(text: str) -> str:
    """Returns a text on one line, as it stands: nothing in it is Markdown."""
    line = " ".join(text.split())
    line = line if len(line) <= _CELL else line[: _CELL - 3] + "..."
    return "".join(f"\\{c}" if c in r"\`*_{}[]()<>#+!|~" else c for c in line)


def _within(sections: Sequence[Sequence[str]]) -> str:
    """Joins paragraphs to at most LONGEST characters."""
    text = "\n\n".join(part for section in sections for part in section if part)
    return text if len(text) <= LONGEST else text[: LONGEST - 4] + "\n..."
