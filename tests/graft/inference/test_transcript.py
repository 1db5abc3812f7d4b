"""A Transcript has its segments in order and their joined text, and JSON holds all of it."""

import dataclasses
import json
from pathlib import Path

import pytest

from graft.errors import OutputError
from graft.inference.segments import Segment, Word
from graft.inference.subtitles import FORMATS, CueLimits, Format
from graft.inference.transcript import Transcript, stitch

SECOND = Segment(
    29.5,
    41.0,
    " lazy dog.",
    mean_logprob=-0.25,
    flags=("loop",),
    words=(Word(29.5, 30.0, "lazy"), Word(30.0, 31.0, "dog.")),
)
FIRST = Segment(0.0, 29.5, "The quick  fox \n")
SILENT = Segment(41.0, 45.0, " ", flags=("no_speech",))


def test_segments_are_ordered_and_their_texts_joined() -> None:
    transcript = stitch([SECOND, SILENT, FIRST], duration_s=45.0, model="m")
    assert transcript.segments == (FIRST, SECOND, SILENT)
    assert transcript.text == "The quick  fox lazy dog."
    assert stitch([SILENT], duration_s=4.0, model="m").text == ""
    assert stitch([], duration_s=0.0, model="m").segments == ()


def test_json_holds_everything() -> None:
    held = json.loads(json.dumps(stitch([FIRST, SECOND], duration_s=41.0, model="graft-base").to_dict()))
    assert held == {
        "text": "The quick  fox lazy dog.",
        "duration_s": 41.0,
        "segments": [
            {
                "start_s": 0.0,
                "end_s": 29.5,
                "text": "The quick  fox \n",
                "mean_logprob": None,
                "flags": [],
                "words": [],
                "channel": None,
            },
            {
                "start_s": 29.5,
                "end_s": 41.0,
                "text": " lazy dog.",
                "mean_logprob": -0.25,
                "flags": ["loop"],
                "words": [
                    {"start_s": 29.5, "end_s": 30.0, "text": "lazy"},
                    {"start_s": 30.0, "end_s": 31.0, "text": "dog."},
                ],
                "channel": None,
            },
        ],
        "model": "graft-base",
        "aligner": None,
        "defects": [],
        "language": None,
    }


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_is_written_in_the_format_of_its_suffix(form: Format, tmp_path: Path) -> None:
    transcript, limits = stitch([FIRST, SECOND], duration_s=41.0, model="m"), CueLimits(duration_s=2.0)
    transcript.save(tmp_path / "new" / f"talk.{form.upper()}", limits)
    assert (tmp_path / "new" / f"talk.{form.upper()}").read_text() == transcript.to_string(form, limits)
    if form in ("srt", "vtt"):
        assert transcript.to_string(form, limits) != transcript.to_string(form)


def test_what_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    transcript = stitch([FIRST], duration_s=41.0, model="m")
    for name in ("talk.doc", "talk", ".srt"):
        with pytest.raises(OutputError, match=r"suffix of no format: give one of \.txt, \.srt, \.vtt, \.tsv, \.json"):
            transcript.save(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"talk.srt cannot be written: "):
        transcript.save(tmp_path / "file" / "talk.srt")
    with pytest.raises(ValueError, match="format is 'doc', not one of txt, srt"):
        transcript.to_string("doc")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_transcript_is_a_value() -> None:
    transcript = Transcript("a", 1.0, (FIRST,), "m")
    assert transcript == Transcript("a", 1.0, (FIRST,), "m")
    assert hash(transcript) == hash(Transcript("a", 1.0, (FIRST,), "m"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        transcript.text = "b"  # type: ignore[misc]
