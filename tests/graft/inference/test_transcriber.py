"""The Transcriber, of a graft and of a Whisper: the text of the model's generate, long audio, bad audio as a value."""

import asyncio
import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

import graft
from graft.audio.chunking import Chunk, windows
from graft.audio.clip import AudioClip, read_audio
from graft.checkpoints.loading import open_graft, open_model
from graft.errors import AudioError, ModelError
from graft.inference.engines.graft_decoder import GraftDecoder
from graft.inference.engines.sampling import has_repeated_ngram
from graft.inference.engines.transformers_engine import TransformersEngine
from graft.inference.hallucination import NO_REPEAT_NGRAM
from graft.inference.segments import ScoredSegment, ScoredToken, Segment
from graft.inference.transcriber import Transcriber, open_transcriber
from graft.processor import GraftProcessor, max_new_tokens
from graft.text.wer import score
from tests.support import media, tiny_models
from tests.support.paths import ROOT
from tests.support.speech_corpus import save_tiny_whisper

PROMPTS = ROOT / "jobs" / "data" / "prompts"


def make_clip(seconds: float, seed: int = 0) -> AudioClip:
    """Make noise of changing loudness."""
    generator = np.random.default_rng(seed)
    count = int(seconds * 16_000)
    loudness = np.repeat(generator.uniform(0.01, 0.3, count // 800 + 1), 800)[:count]
    return AudioClip((generator.standard_normal(count) * loudness).astype(np.float32))


def save_tiny(kind: str, folder: Path) -> Path:
    return Path(tiny_models.save_tiny_graft(folder) if kind == "graft" else save_tiny_whisper(folder, varied=True))


@pytest.fixture(scope="module", params=["graft", "whisper"])
def folder(request, tmp_path_factory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("tiny") / f"tiny-{request.param}")


@pytest.fixture(scope="module")
def graft_folder(tmp_path_factory) -> Path:
    return save_tiny("graft", tmp_path_factory.mktemp("tiny") / "tiny-graft")


@pytest.fixture(scope="module")
def transcriber(folder):
    transcriber = open_transcriber(folder, chunker=windows)
    yield transcriber
    transcriber.close()


def generated(model, processor, clip: AudioClip, count: int) -> list[int]:
    """Return the answer of the model's own generate, of at most `count` tokens."""
    if isinstance(processor, GraftProcessor):
        inputs = processor(audio=clip)
    else:
        extractor = WhisperFeatureExtractor(feature_size=80)
        inputs = extractor(clip.samples, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True)
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0].tolist()
    prompt = processor.prompt_ids(processor.featurizer(clip).frame_count)
    return ids[len(prompt) :] if ids[: len(prompt)] == prompt else ids  # Whisper's leaves out how the text begins


def test_text_equals_the_models_own_generate(folder, transcriber):
    model, processor = open_model(folder)
    clip = make_clip(0.5)
    ids = generated(model, processor, clip, max_new_tokens(0.5))
    transcript = transcriber.transcribe(clip)
    assert not has_repeated_ngram(ids, NO_REPEAT_NGRAM)  # so the chunk is not decoded again
    assert transcript.text == " ".join(processor.tokenizer.decode(ids, skip_special_tokens=True).split()) != ""
    assert (transcript.model, transcript.duration_s) == (folder.name, 0.5)
    (segment,) = transcript.segments
    assert (segment.start_s, segment.end_s, segment.flags) == (0.0, 0.5, ("low_confidence", "truncated"))
    assert segment.mean_logprob < -1


def test_an_answer_that_ends_by_itself_is_not_flagged_as_truncated(folder, tmp_path):
    model, processor = open_model(folder)
    clip = make_clip(0.5)
    ids = generated(model, processor, clip, 8)
    end = ids[2]
    other = shutil.copytree(folder, tmp_path / "ending")
    model.generation_config.eos_token_id = end
    model.generation_config.save_pretrained(other)
    ending = open_transcriber(other, chunker=windows)
    (segment,) = ending.transcribe(clip).segments
    ending.close()
    assert segment.flags == ("low_confidence",)
    assert segment.text == " ".join(processor.tokenizer.decode(ids[: ids.index(end)]).split())


def test_paths_bytes_and_clips_give_the_same_text(transcriber, tmp_path):
    clip = make_clip(0.8)
    soundfile.write(tmp_path / "a.flac", clip.samples, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    read = read_audio(data)
    texts = {
        transcriber.transcribe(audio).text for audio in (tmp_path / "a.flac", str(tmp_path / "a.flac"), data, read)
    }
    assert len(texts) == 1


@pytest.mark.seconds
def test_over_30_s_every_second_is_in_one_segment(transcriber):
    clip = make_clip(64.0)
    transcript = transcriber.transcribe(clip)
    starts = [segment.start_s for segment in transcript.segments]
    ends = [segment.end_s for segment in transcript.segments]
    assert (starts[0], ends[-1]) == (0.0, 64.0)
    assert starts[1:] == ends[:-1]
    assert len(starts) == 3
    assert transcript.text == " ".join(segment.text for segment in transcript.segments if segment.text)


@pytest.mark.seconds
def test_many_together_equal_each_alone_and_bad_ones_are_values(transcriber, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    clips = [make_clip(seconds, seed) for seed, seconds in enumerate([0.3, 2.0, 31.0, 0.05])]
    results = transcriber.transcribe_many([clips[0], tmp_path / "empty.wav", *clips[1:3], b"no audio", clips[3]])
    assert [type(result) for result in results] == [
        graft.Transcript,
        AudioError,
        graft.Transcript,
        graft.Transcript,
        AudioError,
        graft.Transcript,
    ]
    alone = [transcriber.transcribe(clip) for clip in clips]
    together = [result for result in results if isinstance(result, graft.Transcript)]
    assert [one.text for one in together] == [one.text for one in alone]
    assert "empty.wav" in str(results[1])
    assert transcriber.transcribe_many([]) == []


def test_channels_are_told_apart_and_ordered_by_time(transcriber, tmp_path):
    one, two = (make_clip(0.6, seed).samples for seed in (1, 2))
    soundfile.write(tmp_path / "call.wav", np.stack([one, two], axis=1), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", one, 16_000, subtype="FLOAT")
    split = transcriber.transcribe(tmp_path / "call.wav", channels="split")
    assert [(segment.channel, segment.start_s, segment.end_s) for segment in split.segments] == [
        (1, 0.0, 0.6),
        (2, 0.0, 0.6),
    ]
    alone = [transcriber.transcribe(AudioClip(samples)).text for samples in (one, two)]
    assert [segment.text for segment in split.segments] == alone
    assert (split.text, split.duration_s) == (" ".join(alone), 0.6)
    for mono in (tmp_path / "mono.wav", AudioClip(one)):
        (segment,) = transcriber.transcribe(mono, channels="split").segments
        assert (segment.channel, segment.text) == (1, alone[0])
    mixed = transcriber.transcribe(AudioClip((one + two) / 2))
    assert transcriber.transcribe(tmp_path / "call.wav").segments[0].text == mixed.text
    assert transcriber.transcribe_many([tmp_path / "call.wav"], channels="split") == [split]
    (tmp_path / "film.mkv").write_bytes(media.tracks({"eng": one, "ger": two}, 16_000))
    for channels, track in (("mix", "ger"), ("split", 2)):
        (segment,) = transcriber.transcribe(tmp_path / "film.mkv", channels=channels, audio_track=track).segments
        assert segment.text == alone[1]
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 16_000)
    for bad in ("empty.wav", "none.wav", "missing.wav"):
        with pytest.raises(AudioError, match=bad):
            transcriber.transcribe(tmp_path / bad, channels="split")


def test_progress_is_told_the_share_of_the_speech(graft_folder):
    def halves(clip: AudioClip) -> list[Chunk]:
        return windows(clip, max_s=1.0) if len(clip.samples) else []

    with closing(open_transcriber(graft_folder, chunker=halves)) as transcriber:
        clip, shares, both = make_clip(1.9), [], []
        told = transcriber.transcribe(clip, progress=shares.append)
        assert told.text == transcriber.transcribe(clip).text
        assert len(shares) == len(told.segments) + 1 > 2
        assert shares == sorted(shares)
        transcriber.transcribe_many([clip, b"no audio", clip], progress=both.append)
        assert len(both) == 2 * len(told.segments) + 1
        assert both == sorted(both)
        assert (shares[0], shares[-1], both[0], both[-1]) == (0.0, 1.0, 0.0, 1.0)
        silent: list[float] = []
        transcriber.transcribe(AudioClip(np.zeros(0, np.float32)), progress=silent.append)
        assert silent == [1.0]
        with pytest.raises(KeyError):
            transcriber.transcribe(clip, progress={}.__getitem__)


def test_instruction_and_context_reach_the_model(tmp_path):
    transcriber = open_transcriber(
        tiny_models.save_tiny_graft(tmp_path, trained_styles=["raw"], trained_context=True), chunker=windows
    )
    clip = make_clip(1.0)
    plain, raw = transcriber.transcribe(clip), transcriber.transcribe(clip, instruction="raw")
    listed = transcriber.transcribe(clip, instruction="raw", context=["Aachen", "Zwolle"])
    assert len({plain.text, raw.text, listed.text}) == 3
    assert transcriber.transcribe_many([clip], instruction="raw", context=["Aachen", "Zwolle"])[0].text == listed.text
    assert (
        transcriber.transcribe(clip, instruction="lower", context=None) == plain
    )  # its own style needs no instruction
    transcriber.close()


def test_styles_and_context_that_the_model_was_not_trained_for_are_refused(folder, transcriber):
    clip = make_clip(0.2)
    own, other = ("lower", "raw") if folder.name == "tiny-graft" else ("raw", "lower")
    with pytest.raises(
        ModelError, match=rf"instruction '{other}': this checkpoint was trained for {own}: give one of these"
    ):
        transcriber.transcribe(clip, instruction=other)
    assert transcriber.transcribe(clip, instruction=own) == transcriber.transcribe(clip)
    with pytest.raises(ModelError, match="context: this checkpoint was not trained for lists of words"):
        transcriber.transcribe_many([clip], context=["Aachen"])
    assert transcriber.transcribe(clip, context=[]) == transcriber.transcribe(clip)


def test_one_unreadable_file_raises(transcriber):
    with pytest.raises(AudioError, match="missing\\.wav"):
        transcriber.transcribe("missing.wav")


def test_works_where_an_event_loop_already_runs(transcriber):
    clip = make_clip(0.4)

    async def in_a_notebook():
        return transcriber.transcribe(clip)

    assert asyncio.run(in_a_notebook()) == transcriber.transcribe(clip)


@pytest.mark.seconds
def test_threads_and_coroutines_may_share_a_transcriber(transcriber):
    clips = [make_clip(0.2 + seed / 10, seed) for seed in range(8)]

    async def all_at_once():
        return await asyncio.gather(*map(transcriber.transcribe_async, clips))

    alone = [transcriber.transcribe(clip).text for clip in clips]
    assert [one.text for one in asyncio.run(all_at_once())] == alone
    with ThreadPoolExecutor(8) as threads:
        assert [one.text for one in threads.map(transcriber.transcribe, clips)] == alone


def test_a_request_that_is_cancelled_leaves_the_engine_at_once(transcriber):
    async def cancel(request) -> None:
        task = asyncio.create_task(request)
        while not transcriber.counts().running:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    async def read_one_part() -> None:
        async with aclosing(transcriber.stream_chunk(windows(make_clip(20.0))[0])) as parts:
            assert await anext(parts)

    async def run() -> None:
        before = transcriber.counts().tokens
        await cancel(transcriber.transcribe_async(make_clip(64.0)))
        await cancel(transcriber.transcribe_chunks(windows(make_clip(64.0))))
        await read_one_part()
        while transcriber.counts().running:
            await asyncio.sleep(0.001)
        assert transcriber.counts().waiting == 0
        assert transcriber.counts().tokens - before < 7 * max_new_tokens(20.0)

    asyncio.run(run())


def test_concurrent_requests_share_batches(graft_folder):
    model, processor = open_graft(graft_folder)
    clip_counts: list[int] = []
    model.audio_tower.conv1.register_forward_hook(lambda _, inputs, __: clip_counts.append(inputs[0].shape[0]))
    engine = TransformersEngine(GraftDecoder(model, pad_id=processor.tokenizer.pad_token_id), eos_ids=())
    transcriber = Transcriber(engine, processor, "tiny")
    clips = [make_clip(3.0, seed) for seed in range(6)]
    transcriber.transcribe_many(clips)
    assert clip_counts[0] == 6
    clip_counts.clear()

    async def online():
        await asyncio.gather(*map(transcriber.transcribe_async, clips))

    asyncio.run(online())
    transcriber.close()
    assert max(clip_counts) > 1


def test_a_folder_that_is_no_graft_is_refused(tmp_path):
    with pytest.raises(ModelError, match="config\\.json"):
        open_transcriber(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'fp7', not one of fp32, bf16, int8"):
        open_transcriber(tmp_path, dtype="fp7")


def test_dtype_and_device_are_used(folder):
    transcriber = open_transcriber(folder, device="cpu", dtype="bf16", chunker=windows)
    assert transcriber._engine._decoder._model.dtype == torch.bfloat16
    assert transcriber.transcribe(make_clip(0.3)).segments
    transcriber.close()


def test_exported_names():
    assert sorted(graft.__all__) == [
        "AudioClip",
        "GraftError",
        "Segment",
        "Transcriber",
        "Transcript",
        "Word",
        "__version__",
        "load",
    ]
    for name in graft.__all__:
        assert getattr(graft, name) is not None
        assert name in dir(graft)
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = graft.unload


@pytest.mark.processes
def test_import_graft_is_cheap():
    heavy = "('torch', 'transformers', 'numpy', 'ray')"
    script = f"import sys, graft; print(graft.__version__, [m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split(maxsplit=1)[1].strip() == "[]"


def test_uploads_in_every_container(transcriber):
    clip = make_clip(0.6)
    for kind in ("wav", "flac", "ogg", "mp3"):
        file = io.BytesIO()
        soundfile.write(file, clip.samples, 16_000, format=kind)
        assert transcriber.transcribe(file.getvalue()).duration_s == pytest.approx(0.6, abs=0.1)


def test_a_streamed_chunk_has_the_text_of_a_whole_one(transcriber):
    chunk = windows(make_clip(1.5, seed=3))[0]

    async def stream() -> list[str | Segment]:
        return [part async for part in transcriber.stream_chunk(chunk)]

    *parts, segment = asyncio.run(stream())
    (whole,) = asyncio.run(transcriber.transcribe_chunks([chunk]))
    assert len(parts) > 3
    assert "".join(parts) == segment.text == whole.text != ""
    assert (segment.start_s, segment.end_s, segment.flags) == (whole.start_s, whole.end_s, whole.flags)


def test_a_scored_segment_has_the_tokens_of_its_text(transcriber):
    chunk = windows(make_clip(1.5, seed=3))[0]

    async def stream() -> list[str | ScoredToken | Segment]:
        return [part async for part in transcriber.stream_chunk(chunk, scored=True)]

    *parts, streamed = asyncio.run(stream())
    (plain,) = asyncio.run(transcriber.transcribe_chunks([chunk]))
    (scored,) = asyncio.run(transcriber.transcribe_chunks([chunk], scored=True))
    assert isinstance(scored, ScoredSegment)
    assert isinstance(streamed, ScoredSegment)
    assert type(plain) is Segment
    assert scored.text == streamed.text == plain.text != ""
    written = b"".join(token.data for token in scored.tokens).decode(errors="replace")
    assert " ".join(written.split()) == scored.text
    assert np.mean([token.logprob for token in scored.tokens]) == pytest.approx(scored.mean_logprob, abs=1e-4)
    assert [part for part in parts if isinstance(part, ScoredToken)] == list(streamed.tokens) == list(scored.tokens)
    assert isinstance(parts[0], ScoredToken)  # before the text that it completes
    assert scored.prompt_token_count == streamed.prompt_token_count > 0


def test_a_text_begins_with_its_prefix(transcriber):
    chunk = windows(make_clip(1.5, seed=3))[0]

    async def transcribe(**options) -> ScoredSegment:
        (segment,) = await transcriber.transcribe_chunks([chunk], scored=True, **options)
        return segment

    plain, prefixed = asyncio.run(transcribe()), asyncio.run(transcribe(prefix="go, on"))
    assert prefixed.text.startswith("go, on")
    assert len(prefixed.text) > len("go, on") + 3
    assert prefixed.text != plain.text
    given = [token for token in prefixed.tokens if token.logprob == 0]
    assert b"".join(token.data for token in given).decode().strip() == "go, on"
    assert prefixed.prompt_token_count == plain.prompt_token_count
    rest = [token.logprob for token in prefixed.tokens if token.logprob]
    assert prefixed.mean_logprob == pytest.approx(np.mean(rest), abs=1e-4)


@pytest.mark.slow
@pytest.mark.bundled
@pytest.mark.parametrize("model", ["small", "whisper"])
def test_speech_is_transcribed_alike_after_the_first_words_of_its_text(model):
    chunk = windows(read_audio(media.PROMPTS[0]))[0]
    with closing(open_transcriber(model, chunker=windows)) as transcriber:
        (whole,) = asyncio.run(transcriber.transcribe_chunks([chunk]))
        words = whole.text.split(" ")
        for count in range(len(words) + 1):
            (segment,) = asyncio.run(transcriber.transcribe_chunks([chunk], prefix=" ".join(words[:count])))
            assert segment.text == whole.text


@pytest.mark.slow
@pytest.mark.bundled
def test_the_bundled_whisper_transcribes_speech_alone_together_and_over_30_s():
    rows = [json.loads(line) for line in (PROMPTS / "unseen.jsonl").read_text().splitlines()[:4]]
    texts = [row["text"] for row in rows]
    clips = [read_audio(PROMPTS / row["audio"]) for row in rows]
    pause = np.zeros(16_000, np.float32)
    long = AudioClip(np.concatenate([part for clip in clips * 3 for part in (clip.samples, pause)]))
    assert long.duration_s > 30
    transcriber = open_transcriber("whisper")
    *together, long_text = transcriber.transcribe_many([*clips, long])
    assert all(-1 < one.segments[0].mean_logprob < 0 for one in together)
    assert score(texts, [one.text for one in together]).wer < 0.15
    assert score([" ".join(texts * 3)], [long_text.text]).wer < 0.25
    assert transcriber.transcribe(clips[1]).text == together[1].text
    assert (long_text.model, {flag for one in long_text.segments for flag in one.flags}) == ("whisper", set())
    transcriber.close()
