import pytest
import torch

from pipeline.routing.features import WIDEST, feature_width, project, projection, prompt_features
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.statistics import PromptStatistics
from tests.helpers import ask, batch_of, features_of, prompts

B, T, D = 3, 9, 6


@pytest.fixture(scope="module")
def embeds_BTD():
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def image_BT():
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0, 1:5] = mask[1, 2:3] = True
    return mask


@pytest.fixture(scope="module")
def text_BT(image_BT):
    mask = ~image_BT
    mask[:, :1] = False  # padding
    return mask


def test_they_are_mean_and_deviation_of_image_and_mean_of_text(embeds_BTD, image_BT, text_BT):
    actual = prompt_features(embeds_BTD, image_BT, text_BT)
    assert actual.shape == (B, 3 * D)
    for b in range(2):
        image_ND, text_ND = embeds_BTD[b, image_BT[b]], embeds_BTD[b, text_BT[b]]
        for i, part_D in enumerate((image_ND.mean(0), image_ND.std(0, correction=0), text_ND.mean(0))):
            expected_D = part_D / part_D.norm() if part_D.any() else part_D  # one image token does not deviate
            torch.testing.assert_close(actual[b, i * D : (i + 1) * D], expected_D)


def test_a_text_only_prompt_has_zeros_for_its_image(embeds_BTD, image_BT, text_BT):
    found_S = prompt_features(embeds_BTD, image_BT, text_BT)[2]
    assert not found_S[: 2 * D].any()
    mean_D = embeds_BTD[2, text_BT[2]].mean(0)
    torch.testing.assert_close(found_S[2 * D :], mean_D / mean_D.norm())


def test_parts_count_the_same_whatever_their_size_in_a_base(embeds_BTD, image_BT, text_BT):
    actual = prompt_features(embeds_BTD, image_BT, text_BT)
    loud_BTD = torch.where(image_BT.unsqueeze(-1), 100 * embeds_BTD, embeds_BTD)
    torch.testing.assert_close(prompt_features(loud_BTD, image_BT, text_BT), actual)
    torch.testing.assert_close(actual[0].view(3, D).norm(dim=-1), torch.ones(3))


def test_image_tokens_that_are_the_same_do_not_deviate():
    same_BTD = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(0)).expand(1, 7, D) * 30
    mask_BT = torch.ones(1, 7, dtype=torch.bool)
    assert prompt_features(same_BTD, mask_BT, ~mask_BT)[0, D : 2 * D].norm() < 1e-2


def test_text_still_tells_tasks_apart_where_features_are_projected():
    """Pictures of one kind, ten times as long as text: only the question says whose prompt it is."""
    random = torch.Generator().manual_seed(0)
    words_KD = 0.1 * torch.randn(12, 96, generator=random)
    tasks = []
    for task in range(2):
        image_NTD = 10 * torch.randn(300, 4, 96, generator=random)
        text_NTD = words_KD[6 * task :][torch.randint(6, (300, 4), generator=random)]
        embeds_NTD, image_NT = torch.cat([image_NTD, text_NTD], dim=1), torch.arange(8).expand(300, 8) < 4
        tasks.append(project(prompt_features(embeds_NTD, image_NT, ~image_NT), 64))
    router = PromptRouter([PromptStatistics.of(x_NF[:200]) for x_NF in tasks])
    for task, x_NF in enumerate(tasks):
        assert (router.scores(x_NF[200:]).argmax(-1) == task).float().mean() > 0.95


def test_masks_may_be_integers_and_embeddings_half_precision(embeds_BTD, image_BT, text_BT):
    exact = prompt_features(embeds_BTD, image_BT, text_BT)
    assert prompt_features(embeds_BTD, image_BT.long(), text_BT.long()).equal(exact)
    half = prompt_features(embeds_BTD.bfloat16(), image_BT, text_BT)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0.02)


def test_narrow_bases_are_taken_as_they_are():
    assert feature_width(128, None) == 384
    assert feature_width(2048, None) == WIDEST
    assert feature_width(128, 64) == 64
    features_BS = torch.randn(4, 384)
    assert projection(384, 384) is None
    assert project(features_BS, 384) is features_BS


def test_the_projection_is_always_the_same_and_keeps_lengths():
    torch.manual_seed(1)
    first = projection(600, 300)
    projection.cache_clear()
    torch.manual_seed(2)
    assert projection(600, 300).equal(first)
    features_BS = torch.randn(64, 600)
    lengths = project(features_BS, 300).norm(dim=-1) / features_BS.norm(dim=-1)
    assert 0.95 < lengths.mean() < 1.05
    assert 0.8 < lengths.min() < lengths.max() < 1.2


def test_drawing_the_projection_leaves_the_random_state_alone():
    projection.cache_clear()
    before = torch.get_rng_state()
    projection(60, 30)
    assert torch.get_rng_state().equal(before)


@pytest.fixture(scope="module")
def mixed(tiny_base):
    """Prompts of different lengths, with and without images."""
    return [*prompts(tiny_base.processor, "shape", 2), *prompts(tiny_base.processor, "repeat", 2)]


def test_a_listener_gets_the_features_of_the_language_models_input(tiny_base, mixed):
    model, observed = tiny_base.model, []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: observed.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    actual = features_of(tiny_base, mixed)
    hook.remove()
    ids, real = (batch_of(tiny_base, mixed)[key] for key in ("input_ids", "attention_mask"))
    image = ids == tiny_base.processor.image_token_id
    torch.testing.assert_close(actual, prompt_features(observed[0], image, real.bool() & ~image))
    assert image.sum(-1).tolist() == [16, 16, 0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_features(tiny_base, mixed, side):
    together = features_of(tiny_base, mixed, side)
    alone = torch.cat([features_of(tiny_base, [row]) for row in mixed])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_the_answer_of_a_training_row_can_be_left_out(tiny_base):
    question = "repeat : red blue"
    row, prompt = ask(tiny_base.processor, question, answer="red blue"), ask(tiny_base.processor, question)
    mask_BT = torch.arange(len(row.input_ids))[None] < len(prompt.input_ids)
    alone = features_of(tiny_base, [prompt])
    torch.testing.assert_close(features_of(tiny_base, [row], prompt_mask=mask_BT), alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(features_of(tiny_base, [row]), alone, atol=1e-3)
