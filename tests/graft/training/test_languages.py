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
}
WRITTEN = {
    "vi": "Tiếng Việt rất hay, phải không?",
    "hi": "यह एक परीक्षण है। क्या आप ठीक हैं?",
    "ru": "Всё ещё зелёная ёлка!",
    "ja": "こんにちは、世界。コーヒーをください!",
}


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("languages") / "graft"))


@pytest.mark.parametrize("language", TEXTS)
def test_labels_give_the_text_back(graft: str, language: str) -> None:
    stage, computing = Stage(1), ComputeSettings(dtype="fp32")
    model, processor = open_for_stage(stage, graft, computing)
    backend = make_backend(model, computing, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)
    clip = read_audio(flac(0.5, 1))
    examples = [processor.example(clip, unicodedata.normalize(form, WRITTEN[language])) for form in ("NFC", "NFD")]
    assert examples[0].target_ids == examples[1].target_ids
    batches = step_batches(processor, *([examples] * 3))
    labels = batches[0].inputs["labels"]
    for row in labels:
        text = processor.tokenizer.decode(row[row != -100], skip_special_tokens=True)
        assert text == TEXTS[language]
    _, logs = run_steps(batches, backend, learning_rate=1e-2, accumulation=3)
    assert 0 < logs[-1].loss < 10
    styled = GraftProcessor.from_pretrained(graft)
    for style in ("raw", "formatted"):
        ids = styled.target_ids(WRITTEN[language], style)
        assert styled.tokenizer.decode(ids, skip_special_tokens=True) == WRITTEN[language]
