"""Tests that a short training on sampled instructions teaches a model text styles and the use of word lists."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from graft.audio.chunking import windows
from graft.audio.clip import read_audio
from graft.checkpoints.loading import open_graft
from graft.errors import ModelError
from graft.inference.transcriber import open_transcriber
from graft.text.instructions import InstructionRecipe, InstructionSampler, trained_instructions
from graft.text.prompts import DEFAULT_INSTRUCTION, INSTRUCTIONS
from graft.training.backends import TorchBackend
from tests.support import tiny_models
from tests.support.speech_corpus import flac
from tests.support.training import run_steps, step_batches


def trained(
    folder: Path, sampler: InstructionSampler, audios: Sequence[bytes], texts: Sequence[str], *, seed_count: int
) -> Path:
    """Train a tiny graft on clips, each with `seed_count` sampled instructions, until it knows them by heart."""
    model, processor = open_graft(tiny_models.save_tiny_graft(folder / "graft"))
    model.requires_grad_(False)
    for part in (model.audio_projector, model.model.language_model, model.lm_head):
        part.requires_grad_(True)
    samples = [(read_audio(audio), text) for audio, text in zip(audios, texts, strict=True)]
    examples = [
        processor.example(clip, text, sampler.sample(text, sample_seed))
        for sample_seed in range(seed_count)
        for clip, text in samples
    ]
    batches = step_batches(processor, examples)
    backend, loss = TorchBackend(model.train(), weight_decay=0.0, max_grad_norm=1.0), 9.0
    for _ in range(20):
        loss = run_steps(batches * 20, backend, learning_rate=5e-3)[1][-1].loss if loss > 0.01 else loss
    assert loss < 0.01
    words = trained_instructions(sampler.settings)
    for keeper in (model.config, processor):
        keeper.trained_styles, keeper.trained_context = words["styles"], words["context"]
    model.save_pretrained(folder / "trained")
    processor.save_pretrained(folder / "trained")
    return folder / "trained"


@pytest.mark.seconds
def test_two_instructions_give_two_formats(tmp_path):
    sampler = InstructionSampler(InstructionRecipe(styles={"formatted": 0.5}), "lower")
    audios, texts = [flac(0.4 + 0.2 * seed, seed) for seed in range(3)], ["Yes, Bob.", "It is? No!", "GO ON"]
    transcriber = open_transcriber(trained(tmp_path, sampler, audios, texts, seed_count=8), chunker=windows)
    for instruction in (None, "lower", DEFAULT_INSTRUCTION):
        heard = transcriber.transcribe_many(audios, instruction=instruction)
        assert [one.text for one in heard] == ["yes bob", "it is no", "go on"]
    for instruction in ("formatted", *INSTRUCTIONS["formatted"]):
        heard = transcriber.transcribe_many(audios[:2], instruction=instruction)
        assert [one.text for one in heard] == texts[:2]
    with pytest.raises(ModelError, match="'raw': this checkpoint was trained for lower, formatted: give one"):
        transcriber.transcribe(audios[0], instruction="raw")
    transcriber.close()


@pytest.mark.seconds
def test_a_listed_word_decides_what_is_heard(tmp_path):
    names = ["anna", "otto"]
    sampler = InstructionSampler(
        InstructionRecipe(context=1.0, context_words=1, context_empty=0, context_absent=0), "lower", names
    )
    audio = flac(0.5)
    transcriber = open_transcriber(trained(tmp_path, sampler, [audio] * 2, names, seed_count=8), chunker=windows)
    for name in names:
        assert transcriber.transcribe(audio, context=[name]).text == name
    transcriber.close()
