"""Prompts and letters have the ids of Qwen2-VL's own tokenizer, which is built from its published vocabulary."""

import pytest
from transformers import Qwen2Tokenizer, WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from graft.checkpoints.build import add_audio_tokens
from graft.model.ctc import count_letters, find_letters, spelled_share
from graft.model.tokens import AUDIO_TOKENS
from graft.processor import GraftProcessor
from tests.support.qwen_vocabulary import SPECIAL_TOKENS, qwen_merges, qwen_ranks, qwen_tokenizer

pytestmark = pytest.mark.seconds

BEFORE = [151644, 872, 198, 27, 91, 16736, 880, 436, 91, 29]
AFTER = [27, 91, 16736, 2204, 436, 91, 397, 3167, 3114, 419, 7699, 13, 151645, 198, 151644, 77091, 198]
"""The prompt that the released reference weights were trained with, around 1,500 placeholders."""


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    add_audio_tokens(tokenizer)
    return tokenizer


def test_the_vocabulary_and_the_special_tokens_are_whole(tokenizer: Qwen2Tokenizer) -> None:
    ranks = qwen_ranks()
    assert sorted(ranks.values()) == list(range(151_643))
    assert len(set(qwen_merges(ranks))) == 151_387 == len(ranks) - 256
    assert tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *AUDIO_TOKENS]) == list(range(151_643, 151_660))
    text = "It's 5,200 €! Été в 東京 यह है\n\tdef f(x):  return x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_references_prompt_has_its_ids(tokenizer: Qwen2Tokenizer) -> None:
    processor = GraftProcessor(
        WhisperFeatureExtractor(feature_size=128),
        Qwen2VLImageProcessorPil(),
        tokenizer,
        audio_pool=1,
        audio_context="full",
        prompt_style="reference",
        text_style="raw",
    )
    assert processor.prompt_ids(100) == [*BEFORE, *[151_657] * 1500, *AFTER]
    assert len(processor.prompt_ids(3000)) == 1527
    assert processor.tokenizer.decode(processor.target_ids("Hello there.")) == " Hello there.<|im_end|>"


@pytest.mark.parametrize(
    ("text", "letters", "least_share"),
    [
        ("Tiếng Việt rất hay", "aghinrtvyấếệ", 1.0),
        ("यह एक परीक्षण", "एकणपयरषही्", 1.0),
        ("ḱ", "k\u0301", 1.0),
        ("Всё ещё зелёная", "авезлнсщяё", 1.0),
        ("コーヒーをください", "いくさだコヒをー", 1.0),
        ("สวัสดีครับ", "คดบรวสัี", 1.0),
    ],
)
def test_the_letters_of_most_scripts_are_tokens(
    tokenizer: Qwen2Tokenizer, text: str, letters: str, least_share: float
) -> None:
    counts = count_letters([text])
    found = find_letters(counts, tokenizer)
    assert set(found) == set(letters)
    assert spelled_share(counts, found) >= least_share
