"""Of a file with several audio tracks, the one that is asked for is decoded, or else its default one."""

import numpy as np
import pytest

from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.audio.defects import AudioDefect
from graft.audio.spans import probe, read_span
from graft.errors import AudioTrackError
from tests.support import media

LEVELS = {"ger": 0.125, "eng": 0.25, "fre": 0.5}


def film(**settings: int) -> bytes:
    """Make a file whose tracks can be told apart by their loudness."""
    return media.tracks({name: np.full(8_000, level) for name, level in LEVELS.items()}, SAMPLE_RATE, **settings)


@pytest.mark.parametrize(
    ("track", "language"),
    [
        (None, "eng"),
        (1, "ger"),
        (3, "fre"),
        ("3", "fre"),
        ("ger", "ger"),
        ("deu", "ger"),
        ("FRA", "fre"),
        ("en", None),
        (4, None),
    ],
)
def test_a_track_is_taken_by_number_or_language(track: int | str | None, language: str | None) -> None:
    data = film(default=2)
    if language is None:
        with pytest.raises(
            AudioTrackError, match=rf"film: has no audio track {track}: .* 1 \(ger\), 2 \(eng\), 3 \(fre\)"
        ):
            read_audio(data, name="film", track=track)
        return
    clip = read_audio(data, track=track, salvage=True)
    np.testing.assert_array_equal(clip.samples, LEVELS[language])
    assert clip.defects == (() if track else (AudioDefect(0.0, 0.0, "several_tracks"),))
    (block,) = read_span(data, 2_000, 6_000, track=track)
    np.testing.assert_array_equal(block.samples, clip.samples[2_000:6_000])
    assert probe(data, track=track).track_count == 3


def test_without_a_default_the_first_track_is_taken() -> None:
    np.testing.assert_array_equal(read_audio(film()).samples, LEVELS["ger"])
    wav = media.write(np.full((8_000, 1), 0.5), SAMPLE_RATE, "WAV", "PCM_16")
    np.testing.assert_array_equal(read_audio(wav, track=1).samples, 0.5)
    for track in (2, "deu"):
        with pytest.raises(AudioTrackError, match=r"give one of its tracks 1$"):
            read_audio(wav, track=track)
