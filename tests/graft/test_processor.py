"""The processor turns clips, images and texts into inputs that the model takes."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from graft.audio.clip import AudioClip
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import IGNORED_LABEL, GraftProcessor
from graft.text.prompts import CHATML, TEMPLATES, prompt_text, style_text
from tests.support import tiny_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.save_tiny_graft(tmp_path_factory.mktemp("graft"))


@pytest.fixture(scope="module")
def processor(folder) -> GraftProcessor:
    return AutoProcessor.from_pretrained(folder)


def clip(seconds: float, seed: int = 0) -> AudioClip:
    return AudioClip(np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32))


def test_auto_processor_finds_it_with_its_settings(tmp_path):
    folder = tiny_models.save_tiny_graft(tmp_path, audio_pool=4, audio_context="trim", text_style="raw")
    loaded = AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded, GraftProcessor)
    assert (loaded.audio_pool, loaded.audio_context, loaded.text_style) == (4, "trim", "raw")


@pytest.mark.parametrize("context", ["full", "trim", "valid"])
@pytest.mark.parametrize("pool", [1, 2, 4])
def test_the_model_takes_what_the_processor_writes(tmp_path, context, pool):
    folder = tiny_models.save_tiny_graft(tmp_path, audio_pool=pool, audio_context=context)
    processor = AutoProcessor.from_pretrained(folder)
    model = GraftForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(audio=[clip(1.23), clip(0.01)])).logits  # This raises unless the counts agree.
    assert logits.shape[0] == 2


def test_an_image_and_a_clip_in_one_prompt(folder, processor):
    model = GraftForConditionalGeneration.from_pretrained(folder).eval()
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + prompt_text("graft").removeprefix(
        "<|im_start|>user\n"
    )
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    logits = []
    for image in (Image.fromarray(noise), Image.fromarray(255 - noise)):
        inputs = processor(text=text, images=[image], audio=clip(0.5))
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == inputs["image_grid_thw"].prod() // 4
    assert (logits[0] - logits[1]).abs().max() > 1e-6


def test_placeholders_and_clips_must_agree(processor):
    with pytest.raises(ValueError, match="2 clips, but 1 placeholders"):
        processor(text=prompt_text("graft"), audio=[clip(0.5), clip(0.5)])


def test_training_rows_are_prompt_then_answer(processor):
    examples = [processor.example(clip(0.5), "Hello, World"), processor.example(clip(1.5), "yes")]
    batch = processor.training_batch(examples)
    for row, example in enumerate(examples):
        length = len(example.prompt_ids) + len(example.target_ids)
        assert batch["input_ids"][row, :length].tolist() == example.prompt_ids + example.target_ids
        assert batch["attention_mask"][row].sum() == length
        labels = batch["labels"][row]
        assert (labels[: len(example.prompt_ids)] == IGNORED_LABEL).all()
        assert labels[len(example.prompt_ids) : length].tolist() == example.target_ids
        assert (labels[length:] == IGNORED_LABEL).all()
    decoded = processor.tokenizer.decode(examples[0].target_ids)
    assert decoded.replace(" ", "") == "helloworld<|im_end|>"
    assert processor.tokenizer.decode(processor.prompt_end_ids()).replace(" ", "") == CHATML.prompt_end.replace(" ", "")


@pytest.mark.parametrize("style", TEMPLATES)
def test_every_prompt_ends_where_the_answer_begins(style):
    assert prompt_text(style, "Do it.").endswith("Do it." + CHATML.prompt_end)
    assert prompt_text(style).count("<|audio_pad|>") == 1
    assert (TEMPLATES[style].answer.format(text="a b") + CHATML.answer_end).strip() == "a b<|im_end|>"


def test_the_reference_prompt_keeps_its_literals():
    assert prompt_text("reference") == (
        "<|im_start|>user\n<|audio_bos|><|audio_pad|><|audio_eos|>\nTranscribe this audio.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert TEMPLATES["reference"].answer.format(text="A") + CHATML.answer_end == " A<|im_end|>"


def test_text_styles():
    text = " Don't press  “#”, the O'Hara’s -- e-mail! "
    assert style_text(text, "lower") == "don't press # the o'hara's e mail"
    assert style_text(text, "raw") == "Don't press “#”, the O'Hara’s -- e-mail!"
