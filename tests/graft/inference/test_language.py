"""A Whisper finds out the language of a recording, once, and it reaches the prompt, the aligner and the transcript."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graft.audio.chunking import Chunk, find_telling, windows
from graft.audio.clip import AudioClip, read_audio
from graft.inference.aligners.cross_attention import WhisperAligner
from graft.inference.transcriber import Transcriber, open_transcriber
from tests.support import media, tiny_models
from tests.support.speech_corpus import save_tiny_whisper

LANGUAGES = ("de", "en", "vi", "ja")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_whisper(tmp_path_factory.mktemp("language") / "whisper", varied=True, languages=LANGUAGES)


@pytest.fixture(scope="module")
def transcriber(folder: str) -> Iterator[Transcriber]:
    opened = open_transcriber(folder, chunker=windows)
    yield opened
    opened.close()


def test_the_language_is_the_likeliest_and_the_same_for_the_aligner(folder: str, transcriber: Transcriber) -> None:
    aligner = WhisperAligner(folder)
    found = set()
    for path in media.PROMPTS[:6]:
        clip = read_audio(path)
        transcript = transcriber.transcribe(clip)
        assert transcript.language == aligner.find_language(clip)
        assert transcript == transcriber.transcribe(clip, language=transcript.language)
        found.add(transcript.language)
    assert found <= set(LANGUAGES)
    others = [transcriber.transcribe(clip, language=one) for one in LANGUAGES]
    assert len({one.text for one in others}) > 1
    assert [one.language for one in transcriber.transcribe_many([clip, clip], language="ja")] == ["ja", "ja"]
    assert transcriber.transcribe(clip, language="Japanese").language == "ja"


def test_an_aligner_reads_a_text_in_its_language_or_in_the_one_that_it_hears(folder: str) -> None:
    aligner, clip = WhisperAligner(folder), read_audio(media.PROMPTS[0])
    found = aligner.find_language(clip)
    times = {language: aligner.align(clip, "one two three", language) for language in (None, found, "fr")}
    assert times[None] == times[found] == times["fr"]
    states = aligner._encode(clip)
    begun = {language: aligner._prefix(states, language) for language in (*LANGUAGES, "fr")}
    assert [begun[language] for language in LANGUAGES] == [[3, 40 + place, 6, 5] for place in range(len(LANGUAGES))]
    assert begun["fr"] == begun[found]


def test_an_aligner_finds_what_a_graft_is_not_told(folder: str, tmp_path: Path) -> None:
    graft = tiny_models.save_tiny_graft(tmp_path / "graft", trained_languages=["ru", "fr"])
    timing = open_transcriber(graft, chunker=windows, aligner=folder)
    clip = read_audio(media.PROMPTS[0])
    timed, plain = timing.transcribe(clip), timing.transcribe(clip, words=False)
    assert (timed.language, plain.language) == (WhisperAligner(folder).find_language(clip), None)
    assert timed.text == plain.text  # the prompt does not name what it was not trained for
    assert timing.transcribe(clip, language="fr").language == "fr"
    timing.close()


def test_the_longest_of_the_first_chunks_with_speech_tells_the_language() -> None:
    def chunks(*lengths: tuple[int, bool | None]) -> list[Chunk]:
        return [Chunk(0.0, AudioClip(np.zeros(length, np.float32)), has_speech) for length, has_speech in lengths]

    assert find_telling(chunks((2, True), (3, None), (3, True), (9, False), (10, True))) == 1
    assert find_telling(chunks((2, False), (3, False))) == 1


@pytest.mark.slow
@pytest.mark.bundled
def test_whisper_base_hears_english_which_it_writes() -> None:
    opened = open_transcriber("whisper", chunker=windows, aligner="whisper")
    transcripts = opened.transcribe_many(media.PROMPTS[:8])
    assert {one.language for one in transcripts} == {"en"}
    assert transcripts == opened.transcribe_many(media.PROMPTS[:8], language="en")
    opened.close()
