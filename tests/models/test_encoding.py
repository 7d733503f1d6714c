from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import BaseModelConfig
from pipeline.data.encoded.packing import pack, unpack_row
from pipeline.models.bases import load_processor
from pipeline.models.encoding import IGNORED, Encoded, chat, collate, encode, ids, image_hash, without_answer
from pipeline.models.generation import generate_answers
from tests.helpers import ask, batch_of, generate

RED, BLUE = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 40), "blue")


def tokens(base, ids) -> list[str]:
    return base.processor.tokenizer.convert_ids_to_tokens(ids)


def test_placeholders_become_image_parts():
    messages = [
        {"role": "system", "content": " read "},
        {"role": "user", "content": "<image>\n<image> compare <image> ?"},
        {"role": "assistant", "content": "no"},
    ]
    system, user, assistant = (message["content"] for message in chat(messages))
    assert [message["role"] for message in chat(messages)] == ["system", "user", "assistant"]
    assert system == [{"type": "text", "text": "read"}]
    assert user == [
        {"type": "image"},
        {"type": "text", "text": "\n"},
        {"type": "image"},
        {"type": "text", "text": " compare "},
        {"type": "image"},
        {"type": "text", "text": " ?"},
    ]
    assert assistant == [{"type": "text", "text": "no"}]
    texts = [part.get("text") for part in chat(messages, spaces=False)[1]["content"]]
    assert texts == [None, None, "compare", None, "?"]


PARTS = "{% for m in messages %}{% for p in m['content'] %}IMAGE{% endfor %}{% endfor %}".replace(
    "IMAGE", "{% if p['type'] == 'image' %}<IMG_CONTEXT>{% else %}{{ p['text'] }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (PARTS, "one: <IMG_CONTEXT>\n two: <IMG_CONTEXT> ?"),
        (PARTS.replace("_CONTEXT>", "_CONTEXT>\n"), "one:<IMG_CONTEXT>\ntwo:<IMG_CONTEXT>\n?"),
        (PARTS.replace("{{ p['text'] }}", "{{ p['text'] | trim }} "), "one: <IMG_CONTEXT>two: <IMG_CONTEXT>? "),
        ("{{ '<IMG_CONTEXT> ' * 2 }}" + PARTS.replace("<IMG_CONTEXT>", ""), "<IMG_CONTEXT> <IMG_CONTEXT> one:two:?"),
    ],
)
def test_white_space_beside_images_is_the_texts_own_or_the_templates(tiny_folder, template, text):
    """Kept where the template adds none, so that no base gets both."""
    processor = load_processor(BaseModelConfig(path=str(tiny_folder)))
    processor.chat_template = template
    rendered = []
    stock = processor.apply_chat_template
    processor.apply_chat_template = lambda *args, **settings: rendered.append(stock(*args, **settings)) or rendered[-1]
    ask(processor, " one: <image>\n two: <image> ? ", RED, BLUE)
    assert text in rendered


@pytest.mark.parametrize("images", [(), (RED,), (RED, BLUE)])
def test_labels_are_the_answer_and_its_end(tiny_base, images):
    row = ask(tiny_base.processor, "what color ?", *images, answer="red star")
    assert row.input_ids.dtype == row.labels.dtype == np.int64
    learned = row.labels != IGNORED
    assert tokens(tiny_base, row.labels[learned]) == ["red", "star", "<|end|>"]
    assert (row.labels[learned] == row.input_ids[learned]).all()
    assert learned.nonzero()[0].tolist() == list(range(len(row.labels) - 3, len(row.labels)))


@pytest.mark.parametrize("images", [(), (RED,), (RED, BLUE)])
def test_training_starts_with_the_tokens_that_generation_starts_with(tiny_base, images):
    prompt = ask(tiny_base.processor, "what color ?", *images)
    row = ask(tiny_base.processor, "what color ?", *images, answer="red")
    assert (row.input_ids[: len(prompt.input_ids)] == prompt.input_ids).all()
    assert tokens(tiny_base, prompt.input_ids[-1:]) == ["<|assistant|>"]
    assert (prompt.labels == IGNORED).all()
    assert prompt.images.keys() == row.images.keys() == ({"pixel_values"} if images else set())
    assert all((prompt.images[name] == row.images[name]).all() for name in row.images)
    for again in (without_answer(row), without_answer(prompt)):
        assert (again.input_ids.tolist(), again.labels.tolist()) == (prompt.input_ids.tolist(), prompt.labels.tolist())
        assert again.token_fields.keys() == prompt.token_fields.keys()
        assert all((again.token_fields[name] == prompt.token_fields[name]).all() for name in prompt.token_fields)


def test_an_answer_is_tokenized_apart_from_the_prompt(tiny_base):
    """A word piece must not grow together with what stands before the answer."""
    row = ask(tiny_base.processor, "say", answer="Red")
    assert tokens(tiny_base, row.input_ids) == ["<|user|>", "say", "<|assistant|>", "red", "<|end|>"]


def test_several_images_stand_where_their_placeholders_stand(tiny_base):
    row = ask(tiny_base.processor, "is <image> like <image> ?", RED, BLUE)
    pieces = tokens(tiny_base, row.input_ids)
    image = ["<img>", *["<IMG_CONTEXT>"] * 16, "</img>"]
    assert pieces == ["<|user|>", "is", *image, "l", "##i", "##k", "##e", *image, "?", "<|assistant|>"]
    assert row.images["pixel_values"].shape == (2, 3, 64, 64)
    assert row.images["pixel_values"].dtype == np.float32
    for pixels, image in zip(row.images["pixel_values"], (RED, BLUE), strict=True):
        alone = ask(tiny_base.processor, "?", image).images["pixel_values"]
        assert (pixels == alone[0]).all()


def test_earlier_turns_belong_to_the_prompt(tiny_base):
    messages = [
        {"role": "system", "content": "read"},
        {"role": "user", "content": "<image>color ?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "shape ?"},
        {"role": "assistant", "content": "star"},
    ]
    row = encode(tiny_base.processor, messages, [RED])
    assert tokens(tiny_base, row.labels[row.labels != IGNORED]) == ["star", "<|end|>"]
    assert tokens(tiny_base, row.input_ids).count("<|end|>") == 2
    expected = ["<|assistant|>", "red", "<|end|>", "<|user|>", "shape", "?", "<|assistant|>"]
    assert tokens(tiny_base, row.input_ids)[-9:-2] == expected


def test_ids_tell_pictures_and_prompts_apart(tiny_base):
    def row(question: str, *images: Image.Image, answer: str = "red"):
        return ask(tiny_base.processor, question, *images, answer=answer)

    rows = [
        row("what ?", RED),
        row("which ?", RED),
        row("what ?", BLUE),
        row("what ?", RED, answer="blue"),
        row("what ?"),
    ]
    pairs = ids(rows).tolist()
    images, prompts = ([pair[i] for pair in pairs] for i in (0, 1))
    assert images[0] == images[1] == images[3] != images[2]
    assert prompts[0] == prompts[3]
    assert len(set(prompts)) == 4
    assert images[4] == prompts[4]
    assert ids([without_answer(one) for one in rows]).tolist() == pairs
    kept = [unpack_row(*pack(replace(r, images={}, image_id=image_hash(r))).values()) for r in rows[:3]]
    assert ids(kept).tolist() == pairs[:3], "features in the pixels' place"


def test_a_template_that_hides_the_prompt_is_refused(tiny_folder):
    processor = load_processor(BaseModelConfig(path=str(tiny_folder)))
    processor.chat_template = "{{ messages | length }}{% if add_generation_prompt %}>{% endif %}"
    with pytest.raises(ValueError, match="does not put the generation prompt before the answer"):
        ask(processor, "what ?", answer="red")


def row_of(length: int, tiles: int = 0) -> Encoded:
    ids = np.arange(10, 10 + length)
    labels = np.where(ids >= 12, ids, IGNORED)
    pixels = {"pixel_values": np.full((tiles, 3, 2, 2), length, dtype=np.float32)} if tiles else {}
    return Encoded(ids, labels, pixels)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_padded_to_one_length(side):
    batch = collate([row_of(3), row_of(5)], pad_token_id=0, side=side)
    pads, ids = [0, 0], [10, 11, 12]
    mask, labels = [1, 1, 1], [IGNORED, IGNORED, 12]
    if side == "right":
        expected = ids + pads, mask + pads, labels + [IGNORED] * 2
    else:
        expected = pads + ids, pads + mask, [IGNORED] * 2 + labels
    assert tuple(batch[key][0].tolist() for key in ("input_ids", "attention_mask", "labels")) == expected
    assert batch["input_ids"][1].tolist() == [10, 11, 12, 13, 14]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert "pixel_values" not in batch


def test_all_tiles_of_a_batch_are_stacked_in_order_of_rows():
    batch = collate([row_of(4, tiles=2), row_of(3), row_of(5, tiles=1)], pad_token_id=0)
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [4, 4, 5]


def test_text_beside_images_is_answered_as_alone(tiny_base):
    questions = [("what color ?", (RED,)), ("repeat : red blue", ()), ("is <image> <image> ?", (BLUE, RED))]
    rows = [ask(tiny_base.processor, question, *images) for question, images in questions]
    together = generate(tiny_base, rows)
    for i, row in enumerate(rows):
        alone = generate(tiny_base, [row])
        torch.testing.assert_close(together[1][i : i + 1], alone[1], rtol=1e-4, atol=1e-4)
        assert together[0][i : i + 1].equal(alone[0])
    answers = generate_answers(tiny_base.model, tiny_base.processor, rows, max_new_tokens=4)
    assert answers == [
        generate_answers(tiny_base.model, tiny_base.processor, [row], max_new_tokens=4)[0] for row in rows
    ]


def test_the_loss_does_not_depend_on_padding(tiny_base):
    rows = [
        ask(tiny_base.processor, "color ?", RED, answer="red"),
        ask(tiny_base.processor, "repeat : " + "blue " * 9, answer="blue " * 9),
    ]

    def loss(*which):
        with torch.no_grad():
            return tiny_base.model(**collate(which, pad_token_id=tiny_base.processor.tokenizer.pad_token_id)).loss

    learned = [int((row.labels != IGNORED).sum()) for row in rows]
    expected = sum(n * loss(row) for n, row in zip(learned, rows, strict=True)) / sum(learned)
    torch.testing.assert_close(loss(*rows), expected, rtol=1e-4, atol=1e-4)


def test_answers_are_the_new_tokens_without_special_ones(tiny_base):
    rows = [ask(tiny_base.processor, "what color ?", RED), ask(tiny_base.processor, "repeat : red")]
    answers = generate_answers(tiny_base.model, tiny_base.processor, rows, max_new_tokens=3)
    assert len(answers) == 2
    output = tiny_base.model.generate(**batch_of(tiny_base, rows), max_new_tokens=3, do_sample=False)
    decoded = tiny_base.processor.tokenizer.batch_decode(output[:, -3:], skip_special_tokens=True)
    assert answers == [text.strip() for text in decoded]
