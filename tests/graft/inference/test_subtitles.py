"""Another parser reads the text and the times of the transcript from subtitles, in cues within the limits."""

import html
import io
import json
import re
from itertools import pairwise
from unicodedata import east_asian_width

import pytest
import regex
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.inference.segments import Segment, Word
from graft.inference.subtitles import FORMATS, Cue, CueLimits, make_cues
from graft.inference.transcript import Transcript, stitch
from graft.text.characters import split_words

SPEECH = (
    "When the sunlight strikes raindrops in the air, they act as a prism and form a rainbow. The rainbow is a division "
    "of white light into many beautiful colors. These take the shape of a long round arch, with its path high above, "
    "and its two ends apparently beyond the horizon. There is, according to legend, a boiling pot of gold at one end."
)
HOUR_S = 3600.0


def transcript(*segments: Segment) -> Transcript:
    return stitch(segments, duration_s=60.0, model="m")


def cues_of(transcript: Transcript, limits: CueLimits | None = None) -> list[Cue]:
    return make_cues(transcript.segments, limits)


def spoken(text: str, *, start_s: float = 0.0, word_s: float = 0.4) -> Segment:
    """Make a segment whose words take four fifths of `word_s` each, followed by a pause for the rest."""
    words = [
        Word(start_s + index * word_s, start_s + (index + 0.8) * word_s, word)
        for index, word in enumerate(text.split())
    ]
    return Segment(start_s, words[-1].end_s, text, words=tuple(words))


def parsed(text: str, form: str) -> list[Cue]:
    """Read cues with webvtt-py, which leaves VTT's escapes to players."""

    def milliseconds(time: str) -> int:
        hours, minutes, seconds = time.split(":")
        return round(1000 * (60 * (60 * int(hours) + int(minutes)) + float(seconds)))

    captions = webvtt.from_buffer(io.StringIO(text), format=form, **({"strict": True} if form == "vtt" else {}))
    unescaped = html.unescape if form == "vtt" else str
    return [Cue(milliseconds(cue.start), milliseconds(cue.end), unescaped(cue.raw_text)) for cue in captions]


def tsv_rows(text: str) -> list[Cue]:
    header, *rows = [line.split("\t") for line in text.removesuffix("\n").split("\n")]
    assert header == ["start", "end", "text"]
    return [Cue(int(start), int(end), words) for start, end, words in rows]


def one_line(text: str) -> str:
    return " ".join(text.split())


EXAMPLE = transcript(
    Segment(0.0, 2.5, "Fish & chips"),
    Segment(2.5, 4.0, "  "),
    Segment(99.9996, 101.0, "5 < 6 --> true,\n\tisn't it?"),
    Segment(100 * HOUR_S + 61.001, 100 * HOUR_S + 62.0, "The end"),
)


def test_srt_to_the_letter() -> None:
    assert EXAMPLE.to_string("srt") == (
        "1\n00:00:00,000 --> 00:00:02,500\nFish & chips\n\n"
        "2\n00:01:40,000 --> 00:01:41,000\n5 < 6 -> true, isn't it?\n\n"
        "3\n100:01:01,001 --> 100:01:02,001\nThe end\n"
    )


def test_vtt_to_the_letter() -> None:
    assert EXAMPLE.to_string("vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\nFish &amp; chips\n\n"
        "00:01:40.000 --> 00:01:41.000\n5 &lt; 6 --&gt; true, isn't it?\n\n"
        "100:01:01.001 --> 100:01:02.001\nThe end\n"
    )


def test_tsv_to_the_letter() -> None:
    assert EXAMPLE.to_string("tsv") == (
        "start\tend\ttext\n0\t2500\tFish & chips\n"
        "100000\t101000\t5 < 6 --> true, isn't it?\n"
        "360061001\t360062000\tThe end\n"
    )


def test_txt_is_the_text_and_json_is_everything() -> None:
    assert EXAMPLE.to_string("txt") == EXAMPLE.text + "\n"
    whole = transcript(spoken("Dvořák in Brno"), Segment(3.0, 4.0, "", mean_logprob=-0.5, flags=("no_speech",)))
    text = whole.to_string("json")
    assert "Dvořák" in text
    assert json.loads(text) == json.loads(json.dumps(whole.to_dict()))


def test_a_transcript_without_text_is_a_file_without_cues() -> None:
    nothing = transcript(Segment(0.0, 4.0, " \n"))
    assert [nothing.to_string(form) for form in FORMATS[:4]] == ["\n", "", "WEBVTT\n", "start\tend\ttext\n"]
    assert transcript().to_string("srt") == ""


def test_long_segments_become_cues_within_the_limits() -> None:
    segment = spoken(SPEECH, start_s=3.0)
    cues = cues_of(transcript(segment))
    assert [cue.text for cue in cues] == [
        "When the sunlight strikes\nraindrops in the air,",
        "they act as a prism and form a rainbow.",
        "The rainbow is a division of white\nlight into many beautiful colors.",
        "These take the shape of a long round arch,",
        "with its path high above, and its two\nends apparently beyond the horizon.",
        "There is, according to legend, a\nboiling pot of gold at one end.",
    ]
    assert {cue.start_ms for cue in cues} <= {round(word.start_s * 1000) for word in segment.words}
    assert {cue.end_ms for cue in cues} <= {round(word.end_s * 1000) for word in segment.words}


def test_cues_break_at_pauses_and_long_words_are_cut() -> None:
    words = [Word(0.0, 0.5, "yes"), Word(9.0, 9.5, "no"), Word(9.5, 10.0, "maybe"), Word(30.0, 45.0, "so")]
    cues = cues_of(transcript(Segment(0.0, 45.0, "yes no maybe so", words=tuple(words))))
    assert cues == [Cue(0, 1000, "yes"), Cue(9000, 10_000, "no maybe"), Cue(30_000, 37_000, "so")]


def within(cues: list[Cue], limits: CueLimits) -> bool:
    return all(
        cue.end_ms - cue.start_ms <= 1000 * limits.duration_s + 1
        and len(lines := cue.text.split("\n")) <= limits.lines
        and max(map(columns, lines)) <= limits.line_characters
        for cue in cues
    )


def columns(text: str) -> int:
    """Count characters as people see them, wide ones twice."""
    return sum(2 if east_asian_width(cluster[0]) in "WF" else 1 for cluster in regex.findall(r"\X", text))


def test_without_word_times_a_segments_time_is_shared_out_by_the_lengths_of_its_sentences() -> None:
    cues = cues_of(transcript(Segment(2.0, 25.0, SPEECH)))
    assert one_line(" ".join(cue.text for cue in cues)) == SPEECH
    assert within(cues, CueLimits())
    assert cues[2].text == "The rainbow is a division of white\nlight into many beautiful colors."
    share = SPEECH.index("The rainbow") / len(SPEECH)
    assert cues[2].start_ms == pytest.approx(1000 * (2.0 + 23.0 * share), abs=200)
    assert (cues[0].start_ms, cues[-1].end_ms) == (2000, 25_000)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (
            "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
            "ニャーニャー泣いていた事だけは記憶している。「吾輩はここで始めて人間というものを見た。」",
            "吾輩は猫である。",
        ),
        ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรมและควรปฏิบัติต่อกัน" * 2, None),
    ],
)
@pytest.mark.parametrize("is_timed", [False, True])
def test_scripts_without_spaces_break_between_characters(text: str, first: str | None, is_timed: bool) -> None:
    words = tuple(Word(0.3 * place, 0.3 * place + 0.2, word) for place, (_, word) in enumerate(split_words(text)))
    cues = cues_of(transcript(Segment(0.0, 60.0, text, words=words if is_timed else ())))
    if is_timed:
        starts = {round(1000 * word.start_s): word.text for word in words}
        assert all(cue.text.startswith(starts[cue.start_ms]) for cue in cues)
    assert within(cues, CueLimits())
    lines = [line for cue in cues for line in cue.text.split("\n")]
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert [cluster for line in lines for cluster in regex.findall(r"\X", line) if cluster != " "] == [
        cluster for cluster in regex.findall(r"\X", text) if cluster != " "
    ]
    assert not any(line.startswith(tuple("。」ー、")) or line.endswith("「") for line in lines)
    assert first is None or cues[0].text.startswith(first)


def test_short_cues_stay_for_a_second_or_are_joined() -> None:
    cues = cues_of(transcript(Segment(0.0, 0.3, "Yes."), Segment(0.3, 0.5, "No."), Segment(5.0, 5.2, "Why?")))
    assert cues == [Cue(0, 1000, "Yes. No."), Cue(5000, 6000, "Why?")]
    long = "a " * 40
    (one, other) = cues_of(transcript(Segment(0.0, 0.3, long), Segment(0.3, 5.0, long)))  # too much for one
    assert (one.end_ms, other.start_ms) == (300, 300)
    cues = cues_of(transcript(Segment(0.0, 0.3, "Yes."), Segment(0.3, 0.5, "No.")), CueLimits(min_duration_s=0.0))
    assert cues == [Cue(0, 300, "Yes."), Cue(300, 500, "No.")]


def test_a_long_word_is_never_torn() -> None:
    address = "https://" + "long-" * 20
    cues = cues_of(transcript(Segment(0.0, 2.0, f"see {address} now")))
    assert "\n".join(cue.text for cue in cues) == f"see\n{address}\nnow"


CALL = (
    Segment(0.0, 23.0, "How are you today? And how is the weather over there in Brno?", channel=1),
    Segment(8.0, 10.5, "Fine, thanks.", channel=2),
    Segment(24.0, 26.0, "It rains.", channel=2),
)


def test_channels_are_shown_at_their_own_times_and_named() -> None:
    """A question, its answer and the next question; the channel that asks is one segment."""
    words = [(0.1, "How"), (1.0, "are"), (2.0, "you"), (3.0, "today?"), (12.0, "And"), (13.0, "how"), (14.0, "is")]
    rest = [
        *words,
        *((15.0 + place, word) for place, word in enumerate(["the", "weather", "over", "there", "in", "Brno?"])),
    ]
    timed = Segment(
        0.0, 23.0, CALL[0].text, words=tuple(Word(start, start + 0.8, word) for start, word in rest), channel=1
    )
    for asked in (CALL[0], timed):
        whole = transcript(asked, *CALL[1:])
        for form in ("srt", "vtt"):
            cues = parsed(whole.to_string(form), form)
            assert [cue.start_ms for cue in cues] == sorted(cue.start_ms for cue in cues)
            assert all(re.match(r"channel [12]: ", one_line(cue.text)) for cue in cues)
            answer = next(cue for cue in cues if "Fine" in cue.text)
            assert answer == Cue(8000, 10_500, "channel 2: Fine, thanks.")
            assert "Brno" in [cue for cue in cues if "channel 1" in cue.text][-1].text
        assert tsv_rows(whole.to_string("tsv")) == [
            Cue(0, 23_000, f"channel 1: {asked.text}"),
            Cue(8000, 10_500, "channel 2: Fine, thanks."),
            Cue(24_000, 26_000, "channel 2: It rains."),
        ]
    assert whole.to_string("txt") == (
        "channel 1: How are you today?\nchannel 2: Fine, thanks.\n"
        "channel 1: And how is the weather over there in Brno?\nchannel 2: It rains.\n"
    )


def test_times_that_touch_overlap_or_run_backwards_are_put_in_order() -> None:
    segments = [(1.0, 5.0), (3.0, 3.0), (3.0, 2.0), (3.0004, 8.0), (7.9996, 9.0)]
    assert [
        (row.start_ms, row.end_ms)
        for row in tsv_rows(transcript(*(Segment(*times, "a") for times in segments)).to_string("tsv"))
    ] == [
        (1000, 3000),
        (3000, 3001),
        (3001, 3002),
        (3002, 8000),
        (8000, 9000),
    ]


def test_limits_are_settings() -> None:
    cues = cues_of(transcript(spoken(SPEECH)), CueLimits(line_characters=20, lines=1, duration_s=2.0))
    assert all("\n" not in cue.text and len(cue.text) <= 20 and cue.end_ms - cue.start_ms <= 2000 for cue in cues)
    assert one_line(" ".join(cue.text for cue in cues)) == SPEECH


TIMES = st.floats(0, 400 * HOUR_S) | st.floats(0, 20) | st.sampled_from([0.0, 1.0, 1.0004, 1.0006])
TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\r\t\x85&<>-") | st.sampled_from(" .,&<>-"),
    max_size=60,
) | st.just("a --> b")
LIMITS = st.builds(
    CueLimits,
    line_characters=st.integers(14, 60),
    lines=st.integers(1, 3),
    duration_s=st.floats(0.5, 9.0),
    min_duration_s=st.floats(0.0, 2.0),
)
SAID = st.lists(
    st.from_regex(r"[a-z]{1,12}[.,]?|(?:「?[ぁ-ん]ー?[。、」]?){1,15}|[ก-ฮะาิี่]{1,20}", fullmatch=True),
    min_size=1,
    max_size=40,
)


@pytest.mark.seconds
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(0.2, 30), SAID, st.sampled_from([1, 2])), min_size=1, max_size=5),
    LIMITS,
    st.booleans(),
)
def test_all_that_channels_say_is_shown_once_within_the_limits(said, limits, is_split) -> None:
    clock, segments = {1: 0.0, 2: 0.0}, []
    for pause_s, seconds_, words, channel in said:
        channel = channel if is_split else 1
        start_s = clock[channel] + pause_s
        clock[channel] = start_s + seconds_
        segments.append(Segment(start_s, clock[channel], " ".join(words), channel=channel if is_split else None))
    whole = transcript(*segments)
    cues = cues_of(whole, limits)
    assert parsed(whole.to_string("vtt", limits), "vtt") == cues
    assert [cue.start_ms for cue in cues] == sorted(cue.start_ms for cue in cues)
    assert within([cue for cue in cues if not is_one_piece(cue)], limits)
    for channel in {segment.channel for segment in segments}:
        label = f"channel {channel}: " if channel else ""
        own = [cue for cue in cues if one_line(cue.text).startswith(label)]
        assert all(one.end_ms <= other.start_ms for one, other in pairwise(own))
        texts = [one_line(cue.text).removeprefix(label) for cue in own]
        expected = "".join(segment.text for segment in whole.segments if segment.channel == channel)
        assert "".join(texts).replace(" ", "") == expected.replace(" ", "")
        least_s = min(limits.min_duration_s, limits.duration_s)
        for (one, text), (other, more) in pairwise(zip(own, texts, strict=True)):
            if one.end_ms - one.start_ms < 1000 * least_s - 1:
                joined = cues_of(
                    transcript(Segment(0.0, (other.end_ms - one.start_ms) / 1000, f"{label}{text} {more}")), limits
                )
                assert one.end_ms == other.start_ms or len(joined) > 1


def is_one_piece(cue: Cue) -> bool:
    """Tell whether a cue cannot be split: a word, or a character with the punctuation around it."""
    text = re.sub(r"^channel [12]: ", "", one_line(cue.text))
    return " " not in text and (text.isascii() or len(regex.findall(r"[^\p{P}\p{M}\p{Lm}]", text)) < 2)


WORDS = st.lists(st.builds(Word, TIMES, TIMES, TEXTS), max_size=6).map(tuple)
SEGMENTS = st.lists(st.builds(Segment, TIMES, TIMES, TEXTS, words=st.just(()) | WORDS), max_size=6)


@settings(max_examples=150, deadline=None)
@given(SEGMENTS)
def test_any_transcript_is_read_back_in_order(segments: list[Segment]) -> None:
    whole = transcript(*segments)
    cues = cues_of(whole)
    for cue in cues:
        assert 0 <= cue.start_ms < cue.end_ms
        assert all(line.strip() for line in cue.text.split("\n"))
    assert all(one.end_ms <= other.start_ms for one, other in pairwise(cues))
    assert parsed(whole.to_string("vtt"), "vtt") == cues
    arrowless = [Cue(cue.start_ms, cue.end_ms, cue.text.replace("-->", "->")) for cue in cues]
    assert (parsed(whole.to_string("srt"), "srt") if cues else []) == arrowless
    rows = tsv_rows(whole.to_string("tsv"))
    assert [row.text for row in rows] == [text for segment in whole.segments if (text := one_line(segment.text))]
    assert all(one.end_ms <= other.start_ms for one, other in pairwise(rows))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.from_regex(r"[a-z]{1,12}[.,]?", fullmatch=True), min_size=1, max_size=80),
    st.floats(0.1, 1.5),
    st.integers(1, 3),
)
def test_known_words_are_all_shown_within_the_limits(words: list[str], word_s: float, lines: int) -> None:
    segment = spoken(" ".join(words), word_s=word_s)
    cues = cues_of(transcript(segment), CueLimits(lines=lines))
    assert one_line(" ".join(cue.text for cue in cues)) == segment.text
    for cue in cues:
        assert cue.end_ms - cue.start_ms <= 7001
        assert len(cue.text.split("\n")) <= lines
        assert max(map(len, cue.text.split("\n"))) <= 42
    assert not re.search("  ", "".join(cue.text for cue in cues))


def test_a_transcript_of_one_endless_segment_is_split_too() -> None:
    cues = cues_of(transcript(spoken(" ".join([SPEECH] * 60))))
    assert one_line(" ".join(cue.text for cue in cues)) == " ".join([SPEECH] * 60)


@pytest.mark.parametrize("wrong", [{"line_characters": 5}, {"lines": 0}, {"duration_s": 0}])
def test_limits_that_show_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greater than"):
        CueLimits(**wrong)
