import pytest
import torch

from pipeline.routing.features import (
    ORDER,
    TEXTURE,
    WIDEST,
    feature_width,
    has_image,
    project,
    project_prompts,
    projection,
    prompt_features,
    source_width,
    text_width,
)
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


def unit(x_XD):
    """Vectors at length 1, or 0."""
    return torch.nn.functional.normalize(x_XD, dim=-1)


def parts(features_S):
    """The five parts of a prompt's features."""
    return features_S.unflatten(-1, (5, -1)).unbind(-2)


def test_they_are_what_text_and_images_are_on_average_and_how_neighbours_go_together(embeds_BTD, image_BT, text_BT):
    actual = prompt_features(embeds_BTD, image_BT, text_BT)
    assert actual.shape == (B, source_width(D))
    for b, words in ((0, [6, 7, 8]), (1, [4, 5, 6, 7, 8])):  # those beside the image are its delimiters
        image_ND, text_ND = embeds_BTD[b, image_BT[b]], embeds_BTD[b, words]
        text_D, order_D, mean_D, std_D, texture_D = parts(actual[b])
        torch.testing.assert_close(text_D, unit(text_ND.mean(0)))
        pairs_D = (unit(text_ND)[:-1] * unit(text_ND)[1:].roll(1, -1)).mean(0)
        torch.testing.assert_close(order_D, ORDER * unit(pairs_D))
        torch.testing.assert_close(mean_D, unit(image_ND.mean(0)))
        torch.testing.assert_close(std_D, unit(image_ND.std(0, correction=0)))
        centred_ND = unit(image_ND - image_ND.mean(0))
        pairs_D = (centred_ND[:-1] * centred_ND[1:]).sum(0)
        torch.testing.assert_close(texture_D, TEXTURE * unit(pairs_D), atol=1e-5, rtol=1e-5)
    assert not std_D.any()
    assert not texture_D.any()  # one image token has no neighbour


def test_a_text_only_prompt_has_zeros_for_its_image(embeds_BTD, image_BT, text_BT):
    found_BS = prompt_features(embeds_BTD, image_BT, text_BT)
    assert has_image(found_BS).tolist() == has_image(project_prompts(found_BS, 10)).tolist() == [True, True, False]
    assert not found_BS[2, text_width(source_width(D)) :].any()
    torch.testing.assert_close(parts(found_BS[2])[0], unit(embeds_BTD[2, text_BT[2]].mean(0)))


def test_parts_count_the_same_whatever_their_size_in_a_base(embeds_BTD, image_BT, text_BT):
    actual = prompt_features(embeds_BTD, image_BT, text_BT)
    loud_BTD = torch.where(image_BT.unsqueeze(-1), 100 * embeds_BTD, embeds_BTD)
    torch.testing.assert_close(prompt_features(loud_BTD, image_BT, text_BT), actual)
    lengths = [float(part_D.norm()) for part_D in parts(actual[0])]
    assert lengths == pytest.approx([1, ORDER, 1, 1, TEXTURE])


def test_the_order_of_words_tells_prompts_apart(embeds_BTD):
    none_BT = torch.zeros(1, 4, dtype=torch.bool)
    there, back = (
        prompt_features(x_BTD, none_BT, ~none_BT)[0] for x_BTD in (embeds_BTD[:1, :4], embeds_BTD[:1, :4].flip(1))
    )
    torch.testing.assert_close(parts(there)[0], parts(back)[0])
    assert torch.nn.functional.cosine_similarity(parts(there)[1], parts(back)[1], dim=0) < 0.9


def test_a_question_has_the_same_text_features_with_and_without_an_image(embeds_BTD):
    """Whether the image stands before the words or between them, with a token on either side that delimits it."""
    words_TD, image_TD = embeds_BTD[0, :4], embeds_BTD[1, :5]
    none_BT = torch.zeros(1, 4, dtype=torch.bool)
    expected_S = prompt_features(words_TD[None], none_BT, ~none_BT)[0]
    for place in (0, 2):
        whole_BTD = torch.cat([words_TD[:place], image_TD, words_TD[place:]])[None]
        image_BT = ((torch.arange(9) > place) & (torch.arange(9) < place + 4))[None]
        actual_S = prompt_features(whole_BTD, image_BT, ~image_BT)[0]
        text = text_width(source_width(D))
        torch.testing.assert_close(actual_S[:text], expected_S[:text])
        assert not torch.allclose(actual_S[text:], expected_S[text:])


def test_text_and_images_keep_their_places_in_a_projection(embeds_BTD, image_BT, text_BT):
    features_BS = prompt_features(embeds_BTD, image_BT, text_BT)
    text, narrow = text_width(source_width(D)), text_width(15)
    whole_BF = project_prompts(features_BS, 15)
    blind_BS = features_BS.clone()
    blind_BS[:, text:] = 0
    assert project_prompts(blind_BS, 15)[:, :narrow].equal(whole_BF[:, :narrow])
    assert not project_prompts(blind_BS, 15)[:, narrow:].any()
    assert (narrow, text_width(512), text_width(128)) == (6, 204, 51)


def test_image_tokens_that_are_the_same_do_not_deviate():
    same_BTD = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(0)).expand(1, 7, D) * 30
    mask_BT = torch.ones(1, 7, dtype=torch.bool)
    assert parts(prompt_features(same_BTD, mask_BT, ~mask_BT)[0])[3].norm() < 1e-2


def test_text_still_tells_tasks_apart_where_features_are_projected():
    """Pictures of one kind, ten times as long as text: only the question says whose prompt it is."""
    random = torch.Generator().manual_seed(0)
    words_KD = 0.1 * torch.randn(12, 96, generator=random)
    tasks = []
    for task in range(2):
        image_NTD = 10 * torch.randn(300, 4, 96, generator=random)
        text_NTD = words_KD[6 * task :][torch.randint(6, (300, 4), generator=random)]
        embeds_NTD, image_NT = torch.cat([image_NTD, text_NTD], dim=1), torch.arange(8).expand(300, 8) < 4
        tasks.append(project_prompts(prompt_features(embeds_NTD, image_NT, ~image_NT), 64))
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
    assert feature_width(100, None) == 500
    assert feature_width(2048, None) == WIDEST
    assert feature_width(128, 64) == 64
    features_BS = torch.randn(4, 500)
    assert projection(500, 500) is None
    assert project_prompts(features_BS, 500) is project(features_BS, 500) is features_BS


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
