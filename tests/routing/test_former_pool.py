"""A pool as an earlier release wrote it, but for the number of the feature rule: it loads, and is written by today's names."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.routing import Pool
from pipeline.routing.null import null_digest
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routes import NULL_EXPERT

BEFORE = Path(__file__).parent / "before" / "pool"
PATH = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def pool() -> Pool:
    return Pool.load(BEFORE)


def test_it_holds_what_it_held(pool: Pool) -> None:
    assert pool.names == ["names", "letters"]
    assert (pool.router.token_scores, pool.router.candidates, pool.router.feature_width) == ("phatgoose", 2, 24)
    assert (
        null_digest(pool.null, pool.null_layer_statistics)
        == "e26c56b20240af09dd57bee1dcf872be670457e41cf1bb498d7ca97a0f8d2469"
    )
    statistics = [expert.statistics for expert in pool.experts.values()]
    assert [s.threshold for s in statistics] == pytest.approx([55.80400903965291, 103.70226215745095])
    assert [float(s.mean_F.sum()) for s in statistics] == pytest.approx([-4.018950319848955, -4.145288342299561])
    layers = [expert.layer_statistics[PATH] for expert in pool.experts.values()]
    assert [float(s.mean_F.sum()) for s in layers] == pytest.approx([-2.751995705999434, -1.516868458944373])


def test_it_chooses_by_what_it_holds(pool: Pool) -> None:
    statistics = [expert.statistics for expert in pool.experts.values()]
    router = PromptRouter(statistics, pool.null)
    centres_CF = torch.stack([s.mean_F for s in (*statistics, *pool.null)])
    assert router.choices(centres_CF).tolist() == [0, 1, NULL_EXPERT, NULL_EXPERT]


def test_it_is_written_by_todays_names(pool: Pool, tmp_path: Path) -> None:
    card = json.loads((pool.export(tmp_path / "pool") / "pool.json").read_text())
    assert card["router"]["token_scores"] == "phatgoose"
    assert "short_list" not in card["router"]
    again = Pool.load(tmp_path / "pool")
    assert torch.equal(again.experts["names"].statistics.mean_F, pool.experts["names"].statistics.mean_F)
    assert again.router == pool.router
