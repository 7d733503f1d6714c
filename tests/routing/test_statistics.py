import pytest
import torch

from pipeline.routing.statistics import PromptStatistics, shrunk_cholesky

F = 12


def features(seed: int, count: int = 60, centre: float = 0.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    mixing_FF = torch.randn(F, F, generator=random)
    return centre + torch.randn(count, F, generator=random) @ mixing_FF


def test_they_are_count_mean_and_scatter():
    x_NF = features(0, centre=3.0)
    actual = PromptStatistics.of(x_NF)
    assert actual.count == 60
    assert actual.mean_F.dtype == actual.scatter_FF.dtype == torch.float64
    torch.testing.assert_close(actual.mean_F, x_NF.double().mean(0))
    torch.testing.assert_close(actual.scatter_FF / actual.count, torch.cov(x_NF.double().T, correction=0))
    assert actual.threshold == float("inf")


def test_they_add_up_in_any_order():
    parts = [features(seed, count) for seed, count in enumerate((10, 33, 5))]
    whole = PromptStatistics.of(torch.cat(parts))
    a, b, c = (PromptStatistics.of(part) for part in parts)
    for total in (a + b + c, c + (b + a)):
        assert total.count == whole.count
        torch.testing.assert_close(total.mean_F, whole.mean_F, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(total.scatter_FF, whole.scatter_FF, rtol=1e-10, atol=1e-10)


def test_distance_is_the_shrunk_mahalanobis_distance_per_feature():
    x_NF, y_NF = features(0).double(), features(1, 4).double()
    found_N = PromptStatistics.of(x_NF).distance(y_NF, shrinkage=0.1)
    covariance_FF = torch.cov(x_NF.T, correction=0)
    variance_F = covariance_FF.diagonal()
    scale_F = (variance_F + 1e-3 * variance_F.mean() + 1e-12).sqrt()
    standard_FF = 0.9 * covariance_FF / torch.outer(scale_F, scale_F) + 0.1 * torch.eye(F, dtype=torch.float64)
    z_NF = (y_NF - x_NF.mean(0)) / scale_F
    expected_N = torch.stack([z_F @ torch.linalg.inv(standard_FF) @ z_F for z_F in z_NF]) / F
    torch.testing.assert_close(found_N, expected_N)


def test_the_shrunk_factor_squares_to_the_mixture():
    covariance_FF = torch.cov(features(0).double().T, correction=0)
    scale_F = torch.linspace(1, 2, F, dtype=torch.float64)
    factor_FF = shrunk_cholesky(covariance_FF, scale_F, 0.2)
    mixture_FF = 0.8 * covariance_FF / torch.outer(scale_F, scale_F) + 0.2 * torch.eye(F, dtype=torch.float64)
    torch.testing.assert_close(factor_FF @ factor_FF.T, mixture_FF)
    assert factor_FF.triu(1).abs().max() == 0


def test_the_threshold_holds_for_new_prompts_of_the_same_task():
    x_NF = features(0, 1200)
    actual = PromptStatistics.of(x_NF[:600], quantile=0.9)
    inside = (actual.distance(x_NF[600:]) <= actual.threshold).float().mean()
    assert 0.84 < inside < 0.96
    assert (actual.distance(x_NF[600:] + 50) > actual.threshold).all()


def test_a_larger_quantile_is_a_larger_threshold():
    thresholds = [PromptStatistics.of(features(0), quantile=q).threshold for q in (0.6, 0.9, 0.99)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < thresholds[-1]


def test_a_threshold_needs_four_prompts():
    with pytest.raises(ValueError, match="3 prompts are too few to calibrate a threshold; at least 4 are needed"):
        PromptStatistics.of(features(0, 3), quantile=0.9)
    assert PromptStatistics.of(features(0, 4), quantile=0.9).threshold > 0


def test_features_that_never_vary_keep_others_away():
    x_NF = features(0, 200)
    x_NF[:, :4] = 0  # the image part of a text-only task
    actual = PromptStatistics.of(x_NF, quantile=0.99)
    assert (actual.distance(x_NF) <= actual.threshold).float().mean() > 0.97
    y_NF = x_NF.clone()
    y_NF[:, :4] = 1
    assert (actual.distance(y_NF) > actual.threshold).all()


@pytest.mark.parametrize("size", [0.0, 0.1, 30.0, 1000.0])
def test_prompts_that_are_all_the_same_have_distances(size):
    x_NF = (size * features(0, 1)).expand(64, F)
    actual = PromptStatistics.of(x_NF, quantile=0.99)
    assert actual.distance(x_NF).isfinite().all()
    assert (actual.distance(x_NF + 1 + size) > actual.threshold).all()


@pytest.mark.parametrize("count", [100, 200])
def test_the_threshold_of_few_prompts_read_many_times_holds_for_new_ones(count):
    """Each pass rounds in its own way; the width is above the number of prompts, as in real tasks."""
    wide = 160
    for seed in range(4):
        random = torch.Generator().manual_seed(seed)
        mixing_FF = torch.randn(wide, wide, generator=random)
        x_NF = 3 + torch.randn(count + 2000, wide, generator=random) @ mixing_FF
        seen_NF = x_NF[:count].repeat(16, 1)
        seen_NF = seen_NF * (1 + 1e-7 * torch.randn(seen_NF.shape, generator=random))
        actual = PromptStatistics.of(seen_NF, same(torch.arange(count).repeat(16)), quantile=0.99)
        assert (actual.count, actual.independent) == (16 * count, count)
        assert (actual.distance(x_NF[count:]) <= actual.threshold).float().mean() > 0.97
        assert (actual.distance(x_NF[count:] + 30) > actual.threshold).all()


@pytest.mark.parametrize("images", [20, 80])
def test_the_threshold_of_several_questions_about_each_picture_holds_for_new_pictures(images):
    random = torch.Generator().manual_seed(images)
    image_PF = torch.randn(images + 500, 120, generator=random)
    question_QF = torch.randn(400 + 500, 40, generator=random)
    image_N = torch.arange(images).repeat_interleave(5)
    seen_NF = torch.cat([image_PF[image_N], question_QF[: len(image_N)]], 1)
    new_NF = torch.cat([image_PF[images:], question_QF[400:]], 1)
    ids_N2 = torch.stack([image_N, 1000 + torch.arange(len(image_N))], 1)
    actual = PromptStatistics.of(seen_NF, ids_N2, quantile=0.99)
    assert (actual.count, actual.independent) == (5 * images, images)
    assert (actual.distance(new_NF) <= actual.threshold).float().mean() > 0.97
    assert (actual.distance(new_NF + 30) > actual.threshold).all()
    careless = PromptStatistics.of(seen_NF, quantile=0.99)
    assert (careless.distance(new_NF) <= careless.threshold).float().mean() < 0.5
    back = torch.randperm(len(seen_NF), generator=random)
    again = PromptStatistics.of(seen_NF[back], ids_N2[back], quantile=0.99)
    assert again.threshold == pytest.approx(actual.threshold)


def same(prompt_N):
    return torch.stack([prompt_N, prompt_N], 1)


def test_the_threshold_of_many_prompts_is_their_quantile():
    x_NF = features(0, 6000)
    actual = PromptStatistics.of(x_NF[:4000], quantile=0.99)
    assert 0.985 < (actual.distance(x_NF[4000:]) <= actual.threshold).float().mean() < 0.996
