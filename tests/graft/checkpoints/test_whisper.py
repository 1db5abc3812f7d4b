"""A Whisper checkpoint opens where a graft does, and what is neither is refused in one sentence."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, WhisperForConditionalGeneration

from graft.checkpoints.bundled.cache import bundled_whisper
from graft.checkpoints.loading import base_checkpoint, check_graft, check_model, model_digest, open_model
from graft.checkpoints.loading import open_speech_processor as open_processor
from graft.errors import ModelError
from graft.inference.transcriber import open_transcriber
from tests.support import tiny_models
from tests.support.speech_corpus import save_tiny_whisper


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(save_tiny_whisper(tmp_path / "tiny-whisper"))


def test_models_are_told_apart(folder: Path, tmp_path: Path) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "tiny-graft")
    assert (check_model(graft), check_model(folder)) == ("graft", "whisper")
    model, _ = open_model(folder)
    assert isinstance(model, WhisperForConditionalGeneration)
    assert not model.training
    with pytest.raises(ModelError, match="is a whisper checkpoint, not graft: give another one"):
        check_graft(folder)


@pytest.mark.bundled
def test_the_bundled_whisper_opens_by_its_name_where_no_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_model("whisper") == "whisper"
    assert base_checkpoint("whisper") == str(bundled_whisper())
    processor = open_processor("whisper")
    ids = processor.prompt_ids(100)
    assert processor.tokenizer.decode(ids) == "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    save_tiny_whisper(tmp_path / "whisper")
    assert base_checkpoint("whisper") == str(tmp_path / "whisper")


def test_an_english_only_whisper_gets_no_language(folder: Path) -> None:
    settings = {"decoder_start_token_id": 3, "no_timestamps_token_id": 7}
    GenerationConfig(**settings).save_pretrained(folder)
    assert open_processor(folder).prompt_ids(100) == [3, 7]
    GenerationConfig(**settings, lang_to_id={"<|de|>": 8, "<|en|>": 9}, task_to_id={"transcribe": 10}).save_pretrained(
        folder
    )
    assert open_processor(folder).prompt_ids(100) == [3, 9, 10, 7]
    processor = open_processor(folder)
    assert list(processor.languages) == ["de", "en"]
    assert processor.prompt_ids(100, processor.instruction("raw", None, "German")) == [3, 8, 10, 7]
    with pytest.raises(ModelError, match="language=fr: this checkpoint knows de, en"):
        processor.instruction(language="fr")
    (folder / "generation_config.json").unlink()
    processor = open_processor(folder)
    assert processor.prompt_ids(100, processor.instruction(language="en")) == processor.prompt_ids(100) == [3]
    with pytest.raises(ModelError, match="language=de: this checkpoint knows en"):
        processor.instruction(language="de")


def test_the_digest_is_of_weights_and_settings(folder: Path, tmp_path: Path) -> None:
    first = model_digest(folder)
    assert first == model_digest(save_tiny_whisper(tmp_path / "copy"))
    settings = GenerationConfig.from_pretrained(folder)
    settings.suppress_tokens = [5]
    settings.save_pretrained(folder)
    assert (second := model_digest(folder)) != first
    (folder / "model.fp32.safetensors").write_bytes(b"of another precision")
    assert model_digest(folder) == second
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"tiny-whisper has no \*\.safetensors file: save it again"):
        model_digest(folder)


def test_dtype_is_the_one_given_or_the_stored_one_and_float16_is_widened_on_a_cpu(folder: Path) -> None:
    assert open_model(folder)[0].dtype == torch.float32
    assert open_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    WhisperForConditionalGeneration.from_pretrained(folder).half().save_pretrained(folder)
    assert open_model(folder)[0].dtype == torch.float32


def test_what_is_no_model_is_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        check_model("smal")
    refusal = "smal can't be read as a graft or whisper checkpoint: did you mean small? give a folder, a hub id"
    assert str(error.value).startswith(refusal)
    assert str(error.value).endswith("that answers, or one of small, whisper")
    with pytest.raises(ModelError, match="text is a qwen2_vl checkpoint, not graft or whisper: give another one"):
        check_model(tiny_models.save_text_base(tmp_path / "text"))
    with pytest.raises(ModelError, match="is a whisper checkpoint, which engine=vllm does not run: leave engine out"):
        open_transcriber(folder, engine="vllm")
    state = load_file(folder / "model.safetensors")
    del state["model.decoder.layer_norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, model\.decoder\.layer_norm\.weight first"):
        open_transcriber(folder)
