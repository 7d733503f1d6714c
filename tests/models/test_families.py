"""Every family on a small random model: rows, batches, cached features, routing."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jobs.benchmark.tools.small_models import SMALL, write_small
from pipeline.config import BaseModelConfig
from pipeline.data.encoded.image_embeds import ImageEncoder
from pipeline.data.encoded.packing import pack, unpack_row
from pipeline.data.errors import StreamError
from pipeline.models.bases import Base, load_base
from pipeline.models.checkpoints import BaseError
from pipeline.models.encoding import IGNORED, IMAGE_EMBEDS, PromptError, collate_for
from pipeline.models.families import FAMILIES
from pipeline.models.generation import generate_answers
from pipeline.models.inference import InferenceWorkers
from pipeline.training.loss import answer_loss, checkpoint_activations, without_dropout
from tests.helpers import ask

IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))
    for seed, size in enumerate([(80, 150, 3), (64, 40, 3)])
]


@pytest.fixture(scope="module", params=SMALL)
def base(request, tmp_path_factory) -> Base:
    folder = write_small(request.param, tmp_path_factory.mktemp("small") / request.param)
    return load_base(BaseModelConfig(path=str(folder)))


def sees(base: Base) -> bool:
    return base.processor.image_processor is not None


def rows_of(base: Base, answer: str | None = "red") -> list:
    """One image, none, two: a mixed batch."""
    one, two = (IMAGES[:1], IMAGES) if sees(base) else ([], [])
    return [
        ask(base.processor, "what color ?", *one, answer=answer),
        ask(base.processor, "repeat : red", answer=answer),
        ask(base.processor, "is this like this ?", *two, answer=answer),
    ]


@torch.no_grad()
def logits(base: Base, rows: list, side: str = "right") -> list[torch.Tensor]:
    """Logits of each row's own tokens."""
    batch = collate_for(base.processor, rows, side)
    padded = base.model(**batch, use_cache=False).logits
    return [row_logits[mask.bool()] for row_logits, mask in zip(padded, batch["attention_mask"], strict=True)]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_do_not_depend_on_their_batch(base, side):
    rows = rows_of(base)
    for row, actual in zip(rows, logits(base, rows, side), strict=True):
        torch.testing.assert_close(actual, logits(base, [row])[0], rtol=1e-4, atol=1e-4)


def test_images_are_seen(base):
    if not sees(base):
        pytest.skip("reads text only")
    one, other = (logits(base, [ask(base.processor, "what ?", p.resize((64, 64)))])[0] for p in IMAGES)
    assert (one[-1] - other[-1]).abs().max() > 0.01


def test_the_loss_is_on_the_answer(base):
    for row in rows_of(base):
        answer = base.processor.tokenizer.convert_ids_to_tokens(row.labels[row.labels != IGNORED])
        assert answer == ["red", "<|end|>"]


def test_the_loss_needs_logits_of_answers_only(base):
    batch = collate_for(base.processor, rows_of(base))
    with torch.no_grad():
        torch.testing.assert_close(answer_loss(base.model, batch), base.model(**batch).loss)


def test_layers_are_checkpointed_in_both_stages(base):
    """In the second one without dropout; the vision tower stays out of the backward pass in both."""
    language = base.model.get_submodule(base.family.language)
    batch = collate_for(base.processor, rows_of(base))
    expected = answer_loss(base.model, batch).item()
    seen = []
    hook = language.layers[0].self_attn.register_forward_pre_hook(lambda *args: seen.append(None))
    gate = base.model.get_submodule(f"{base.family.language}.layers.0.mlp.down_proj").weight.requires_grad_()
    try:
        checkpoint_activations(base)
        without_dropout(base.model)
        loss = answer_loss(base.model, batch)
        assert not language.get_input_embeddings()(batch["input_ids"]).requires_grad
        loss.backward()
    finally:
        hook.remove()
        language.gradient_checkpointing_disable()
        gate.requires_grad_(False).grad = None
        base.model.eval()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert len(seen) == 2, "forward, and again for backward"


def test_rows_survive_packing(base):
    for row in rows_of(base):
        again = unpack_row(*pack(row).values())
        assert again.images.keys() == row.images.keys()
        assert again.token_fields.keys() == row.token_fields.keys()
        for name, array in (row.images | row.token_fields).items():
            unpacked = (again.images | again.token_fields)[name]
            assert unpacked.dtype == array.dtype
            assert (unpacked == array).all()


def test_linears_of_the_language_model_only(base):
    adapted = [n for n, m in base.model.named_modules() if re.fullmatch(base.family.linears, n)]
    assert len(adapted) == 7 * base.model.config.get_text_config().num_hidden_layers
    assert all(isinstance(base.model.get_submodule(name), nn.Linear) for name in adapted)
    assert not any(name.startswith(base.family.vision) for name in adapted if base.family.vision)


def test_vision_parts_are_all_that_sees(base):
    """Frozen vision parts and language model together are the whole model."""
    parts = [*base.family.vision, base.family.language, "lm_head"]
    assert all(name.startswith(tuple(parts)) for name, _ in base.model.named_parameters())


def seen(base: Base, rows: list) -> list:
    reader = ImageEncoder(BaseModelConfig(path=str(base.folder)), InferenceWorkers(cpus_per_worker=1))
    packed = [pack(row) for row in rows]
    batch = {name: np.array([row[name] for row in packed], object) for name in packed[0]}
    embedded = reader(batch)
    return [unpack_row(*(embedded[name][i] for name in packed[0])) for i in range(len(rows))]


def test_features_stand_for_pixels(base):
    rows = rows_of(base)
    if not base.family.supports_image_cache:
        with pytest.raises(StreamError, match="cannot be kept; set data.vision_cache=off"):
            seen(base, rows)
        return
    cached = seen(base, rows)
    assert [IMAGE_EMBEDS in row.images for row in cached] == [sees(base), False, sees(base)]
    blind = load_base(BaseModelConfig(path=str(base.folder)), vision=False)
    for actual, expected in zip(logits(blind, cached), logits(base, rows), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    text_rows = rows_of(base, None)
    answers = generate_answers(base.model, base.processor, text_rows, max_new_tokens=4)
    assert generate_answers(blind.model, blind.processor, seen(base, text_rows), max_new_tokens=4) == answers


def test_text_models_refuse_images(base):
    if sees(base):
        pytest.skip("sees images")
    with pytest.raises(PromptError, match="2 images, but the base reads text only"):
        ask(base.processor, "what ?", *IMAGES)


def test_what_a_processor_refuses_is_a_bad_prompt(base):
    """Its reason goes into the quarantine file; no row stops the job."""
    if sees(base) and base.processor.image_token != "<image>":
        with pytest.raises(PromptError, match="which stands for an image in this base's prompts"):
            ask(base.processor, f"what is {base.processor.image_token} ?")
    if "qwen" in base.model.config.model_type:
        with pytest.raises(PromptError, match="aspect ratio"):
            ask(base.processor, "what ?", Image.new("RGB", (3000, 10)))
    template = base.processor.chat_template
    base.processor.chat_template = "{{ raise_exception('no system role here') }}"
    try:
        with pytest.raises(PromptError, match="refuses it: no system role here"):
            ask(base.processor, "what ?")
    finally:
        base.processor.chat_template = template


def test_a_family_that_is_not_known_says_what_to_add(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(BaseError, match=r"'gpt2' is a text model and in no family.*Add a line to FAMILIES"):
        load_base(BaseModelConfig(path=str(tmp_path)))


def test_every_vision_language_family_has_a_small_model():
    assert set(FAMILIES) == set(SMALL) - {"text"}
