import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save

from pipeline.config import RouterConfig
from pipeline.errors import UserError
from pipeline.routing import ExpertError, Pool, PoolError
from pipeline.routing.adapters import Adapter
from pipeline.routing.call import Routers
from pipeline.routing.null import components
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routes import NULL_EXPERT
from pipeline.routing.serialization import VERSIONS, OutdatedError
from tests.helpers import make_expert


@pytest.fixture(scope="module")
def experts(tiny_base):
    return [make_expert(tiny_base, name, rank=2, seed=i) for i, name in enumerate(("digits", "clock", "later"))]


@pytest.fixture(scope="module")
def null():
    return components(torch.randn(16, 512, generator=torch.Generator().manual_seed(7)), 2)


def make_pool(experts, null=(), **router) -> Pool:
    return Pool("tiny", experts[0].card.base_fingerprint, RouterConfig(**router), experts, null)


def read(folder) -> Pool:
    """Opens a pool and reads all of it."""
    pool = Pool.load(folder)
    for expert in pool.experts.values():
        assert [*expert.adapters.values(), *expert.vectors.values()]
        dict(expert.layer_statistics)
    return pool


def named(file: str) -> str:
    """Matches a file's name in a message, behind its folder or not."""
    return file.replace("/adapter_model", "(/|: )adapter_model").replace("/router", "(/|: )router")


def test_experts_stand_in_order_of_arrival(experts):
    pool = make_pool(experts[:2])
    assert pool.names == ["digits", "clock"]
    assert pool.add(experts[2]).names == ["digits", "clock", "later"]
    assert pool.names == ["digits", "clock"]


def test_an_expert_of_the_same_name_takes_the_others_place(experts, tiny_base):
    newer = make_expert(tiny_base, "digits", rank=3, seed=9)
    pool = make_pool(experts).add(newer)
    assert pool.names == ["digits", "clock", "later"]
    assert pool.experts["digits"] is newer


def test_removing_an_expert_is_never_having_had_it(experts, null):
    removed, without = make_pool(experts, null).remove("clock"), make_pool([experts[0], experts[2]], null)
    assert removed.card == without.card
    assert list(removed.experts.values()) == list(without.experts.values())
    x_BF = torch.randn(8, 512, generator=torch.Generator().manual_seed(8))
    scores = [PromptRouter([e.statistics for e in p.experts.values()], p.null).scores(x_BF) for p in (removed, without)]
    assert scores[0].equal(scores[1])
    with pytest.raises(PoolError, match="no expert 'clock' in the pool; there are: digits, later"):
        removed.remove("clock")


def test_who_answers_other_prompts_does_not_change_when_an_expert_retires(experts, null, tmp_path):
    """However near they are: the retired expert's class stays, and the base answers in its place."""
    x_BF = torch.randn(400, 512, generator=torch.Generator().manual_seed(8))
    for kind in ("prompt", "two_level"):
        for base_prompts in (null, ()):
            pool = make_pool(experts, base_prompts, kind=kind)
            before, retired = Routers(pool).router.choices(x_BF), pool.retire("clock")
            after = Routers(retired).router.choices(x_BF)
            place = pool.names.index("clock")
            assert (before == place).any()
            assert after.equal(before.masked_fill(before == place, NULL_EXPERT)) or kind == "two_level"
            assert after[(before >= 0) & (before != place)].equal(before[(before >= 0) & (before != place)])
            assert not (after == place).any()
            assert Pool.load(retired.save(tmp_path / f"{kind}{len(base_prompts)}")).retired == ("clock",)


def test_a_retired_expert_comes_back_when_it_is_learned_again(experts, tiny_base, tmp_path):
    retired = make_pool(experts).retire("clock")
    assert retired.add(experts[0]).retired == ("clock",)
    assert retired.add(make_expert(tiny_base, "clock", seed=9)).retired == ()
    assert retired.remove("clock").retired == ()
    assert "retired" not in (make_pool(experts).save(tmp_path / "pool") / "pool.json").read_text()
    assert make_pool(experts, kind="token").retire("clock").names == ["digits", "later"]
    with pytest.raises(PoolError, match="no expert 'shapes' in the pool; there are: digits, clock, later"):
        retired.retire("shapes")


def test_the_last_expert_can_go(experts):
    assert make_pool(experts[:1]).remove("digits").names == []
    with pytest.raises(PoolError, match="there are: none"):
        make_pool(experts[:1]).remove("digits").remove("digits")


def test_router_settings_can_be_replaced(experts):
    pool = make_pool(experts, kind="prompt", top_k=3)
    other = pool.routed_by(kind="token", temperature=0.5)
    assert other.router == RouterConfig(kind="token", temperature=0.5, top_k=3)
    assert pool.router == RouterConfig(top_k=3)
    assert other.experts == pool.experts
    with pytest.raises(ValueError, match="temprature"):
        pool.routed_by(temprature=1)


def test_an_expert_of_another_base_is_refused(experts):
    card = experts[0].card.model_copy(update={"base_fingerprint": "0123456789abcdef"})
    stranger = dataclasses.replace(experts[0], card=card)
    with pytest.raises(PoolError, match=r"'digits' was trained on base 0123456789abcdef, this pool's base is"):
        make_pool(experts[1:]).add(stranger)


def test_an_untrained_or_broken_expert_is_refused(experts):
    for factor, output in ((0.0, "never trained"), (float("nan"), "not finite")):
        adapters = {p: Adapter(a.a_RD, a.b_OR * factor, a.scaling) for p, a in experts[0].adapters.items()}
        with pytest.raises(ExpertError, match=output):
            make_pool(experts[1:]).add(dataclasses.replace(experts[0], adapters=adapters))


def test_all_have_the_same_prompt_features(experts, null, tiny_base):
    narrow = make_expert(tiny_base, "narrow", features=torch.randn(16, 64))
    with pytest.raises(
        PoolError, match=r"'narrow' has 64 prompt features, others have 512; .*recompute-statistics.*_width"
    ):
        make_pool(experts).add(narrow)
    with pytest.raises(PoolError, match="64 prompt features, others have 512"):
        make_pool([narrow], null)


@pytest.mark.parametrize("general", [False, True])
def test_a_folder_gives_back_what_was_saved(experts, null, general, tmp_path):
    pool = make_pool(experts, null if general else (), kind="token", top_k=1)
    loaded = Pool.load(pool.save(tmp_path / "deep" / "pool"))
    assert loaded.card.model_dump(exclude={"experts"}) == pool.card.model_dump(exclude={"experts"})
    assert loaded.names == ["digits", "clock", "later"]
    assert loaded.card.null is general
    for name, expert in pool.experts.items():
        assert loaded.experts[name].card == expert.card
        torch.testing.assert_close(
            loaded.experts[name].statistics.scatter_FF, expert.statistics.scatter_FF, rtol=1e-6, atol=0
        )  # kept in float32
    if general:
        for actual, saved in zip(loaded.null, null, strict=True):
            assert actual.count == saved.count
            assert actual.mean_F.equal(saved.mean_F)
            torch.testing.assert_close(actual.scatter_FF, saved.scatter_FF, rtol=1e-6, atol=0)  # kept in float32
    else:
        assert loaded.null == ()


def test_an_empty_pool_has_a_folder_too(experts, tmp_path):
    assert Pool.load(make_pool(experts[:1]).remove("digits").save(tmp_path / "pool")).names == []


def test_saving_again_leaves_nothing_of_the_old_pool(experts, null, tmp_path):
    folder = make_pool(experts, null).save(tmp_path / "pool")
    make_pool(experts[:1]).save(folder)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.glob("**/*") if p.is_dir()) == [
        "experts",
        "experts/digits",
    ]
    assert [p.name for p in folder.glob("*.safetensors")] == []
    assert [p.name for p in tmp_path.iterdir()] == ["pool"]


@pytest.mark.parametrize(
    ("lost", "output"),
    [
        ("pool.json", r"pool: no pool\.json, so not a pool folder"),
        ("null.safetensors", r"null\.safetensors is missing"),
        ("experts/clock/adapter_model.safetensors", r"experts/clock: adapter_model\.safetensors is missing"),
        ("experts/clock/expert.json", r"experts/clock: expert\.json is missing"),
    ],
)
def test_an_incomplete_folder_names_what_is_missing(experts, null, tmp_path, lost, output):
    folder = make_pool(experts, null).save(tmp_path / "pool")
    (folder / lost).unlink()
    with pytest.raises((PoolError, ExpertError), match=output):
        read(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\0", b"[]", b"\x10\0\0\0\0\0\0\0{}"], ids=repr)
@pytest.mark.parametrize(
    "file",
    [
        "pool.json", "null.safetensors", "experts/digits/expert.json", "experts/digits/router.safetensors",
        "experts/digits/adapter_config.json", "experts/digits/adapter_model.safetensors",
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_with_a_remedy(experts, null, tmp_path, file, content):
    folder = make_pool(experts, null).save(tmp_path / "pool")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{named(file)}.* damaged.*; copy the (whole )?folder again"):
        read(folder)


def test_a_file_that_was_cut_off_is_named(experts, null, tmp_path):
    file = make_pool(experts, null).save(tmp_path / "pool") / "experts/digits/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"experts/digits: adapter_model\.safetensors is damaged: \d+ bytes instead of \d+"
    ):
        read(tmp_path / "pool")


@pytest.mark.parametrize("file", ["pool.json", "experts/clock/expert.json", "null.safetensors"])
@pytest.mark.parametrize(("field", "version"), [("format_version", 1), ("feature_rule", 99)])
def test_what_another_version_wrote_is_refused(experts, null, tmp_path, file, field, version):
    folder = make_pool(experts, null).save(tmp_path / "pool")
    (folder / "experts/clock/contents.json").unlink()  # as in earlier versions
    if file.endswith(".json"):
        card = json.loads((folder / file).read_text())
        if version == 1:
            del card[field]  # as the first version had none
        else:
            card[field] = version
        (folder / file).write_text(json.dumps(card))
    else:
        metadata = {name: str(present) for name, present in VERSIONS.items()} | {field: str(version)}
        (folder / file).write_bytes(save(load_file(folder / file), metadata=metadata))
    older = rf"`pointsman recompute-statistics CONFIG --pool {folder}` takes them anew from each task's rows, without"
    remedy = older if version == 1 else "a newer release wrote it; install that one"
    messages = rf"{file}: {field} is {version}, this code reads {VERSIONS[field]}: .*{remedy}"
    with pytest.raises(OutdatedError if version == 1 else ExpertError, match=messages):
        read(folder)


def test_another_kind_of_adapter_is_not_called_damaged(experts, tmp_path):
    file = make_pool(experts).save(tmp_path / "pool") / "experts/digits/adapter_config.json"
    file.write_text('{"peft_type": "PREFIX_TUNING"}')
    file.with_name("contents.json").unlink()
    with pytest.raises(ExpertError, match="only plain LoRA can be routed; found peft_type 'PREFIX_TUNING'"):
        read(tmp_path / "pool")
