import math
from itertools import combinations

import numpy as np
import pytest
import torch

from jobs.pretrain_tiny import encode_examples
from jobs.pretraining import APART, FAR, Sampler, batch_losses, places, reading_loss
from pipeline.data.demo.abilities import BENCHMARKS, vocabulary
from pipeline.data.demo.drawing import Print
from pipeline.models.encoding import collate
from pipeline.models.tiny import build_tiny, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(vocabulary())


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_tiny(processor, width=32, layers=1, vision_width=32, vision_layers=1)


def test_reading_sums_over_all_places_of_the_words():
    torch.manual_seed(0)
    features, embedding, blank = torch.randn(2, 5, 4), torch.randn(7, 4), 6
    captions = [[1, 1, 3], [2]]
    touched = [torch.rand(5, len(caption)) < 0.5 for caption in captions]
    lengths = embedding[[1, 2, 3]].square().sum(1)  # of the words that are printed
    density = -torch.cdist(features, embedding).square() * APART / (2 * lengths.mean())
    scores = density + density.log_softmax(-1)
    logs = []
    for image, caption in enumerate(captions):
        ways = []
        for tokens in combinations(range(5), len(caption)):
            words = [blank] * 5
            for token, word in zip(tokens, caption, strict=True):
                words[token] = word
            far = sum(FAR for u, token in enumerate(tokens) if not touched[image][token, u])
            ways.append(sum(scores[image, p, w] for p, w in enumerate(words)) + far)
        logs.append(torch.stack(ways).logsumexp(0))
    expected = -torch.stack(logs).mean() / 5
    torch.testing.assert_close(reading_loss(features, embedding, captions, touched, blank), expected)


@pytest.mark.parametrize("length", [0.3, 1.0, 20.0])
def test_image_tokens_at_the_embeddings_read_best(length):
    embedding = torch.eye(7) * length  # at right angles, so that each is e^APART times as likely as any other
    right, anywhere = embedding[[1, 6, 3, 6]][None], [torch.ones(4, 2, dtype=torch.bool)]
    best = reading_loss(right, embedding, [[1, 3]], anywhere, 6)
    torch.testing.assert_close(best, torch.tensor(math.log1p(6 * math.exp(-APART))), rtol=1e-3, atol=1e-5)
    assert reading_loss(right, embedding, [[3, 1]], anywhere, 6) > best + 1
    assert reading_loss(2 * right, embedding, [[1, 3]], anywhere, 6) > best + 1
    elsewhere = [torch.tensor([[False, True]] * 4)]
    assert reading_loss(right, embedding, [[1, 3]], elsewhere, 6) == pytest.approx(best.item() - FAR / 4, rel=0.01)


def test_words_touch_the_tokens_that_they_are_printed_in():
    touched = places([Print("a", (2, 3, 10, 15)), Print("b", (20, 10, 40, 20))], side=4)
    assert touched.shape == (16, 2)
    assert touched[:, 0].nonzero()[:, 0].tolist() == [0]
    assert touched[:, 1].nonzero()[:, 0].tolist() == [1, 2, 5, 6]


def test_answers_have_the_models_own_loss(processor, model):
    examples, _ = Sampler().draw(np.random.default_rng(0), 30)
    rows = encode_examples(processor, examples)
    losses = batch_losses(model, processor, rows, examples)
    expected = model(**collate(rows, pad_token_id=processor.tokenizer.pad_token_id)).loss
    torch.testing.assert_close(losses.answers, expected)
    assert losses.by_row.shape == (len(rows),)
    assert losses.by_row.isfinite().all()
    assert losses.reading > 0


def test_text_alone_can_be_learned(processor, model):
    examples, _ = Sampler().draw(np.random.default_rng(0), 30)
    written = [e for e in examples if e.image is None]
    losses = batch_losses(model, processor, encode_examples(processor, written), written)
    assert losses.reading == 0
    losses.answers.backward()
    assert model.get_input_embeddings().weight.grad.isfinite().all()


def test_a_step_holds_abilities_and_both_modalities_of_operations():
    examples, names = Sampler().draw(np.random.default_rng(0), 96)
    assert len(examples) == len(names) == 96
    assert [name in BENCHMARKS for name in names] == [True] * 32 + [False] * 64
    assert names[32::2] == [name.replace("picture", "text") for name in names[33::2]]
    pictures = [e for e in examples[32:] if e.image is not None]
    assert len(pictures) == 32
    assert len({id(e.image) for e in pictures}) == 16


def test_steps_are_drawn_by_their_seed():
    first, second = (Sampler().draw(np.random.default_rng(5), 40) for _ in range(2))
    assert first[1] == second[1]
    assert [e.question for e in first[0]] == [e.question for e in second[0]]


def test_what_is_learned_makes_room():
    sampler = Sampler()
    for _ in range(400):
        sampler.update(["shape", "sort.text", "sort.picture"], torch.zeros(3))
    _, names = sampler.draw(np.random.default_rng(0), 3000)
    assert names.count("shape") < names.count("color") / 5
    assert names.count("sort.text") < names.count("count.text") / 5
