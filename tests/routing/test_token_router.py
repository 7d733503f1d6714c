import pytest
import torch
from torch.nn.functional import layer_norm

from pipeline.routing.token_router import keep_largest, normalise_vector, token_scores

T, D, E = 7, 24, 5


@pytest.fixture(scope="module")
def x_TD():
    return 3 * torch.randn(T, D, generator=torch.Generator().manual_seed(0)) + 2


@pytest.fixture(scope="module")
def v_ED():
    return torch.randn(E, D, generator=torch.Generator().manual_seed(1)) - 1


def weights(x_TD, v_ED, *, top_k, temperature):
    products_TE = x_TD @ torch.stack([normalise_vector(v_D) for v_D in v_ED]).T
    return keep_largest(token_scores(products_TE, x_TD) / temperature, top_k)


def scores(x_TD, v_ED, temperature):
    """z_te = <LN(x_t), LN(v_e)> / (sqrt(D) temperature), as it stands."""
    x_TD, v_ED = layer_norm(x_TD, (D,), eps=1e-5), layer_norm(v_ED, (D,), eps=1e-5)
    return torch.stack([torch.stack([x @ v for v in v_ED]) for x in x_TD]) / (D**0.5 * temperature)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_all_experts_get_the_softmax_of_the_published_score(x_TD, v_ED, temperature):
    actual = weights(x_TD, v_ED, top_k=E, temperature=temperature)
    torch.testing.assert_close(actual, scores(x_TD, v_ED, temperature).softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_softmax_runs_over_the_k_largest(x_TD, v_ED, top_k):
    z_TE = scores(x_TD, v_ED, 0.7)
    expected_TE = torch.zeros(T, E)
    for t in range(T):
        best = sorted(range(E), key=lambda e: -z_TE[t, e])[:top_k]
        expected_TE[t, best] = z_TE[t, best].softmax(-1)
    found_TE = weights(x_TD, v_ED, top_k=top_k, temperature=0.7)
    torch.testing.assert_close(found_TE, expected_TE, rtol=0, atol=1e-6)
    assert ((found_TE > 0).sum(-1) == top_k).all()


def test_more_than_all_is_all(x_TD, v_ED):
    actual = weights(x_TD, v_ED, top_k=E + 3, temperature=1.0)
    assert actual.equal(weights(x_TD, v_ED, top_k=E, temperature=1.0))


def test_leading_dimensions_do_not_matter(x_TD, v_ED):
    stacked = weights(torch.stack([x_TD, x_TD.flip(0)]), v_ED, top_k=2, temperature=1.0)
    alone = weights(x_TD, v_ED, top_k=2, temperature=1.0)
    torch.testing.assert_close(stacked, torch.stack([alone, alone.flip(0)]))


def test_neither_scale_nor_offset_of_a_token_or_vector_matters(x_TD, v_ED):
    plain = weights(x_TD, v_ED, top_k=E, temperature=1.0)
    moved = weights(5 * x_TD + 3, 2 * v_ED - 1, top_k=E, temperature=1.0)
    torch.testing.assert_close(plain, moved, rtol=0, atol=1e-4)


def test_a_zero_vector_scores_zero(x_TD, v_ED):
    found_TE = weights(x_TD, torch.zeros(2, D), top_k=2, temperature=1.0)
    assert found_TE.equal(torch.full((T, 2), 0.5))
