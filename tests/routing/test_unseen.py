"""Tasks that never saw a picture, or always did, asked the other way: against densities of the parts that they have seen."""

import math

import pytest
import torch
from scipy.stats import multivariate_t
from torch import Tensor

from pipeline.evaluation.choices import format_candidates
from pipeline.routing.call import Decision
from pipeline.routing.coarse import coarse_statistics
from pipeline.routing.features import text_width
from pipeline.routing.insight import Explanation, rank_candidates
from pipeline.routing.prompt_router import MANY, PromptRouter
from pipeline.routing.routes import NULL_EXPERT
from pipeline.routing.statistics import PromptStatistics

F = 20
TEXT = text_width(F)
SHRINKAGE = 0.05


def drawn(words: int, picture: int | None, count: int = 60, *, seed: int = 0, width: int = F) -> Tensor:
    """Prompts with these words, and with pictures of this kind or none."""
    random = torch.Generator().manual_seed(100 * seed + 10 * words + (picture or 0))
    text = text_width(width)
    centres = torch.Generator().manual_seed(5)
    words_WT, pictures_PI = torch.randn(40, text, generator=centres), torch.randn(40, width - text, generator=centres)
    x_NF = torch.zeros(count, width)
    x_NF[:, :text] = words_WT[words] + 0.2 * torch.randn(count, text, generator=random)
    if picture is not None:
        x_NF[:, text:] = pictures_PI[picture] + 0.2 * torch.randn(count, width - text, generator=random)
    return x_NF


def known(*prompts: Tensor) -> PromptStatistics:
    return PromptStatistics.of(torch.cat(prompts), quantile=0.99)


WRITTEN, SEEN, BOTH = known(drawn(0, None)), known(drawn(1, 1)), known(drawn(2, None), drawn(2, 2))
NULL = tuple(PromptStatistics.of(drawn(words, picture)) for words, picture in ((10, 10), (11, 11), (12, None)))


@pytest.fixture(scope="module")
def router() -> PromptRouter:
    return PromptRouter([WRITTEN, SEEN, BOTH], NULL, shrinkage=SHRINKAGE)


def test_prompts_with_an_image_are_counted() -> None:
    assert (WRITTEN.with_image, SEEN.with_image, BOTH.with_image) == (0, 60, 60)
    assert (WRITTEN + BOTH).with_image == 60
    assert (WRITTEN + NULL[0]).with_image is None
    assert coarse_statistics(known(drawn(0, None, width=300))).with_image == 0


def test_a_picture_with_a_text_tasks_question_reaches_its_expert(router: PromptRouter) -> None:
    for picture in (10, 11):
        assert router.choices(drawn(0, picture, seed=1)).tolist() == [0] * 60


def test_a_question_of_a_task_with_pictures_reaches_its_expert_without_one(router: PromptRouter) -> None:
    assert router.choices(drawn(1, None, seed=1)).tolist() == [1] * 60


def test_all_others_stay_where_they_were(router: PromptRouter) -> None:
    for words, picture, choice in ((0, None, 0), (1, 1, 1), (2, None, 2), (2, 2, 2)):
        assert router.choices(drawn(words, picture, seed=1)).tolist() == [choice] * 60
    for words, picture in ((10, 10), (11, 11), (12, None), (10, 11), (11, 10), (12, 10), (10, None)):
        assert router.choices(drawn(words, picture, seed=1)).tolist() == [NULL_EXPERT] * 60
    for words, picture in ((20, 10), (21, None)):  # words that nobody knows
        assert (router.choices(drawn(words, picture, seed=1)) == NULL_EXPERT).double().mean() > 0.9


def test_it_is_the_density_of_the_text_and_that_of_base_images(router: PromptRouter) -> None:
    classes = [WRITTEN, SEEN, BOTH, *NULL]
    count = sum(c.count for c in classes)
    within_FF = sum(c.scatter_FF for c in classes) / count
    everything_NF = torch.cat(
        [drawn(*case) for case in ((0, None), (1, 1), (2, None), (2, 2), (10, 10), (11, 11), (12, None))]
    ).double()
    variance_F = everything_NF.var(0, correction=0)
    scale_F = (variance_F + 1e-6 * variance_F.mean() + 1e-12 * (1 + everything_NF.mean(0).square())).sqrt()
    prior = 0.4 * F

    def log_density(c: PromptStatistics, part: slice, x_NF: Tensor) -> Tensor:
        blended_FF = (c.scatter_FF * c.independent / c.count + prior * within_FF) / (c.independent + prior)
        shape_FF = (1 - SHRINKAGE) * blended_FF / torch.outer(scale_F, scale_F) + SHRINKAGE * torch.eye(F)
        shape_FF = (1 + 1 / c.independent) * shape_FF
        t = multivariate_t((c.mean_F / scale_F)[part].numpy(), shape_FF[part, part].numpy(), df=c.independent + prior)
        return torch.from_numpy(t.logpdf((x_NF.double() / scale_F)[:, part].numpy()))

    x_NF, text, image = drawn(0, 10, 8, seed=2), slice(0, TEXT), slice(TEXT, F)
    images_KN = torch.stack([log_density(c, image, x_NF) for c in NULL])
    expected_N = log_density(WRITTEN, text, x_NF) + images_KN.logsumexp(0) - math.log(len(NULL))
    scores_NC = router.scores(x_NF)
    other_N = log_density(SEEN, slice(0, F), x_NF)  # scores have one constant in common
    constant = F / 2 * math.log(math.pi)
    torch.testing.assert_close(scores_NC[:, 1] - constant, other_N, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores_NC[:, 0] - constant, expected_N, rtol=1e-4, atol=1e-3)


def test_without_base_prompts_nothing_is_known_of_images() -> None:
    router = PromptRouter([WRITTEN, SEEN, BOTH])
    assert router.choices(drawn(0, 10, seed=1)).tolist() == [NULL_EXPERT] * 60
    assert router.choices(drawn(0, None, 40, seed=1)).tolist().count(0) >= 36


@pytest.mark.parametrize("width", [F, 300])
def test_where_no_base_prompt_has_an_image_thresholds_decide_prompts_with_one(width: int) -> None:
    """Base prompts of text alone say nothing of pictures: the nearest expert must not get all of them."""
    count = MANY + 4 if width == 300 else 4
    experts = [known(drawn(number, number, 200, width=width)) for number in range(count)]
    null = tuple(PromptStatistics.of(drawn(words, None, width=width)) for words in (30, 31))
    router = PromptRouter(experts, null)
    assert (router.few is not None) == (width == 300)
    for number in (0, 3):
        assert router.choices(drawn(number, number, 40, seed=1, width=width)).tolist().count(number) >= 36
    for words, picture in ((30, 30), (31, 0), (30, 3), (33, 34)):
        assert router.choices(drawn(words, picture, 40, seed=1, width=width)).tolist() == [NULL_EXPERT] * 40
    assert router.choices(drawn(30, None, 40, seed=1, width=width)).tolist() == [NULL_EXPERT] * 40
    experts_BM, posterior_BM = router.rank_candidates(drawn(33, 34, 4, seed=1, width=width), 3)
    assert experts_BM[:, 0].tolist() == [NULL_EXPERT] * 4
    assert posterior_BM[:, 0].exp().tolist() == [1.0] * 4


def test_statistics_that_do_not_say_are_taken_as_they_are() -> None:
    silent, x_BF = PromptStatistics.of(drawn(0, None)), drawn(0, 10, 5, seed=1)
    assert silent.with_image is None
    router = PromptRouter([silent, SEEN], NULL)
    assert router.gaussians is not None
    torch.testing.assert_close(router.scores(x_BF)[:, :2], router.gaussians.scores(x_BF, torch.arange(2).expand(5, 2)))


def test_it_is_said(router: PromptRouter) -> None:
    """Whoever is judged by text alone has no distance: of what it never saw it would be endless."""
    x_BF, names = torch.cat([drawn(0, 10, 1, seed=1), drawn(0, None, 1, seed=1)]), ["written", "seen", "both"]
    there, here = (listed[0] for listed in rank_candidates(router, names, x_BF, [{}, {}]))
    assert (there.name, there.by_text, there.distance, there.inside) == ("written", True, None, None)
    assert (here.name, here.by_text, here.inside) == ("written", False, True)
    assert "written 100.0% (by text alone)" in format_candidates([there])
    decision = Decision("written", {"written": 1.0}, 1.0)
    ranked = rank_candidates(router, names, x_BF, [{}, {}])
    assert Explanation(decision, ranked[0], {}, tuple(names)).reason.startswith(
        "written: 100.0% likely, by the text alone, since it never saw prompts of this kind, before "
    )
    assert "alone" not in Explanation(decision, ranked[1], {}, tuple(names)).reason


def test_the_same_alone_and_among_others(router: PromptRouter) -> None:
    x_BF = torch.cat(
        [drawn(0, 10, 3, seed=3), drawn(1, None, 3, seed=3), drawn(2, 2, 3, seed=3), drawn(10, 10, 3, seed=3)]
    )
    together_BC = router.scores(x_BF)
    alone_BC = torch.cat([router.scores(x_1F) for x_1F in x_BF.split(1)])
    torch.testing.assert_close(alone_BC, together_BC, rtol=1e-9, atol=1e-7)


def test_among_many_experts_as_among_few() -> None:
    """As many as are tried in few features first."""
    width = 300
    text_only = [known(drawn(number, None, width=width)) for number in range(8)]
    others = [known(drawn(number, number, width=width)) for number in range(8, MANY + 4)]
    null = tuple(PromptStatistics.of(drawn(w, w, width=width)) for w in (30, 31))
    router = PromptRouter([*text_only, *others], null)
    assert router.few is not None
    for number in (0, 5):
        assert router.choices(drawn(number, 30, 20, seed=1, width=width)).tolist() == [number] * 20
    again = router.remove(0).insert(0, text_only[0])
    assert again.choices(drawn(0, 30, 20, seed=1, width=width)).tolist() == [0] * 20
    assert router.choices(drawn(30, 31, 20, seed=1, width=width)).tolist() == [NULL_EXPERT] * 20
    assert router.choices(drawn(12, None, 20, seed=1, width=width)).tolist() == [12] * 20
