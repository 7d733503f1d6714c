import torch

from pipeline.routing.null import components, read_null, write_null

F = 6


def groups(*centres: float, count: int = 50) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.cat([centre + torch.randn(count, F, generator=random) for centre in centres])


def test_groups_of_prompts_become_components():
    actual = components(groups(-30, 0, 30), 3)
    assert [component.count for component in actual] == [50, 50, 50]
    assert sorted(round(float(component.mean_F.mean())) for component in actual) == [-30, 0, 30]


def test_together_they_are_all_prompts():
    x_NF = groups(0, 2, 5)
    for count in (1, 4, 12):
        actual = components(x_NF, count)
        assert len(actual) <= count
        total = sum(actual[1:], start=actual[0])
        assert total.count == 150
        torch.testing.assert_close(total.mean_F, x_NF.double().mean(0))


def test_the_same_prompts_make_the_same_components():
    first = components(groups(0, 3), 4)
    torch.manual_seed(3)
    for one, other in zip(first, components(groups(0, 3).flip(0), 4), strict=True):
        assert one.mean_F.equal(other.mean_F)


def test_components_count_their_pictures():
    image_N = torch.arange(20).repeat_interleave(5)
    ids_N2 = torch.stack([image_N, 100 + torch.arange(100)], 1)
    actual = components(groups(-9, 9), 2, ids_N2)
    assert [(component.count, component.independent) for component in actual] == [(50, 10), (50, 10)]
    assert sum(actual[1:], start=actual[0]).independent == 20


def test_there_are_no_more_components_than_distinct_prompts():
    x_NF = groups(0, count=3)
    assert len(components(x_NF.repeat(5, 1), 12)) == 3
    assert len(components(x_NF[:1], 12)) == 1
    assert len(components(x_NF[:1].repeat(40, 1), 12)) == 1


def test_a_file_gives_back_what_was_written(tmp_path):
    null, (observed,) = components(groups(-9, 9), 2), components(groups(4), 1)
    write_null(tmp_path / "null.safetensors", null, {"layer.q": observed})
    actual, layer_statistics = read_null(tmp_path / "null.safetensors")
    for one, other in zip([*actual, layer_statistics["layer.q"]], [*null, observed], strict=True):
        assert (one.count, one.independent) == (other.count, other.independent)
        assert one.mean_F.equal(other.mean_F)
        torch.testing.assert_close(one.scatter_FF, other.scatter_FF, rtol=1e-6, atol=0)
