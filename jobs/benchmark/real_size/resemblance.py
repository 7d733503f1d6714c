"""Tasks that resemble base abilities, and one another: how many held-out prompts reach the right expert, or the base.

Ten tasks a stream, statistics of 800 prompts per task and of 200 base prompts a family. Choices (priors, components)
were made on the tuned stream; `own` and `base` are of the other one.
"""

from jobs.benchmark.real_size.lookalikes import REPORTED, TUNED
from jobs.benchmark.real_size.readings import DEMO, own_and_base, routed_right


def measure() -> dict[str, float]:
    """Returns `own` and `base` of the reported stream, the same of the tuned one, and each task and family as reported."""
    reported, tuned = routed_right(tuple(REPORTED)), own_and_base(routed_right((*DEMO, *TUNED)))
    shares = {f"reported.{name}": share for name, share in reported.items() if share < 1}
    return own_and_base(reported) | {f"tuned_{name}": share for name, share in tuned.items()} | shares
