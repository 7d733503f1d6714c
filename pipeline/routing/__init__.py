"""The heart: experts, how prompts and layers choose among them, and the Linear that mixes them.

Knows torch and PEFT's file format; knows nothing of Ray, MLflow or DeepSpeed. From a notebook:

    pool = Pool.load("runs/demo/pool")
    routed = RoutedModel(model, pool)
    with routed.call() as call:
        routed.model.generate(**inputs)      # the router has chosen
    call.decisions                           # which expert answers each row
    routed.load(pool.remove("clock"))        # another pool, the same model
    insight.explain(routed, inputs)          # why
"""

from pipeline.routing.adapters import ExpertError
from pipeline.routing.call import Call, Decision
from pipeline.routing.expert import Expert, ExpertCard
from pipeline.routing.pool import Pool, PoolCard, PoolError
from pipeline.routing.routed_model import RoutedModel
from pipeline.routing.statistics import PromptStatistics

__all__ = [
    "Call",
    "Decision",
    "Expert",
    "ExpertCard",
    "ExpertError",
    "Pool",
    "PoolCard",
    "PoolError",
    "PromptStatistics",
    "RoutedModel",
]
