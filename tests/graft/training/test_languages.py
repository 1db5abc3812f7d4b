"""A graft is trained on texts of other scripts, whose labels say what the texts say."""

import unicodedata

import pytest

from graft.audio.clip import read_audio
from graft.processor import GraftProcessor
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage
from tests.support import tiny_models
from tests.support.speech_corpus import flac
from tests.support.training import run_steps, step_batches

TEXTS = {
    "vi": "tiếng việt rất hay phải không",
    "hi": "यह एक परीक्षण है क्या आप ठीक हैं",
    "ru": "всё ещё зелёная ёлка",
    "ja": "こんにちは世界コーヒーをください",
    "tr": "i̇stanbul ve ığdır çok güzel",
    "ar": "مَرحبًا كيف الحالُ يا أحمد",
    "th": "สวัสดีครับ น้ำใสใจจริง",
    "ko": "안녕하세요 오늘 날씨가 좋네요",
    "fr": "été à noël ça va",
    "en": "at&t costs $5.20 50% don't go",
    "emoji": "so happy today",
}
WRITTEN = {
    "vi": "Tiếng Việt rất hay, phải không?",
    "hi": "यह एक परीक्षण है। क्या आप ठीक हैं?",
    "ru": "Всё ещё зелёная ёлка!",
    "ja": "こんにちは、世界。コーヒーをください!",
    "tr": "İstanbul ve ığdır çok güzel.",
    "ar": "مَرحبًا، كيف الحالُ يا أحمد؟",
    "th": "สวัสดีครับ น้ำใสใจจริง",
    "ko": "안녕하세요, 오늘 날씨가 좋네요!",
    "fr": "Été à Noël, ça va?",
    "en": "AT&T costs $5.20, 50%. Don’t go!",
    "emoji": "So happy 😀👩‍👩‍👧 today 🇫🇷!",
}


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("languages") / "graft"))


@pytest.fixture(scope="module")
def processor(graft: str) -> GraftProcessor:
    return GraftProcessor.from_pretrained(graft)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("language", TEXTS)
def test_labels_give_the_text_back(processor: GraftProcessor, language: str, form: str) -> None:
    written = unicodedata.normalize(form, WRITTEN[language])
    for style, text in (("lower", TEXTS[language]), ("raw", WRITTEN[language]), ("formatted", WRITTEN[language])):
        ids = processor.target_ids(written, style)
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


def test_a_graft_is_trained_on_all_of_them(graft: str) -> None:
    stage, computing = Stage(1), ComputeSettings(dtype="fp32")
    model, processor = open_for_stage(stage, graft, computing)
    backend = make_backend(model, computing, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)
    clip = read_audio(flac(0.5, 1))
    batches = step_batches(processor, *([[processor.example(clip, text) for text in WRITTEN.values()]] * 3))
    labels = batches[0].inputs["labels"]
    texts = [processor.tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in labels]
    assert texts == [*TEXTS.values()]
    _, logs = run_steps(batches, backend, learning_rate=1e-2, accumulation=3)
    assert 0 < logs[-1].loss < 10
