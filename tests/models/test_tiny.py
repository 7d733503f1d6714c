import json
import random
import string

import pytest
import torch

from pipeline.data.demo.abilities import vocabulary
from pipeline.models.tiny import IMAGE_TOKENS, SPECIAL_TOKENS, TINY_BASE, build_tiny, tiny_processor, tiny_tokenizer
from tests.helpers import ask


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(vocabulary())


def spelled(tokenizer, text: str) -> str:
    """The text that tokens stand for, without spaces."""
    return "".join(token.removeprefix("##") for token in tokenizer.tokenize(text))


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, *IMAGE_TOKENS.values()])
def test_special_tokens_are_one_token_each(tokenizer, token):
    (number,) = tokenizer(token, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(number) == token
    assert tokenizer.decode([number], skip_special_tokens=True) == ""
    surrounded = tokenizer.tokenize(f"red{token}blue")
    assert surrounded == ["red", token, "blue"]


def test_special_tokens_have_their_roles(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.pad_token_id) == "<pad>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.context_image_token_id) == "<IMG_CONTEXT>"
    assert tokenizer.convert_ids_to_tokens([tokenizer.start_image_token_id, tokenizer.end_image_token_id]) == [
        "<img>",
        "</img>",
    ]


def test_every_word_of_the_vocabulary_is_one_token(tokenizer):
    assert [word for word in vocabulary() if tokenizer.tokenize(word) != [word]] == []
    text = "what color is the star ?"
    assert tokenizer.tokenize(text) == text.split()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_other_words_are_spelled(tokenizer):
    assert tokenizer.tokenize("Zq9") == ["z", "##q", "##9"]
    assert tokenizer.decode(tokenizer("zq9")["input_ids"]) == "zq9"


def test_accents_are_dropped(tokenizer):
    assert tokenizer.tokenize("Größe café")[-4:] == tokenizer.tokenize("cafe")


@pytest.mark.parametrize("seed", range(5))
def test_any_ascii_text_can_be_tokenized(tokenizer, seed):
    letters = random.Random(seed).choices(string.printable, k=400)
    text = "".join(letters)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert spelled(tokenizer, text) == "".join(text.lower().split())


def test_words_of_any_length_can_be_tokenized(tokenizer):
    word = "qz" * 400
    assert spelled(tokenizer, word) == word


def test_words_given_twice_or_as_characters_make_no_second_token():
    tokenizer = tiny_tokenizer(["red", "red", "a", "7", "<pad>"])
    assert len(tokenizer) == len(set(tokenizer.get_vocab().values())) == len(tiny_tokenizer(["red"]))


def test_the_chat_template_marks_roles_and_ends_answers(tokenizer):
    messages = [
        {"role": "system", "content": "read"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": "red"},
    ]
    prompt = "<|system|>read<|user|><IMG_CONTEXT>what ?<|assistant|>"
    assert tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False) == prompt
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + "red<|end|>"


def test_the_model_fits_its_processor(tiny_base):
    config = tiny_base.model.config
    assert 1_200_000 < sum(p.numel() for p in tiny_base.model.parameters()) < 1_600_000
    assert config.text_config.vocab_size == len(tiny_base.processor.tokenizer)
    assert config.image_token_id == tiny_base.processor.image_token_id
    assert tiny_base.model.generation_config.eos_token_id == tiny_base.processor.tokenizer.eos_token_id
    assert tiny_base.model.generation_config.pad_token_id == tiny_base.processor.tokenizer.pad_token_id
    assert tiny_base.model.get_input_embeddings().weight is tiny_base.model.lm_head.weight


def test_an_image_becomes_as_many_features_as_tokens(tiny_base):
    pixels = torch.zeros(2, 3, 64, 64)
    features = tiny_base.model.model.get_image_features(pixels, return_dict=True).pooler_output
    assert features.shape == (2, tiny_base.processor.image_seq_length, tiny_base.width)


def test_smaller_models_can_be_built():
    processor = tiny_processor(["red"])
    model = build_tiny(processor, width=32, layers=1, vision_width=32, vision_layers=1)
    assert sum(p.numel() for p in model.parameters()) < 100_000
    row = ask(processor, "red ?")
    assert model(input_ids=torch.from_numpy(row.input_ids)[None]).logits.isfinite().all()


def test_the_shipped_base_has_the_processor_that_the_code_builds(tmp_path):
    """After a change of tokenizer or processor: `tiny_processor(vocabulary()).save_pretrained(TINY_BASE)`."""
    tiny_processor(vocabulary()).save_pretrained(tmp_path)
    for built in tmp_path.iterdir():
        parse = json.loads if built.suffix == ".json" else str
        assert parse(built.read_text()) == parse((TINY_BASE / built.name).read_text()), built.name
