import pytest

from pipeline.registry.names import Named, base_name, expert_name, pool_name, read_name


@pytest.mark.parametrize("base", ["tiny", "InternVL3_5-8B", "llava-v1.6.mistral"])
def test_names_are_read_as_they_are_written(base: str) -> None:
    assert read_name(expert_name(base, "digits")) == Named("expert", base, "digits")
    assert read_name(pool_name(base, "base")) == Named("pool", base, "base")
    assert read_name(base_name(base)) == Named("base", base, "")


@pytest.mark.parametrize("model", ["tiny", "tiny.experts", "tiny.pool", "iris_model", "tiny.expert.", "a.pool.b.c"])
def test_other_models_are_none_of_ours(model: str) -> None:
    assert read_name(model) is None
