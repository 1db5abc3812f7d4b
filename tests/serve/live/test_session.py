"""Test live sessions without sockets: messages may be of any size, words stay, and the last text is the model's own."""

import asyncio
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from graft.audio.chunking import Chunk, windows
from graft.audio.clip import SAMPLE_RATE, read_audio
from graft.inference.segments import Segment
from graft.inference.transcriber import Transcriber, open_transcriber
from serve.live.agreement import Agreement
from serve.live.formats import AudioReader, Pcm, Pcma, Pcmu
from serve.live.samples import SampleBuffer
from serve.live.session import EmptyBuffer, LiveSession
from serve.live.settings import SessionSettings
from serve.live.turns import TurnDetector, open_scorer
from serve.service import TranscriptionOptions
from tests.support import media, tiny_models

pytestmark = pytest.mark.seconds
SILENCE = np.zeros(SAMPLE_RATE, np.float32)


def spoken(*places: int) -> np.ndarray:
    """Join real prompts with a second of silence around each: float32 samples at 16 kHz."""
    clips = [read_audio(media.PROMPTS[place]).samples for place in places]
    return np.concatenate([SILENCE, *(part for clip in clips for part in (clip, SILENCE))])


def pcm(samples: np.ndarray) -> bytes:
    return (np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes()


@pytest.fixture(scope="module")
def transcriber(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transcriber]:
    folder = tiny_models.save_tiny_graft(tmp_path_factory.mktemp("live") / "graft")
    opened = open_transcriber(folder, chunker=windows)
    yield opened
    opened.close()


class Heard:
    """A session over a real model, the events that it sends, and the passes that it asks for."""

    def __init__(self, transcriber: Transcriber, fault: Callable[[int], bool] = lambda _: False) -> None:
        self.events: list[dict[str, Any]] = []
        self.passes: list[tuple[Chunk, TranscriptionOptions, bool]] = []
        self._transcriber, self._fault = transcriber, fault
        self.session = LiveSession(
            self._transcribe,
            self.events.append,
            open_scorer(),
            options=TranscriptionOptions(),
            describe_error=lambda error: {"message": str(error)},
        )
        self.session.update(SessionSettings().changed({"audio": {"input": {"format": PCM16}}}), TranscriptionOptions())

    async def _transcribe(
        self, chunk: Chunk, options: TranscriptionOptions, *, is_last: bool
    ) -> tuple[Segment, str | None]:
        self.passes.append((chunk, options, is_last))
        if self._fault(len(self.passes)):
            raise ValueError("the engine failed")
        (segment,) = await self._transcriber.transcribe_chunks([chunk], prefix=options.prefix)
        return segment, options.language

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"].endswith(kind)]

    @property
    def texts(self) -> list[str]:
        return [event["transcript"] for event in self.of_type(".completed")]


PCM16 = {"type": "audio/pcm", "rate": 16_000}


async def hear(heard: Heard, samples: np.ndarray, step_s: float = 0.1) -> None:
    """Send audio in steps, let every pass end before the next step, and wait for the last texts."""
    running = asyncio.create_task(heard.session.run())
    data, step = pcm(samples), 2 * round(step_s * SAMPLE_RATE)
    for start in range(0, len(data), step):
        await heard.session.append(data[start : start + step])
        await asyncio.sleep(0)
    await heard.session.finish()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_each_utterance_has_its_events_in_order_and_deltas_are_its_text(transcriber: Transcriber) -> None:
    heard = Heard(transcriber)
    asyncio.run(hear(heard, spoken(10, 40)))
    kinds = [event["type"].rpartition(".")[2] for event in heard.events]
    ends = [kind for kind in kinds if kind != "delta"]
    assert ends.count("completed") == ends.count("committed") == ends.count("speech_started") == len(heard.texts) >= 2
    for event in heard.of_type(".completed"):
        own = [one for one in heard.events if one.get("item_id") == event["item_id"]]
        order = [one["type"].rpartition(".")[2] for one in own]
        assert order[0] == "speech_started"
        assert order[-1] == "completed"
        assert order.index("speech_stopped") < order.index("committed") < len(order) - 1
        assert "".join(one["delta"] for one in own if "delta" in one) == event["transcript"]
        assert event["usage"]["seconds"] > 0
    started, stopped = heard.of_type("speech_started"), heard.of_type("speech_stopped")
    assert all(one["audio_start_ms"] < other["audio_end_ms"] for one, other in zip(started, stopped, strict=True))
    previous = [one["previous_item_id"] for one in heard.of_type("committed")]
    assert previous == [None, *(one["item_id"] for one in heard.of_type("committed")[:-1])]


def test_how_audio_is_cut_into_messages_changes_no_utterance(transcriber: Transcriber) -> None:
    samples = spoken(10)
    bounds = []
    for step_s in (0.02, 0.1, 0.7):
        heard = Heard(transcriber)
        asyncio.run(hear(heard, samples, step_s))
        started, stopped = heard.of_type("speech_started"), heard.of_type("speech_stopped")
        bounds.append(
            [(one["audio_start_ms"], other["audio_end_ms"]) for one, other in zip(started, stopped, strict=True)]
        )
        # The last pass over an utterance is what the model writes of its audio, after the words that were agreed on.
        chunk, options, _ = heard.passes[-1]
        (segment,) = asyncio.run(transcriber.transcribe_chunks([chunk], prefix=options.prefix))
        assert heard.texts[-1] == segment.text
    assert bounds[0] == bounds[1] == bounds[2]


def test_commit_ends_an_utterance_without_detection_and_an_empty_one_is_refused(transcriber: Transcriber) -> None:
    async def run() -> Heard:
        heard = Heard(transcriber)
        changes = {"audio": {"input": {"turn_detection": None}}}
        heard.session.update(heard.session.settings.changed(changes), TranscriptionOptions())
        running = asyncio.create_task(heard.session.run())
        with pytest.raises(EmptyBuffer):
            await heard.session.commit()
        await heard.session.append(pcm(spoken(10)))
        assert not heard.of_type("speech_started")
        await heard.session.commit()
        await heard.session.finish()
        with pytest.raises(EmptyBuffer):
            await heard.session.commit()
        await heard.session.append(pcm(spoken(40)))
        heard.session.clear()
        with pytest.raises(EmptyBuffer):
            await heard.session.commit()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return heard

    heard = asyncio.run(run())
    assert [one["type"].rpartition(".")[2] for one in heard.events if "delta" not in one] == [
        "committed",
        "completed",
        "cleared",
    ]
    assert heard.of_type("completed")[0]["usage"]["seconds"] == pytest.approx(len(spoken(10)) / SAMPLE_RATE, abs=0.01)


def test_an_early_pass_that_fails_does_no_harm_and_a_last_one_ends_its_utterance_alone(
    transcriber: Transcriber, caplog: pytest.LogCaptureFixture
) -> None:
    first = Heard(transcriber, lambda number: number == 1)
    asyncio.run(hear(first, spoken(10)))
    assert len(first.texts) == 1
    every = Heard(transcriber, lambda _: True)
    asyncio.run(hear(every, spoken(10, 40)))
    failed = every.of_type(".failed")
    assert len(failed) >= 2
    assert all(one["error"] == {"message": "the engine failed"} for one in failed)
    assert "a pass over live speech failed: ValueError" in caplog.text


def test_silence_has_no_events(transcriber: Transcriber) -> None:
    heard = Heard(transcriber)
    rng = np.random.default_rng(0)
    asyncio.run(hear(heard, np.concatenate([SILENCE, 1e-3 * rng.standard_normal(3 * SAMPLE_RATE).astype(np.float32)])))
    assert heard.events == []
    assert heard.passes == []


def test_long_speech_is_cut_into_pieces_of_one_utterance(transcriber: Transcriber) -> None:
    samples = media.speech(SAMPLE_RATE, seconds=40.0, channels=1)[:, 0]
    heard = Heard(transcriber)
    changes = {"audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 10_000}}}}
    heard.session.update(heard.session.settings.changed(changes), TranscriptionOptions())

    async def run() -> None:
        running = asyncio.create_task(heard.session.run())
        await heard.session.append(pcm(samples))
        await heard.session.commit()
        await heard.session.finish()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(run())
    assert len(heard.texts) == 1
    assert max(chunk.clip.duration_s for chunk, _, _ in heard.passes) <= 28.1
    assert len({chunk.start_s for chunk, _, _ in heard.passes}) >= 2


def test_words_that_two_passes_agree_on_are_new_once_and_stay() -> None:
    agreement = Agreement()
    assert agreement.add("good morn", is_spoken=True) == ""
    assert agreement.add("good morning to", is_spoken=True) == "good"
    assert agreement.add("good morning to you", is_spoken=True) == " morning to"
    assert agreement.add("bad evening", is_spoken=True) == ""
    assert agreement.text == "good morning to"
    assert agreement.finish("good morning to you all") == " you all"
    other = Agreement()
    other.add("one two three", is_spoken=True)
    other.add("one two three", is_spoken=True)
    assert other.finish("a b c d") == " c d"  # words that were sent stay
    assert other.text == "one two c d"


FORMATS = [*(Pcm(rate=rate) for rate in (16_000, 24_000, 48_000)), Pcmu(type="audio/pcmu"), Pcma(type="audio/pcma")]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_formats_are_decoded_alike_whatever_the_messages(format: Any) -> None:
    speech = read_audio(media.PROMPTS[10]).samples
    rate = format.rate if isinstance(format, Pcm) else 8_000
    sent = soxr.resample(speech, SAMPLE_RATE, rate)
    subtype = {"audio/pcm": "PCM_16", "audio/pcmu": "ULAW", "audio/pcma": "ALAW"}[format.type]
    file = io.BytesIO()
    soundfile.write(file, sent, rate, format="RAW", subtype=subtype, endian="LITTLE")
    data = file.getvalue()
    decoded = []
    for step in (1 if len(data) < 1000 else 333, 4_000, len(data)):
        reader = AudioReader(format)
        parts = [reader.read(data[start : start + step]) for start in range(0, len(data), step)]
        decoded.append(np.concatenate([*parts, reader.flush()]))
    np.testing.assert_array_equal(decoded[0], decoded[1])
    np.testing.assert_array_equal(decoded[0], decoded[2])
    count = min(len(decoded[0]), len(speech))
    assert abs(len(decoded[0]) - len(speech)) < 50
    assert np.corrcoef(decoded[0][:count], speech[:count])[0, 1] > (0.9 if rate == 8_000 else 0.99)


def test_the_buffer_keeps_positions_when_it_forgets() -> None:
    buffer, samples = SampleBuffer(), np.arange(100, dtype=np.float32)
    for start in range(0, 100, 7):
        buffer.add(samples[start : start + 7])
    buffer.drop_before(30)
    assert buffer.start == 28
    assert buffer.end == 100
    np.testing.assert_array_equal(buffer.copy(40, 60), samples[40:60])
    assert len(buffer.copy(90, 200)) == 10


def test_speech_begins_once_it_is_sure_and_ends_with_its_last_sound() -> None:
    detector = TurnDetector(0.5)
    assert [detector.add(score) for score in (0.1, 0.9, 0.1, 0.1)] == [False] * 4  # a click
    for _ in range(40):
        detector.add(0.0)
    begun = [detector.add(0.9) for _ in range(10)]
    assert begun.count(True) == 1
    start = detector.speech_start
    assert start is not None
    end = detector.speech_end
    for _ in range(5):
        detector.add(0.05)
    assert (detector.speech_start, detector.speech_end) == (start, end)
    assert detector.silence == 5 * 512
