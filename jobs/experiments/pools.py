"""Pools made of a learned one: some of its experts, in their order, with the same base prompts or without them."""

from collections.abc import Sequence

from pipeline.config import digest
from pipeline.evaluation.results import Evaluation
from pipeline.learning.session import StreamSession
from pipeline.routing.pool import Pool


def part(pool: Pool, names: Sequence[str], *, null: bool = True) -> Pool:
    """Returns the pool of these experts; without `null` prompts far from all tasks go to the base."""
    for name in set(pool.names) - set(names):
        pool = pool.remove(name)
    if null:
        return pool
    return Pool(pool.base_label, pool.base_fingerprint, pool.router, pool.experts.entries.values())


def key_of(session: StreamSession, pool: Pool) -> str:
    """Returns the pool's name, as learning, comparing and the benchmarks give it."""
    key = session.pool_key(pool)
    return key if pool.null else digest(key, "no null expert")


def routed(session: StreamSession, pool: Pool, on: Sequence[str], who: str) -> Evaluation:
    """Evaluates a pool whose router chooses."""
    folder = None
    if pool.router.kind != "prompt":
        folder = pool.save(session.folder / "pools" / key_of(session, pool))
    return session.evaluate(on, pool, key_of(session, pool), folder=folder, samples=0, who=who)


def oracle(session: StreamSession, pool: Pool, on: Sequence[str], who: str = "oracle routing") -> Evaluation:
    """Evaluates a pool in which each task's prompts go to its expert, all others to the base."""
    return session.evaluate(on, pool, digest(key_of(session, pool)), "oracle", samples=0, who=who)


def alone(session: StreamSession, pool: Pool, name: str, on: Sequence[str]) -> Evaluation:
    """Evaluates one expert of a pool on everything."""
    single = part(pool, [name])
    return session.evaluate(
        on, single, digest(key_of(session, single), "single"), "single", samples=0, who=f"{name} alone"
    )


def share_to(evaluation: Evaluation, column: str, expert: str) -> float:
    """Returns the share of a column's prompts that an expert, or `base`, has answered."""
    answered = evaluation.results[column].experts
    return answered.get(expert, 0) / sum(answered.values())
