"""The benchmarks of bulk transcription, small: the stand-in is an engine, the bare loop does the pipeline's work."""

import asyncio
import functools
import json
import os
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from graft.audio.chunking import Chunk
from graft.audio.clip import read_audio
from graft.checkpoints.loading import multiplies_bf16
from graft.errors import AudioError, DataError
from graft.inference.engines.sampling import has_repeated_ngram
from graft.inference.hallucination import NO_REPEAT_NGRAM
from graft.inference.transcriber import _Asked
from jobs.bench import main as bench
from jobs.benchmarks.bulk import (
    ITEMS_PER_BATCH,
    STARTING,
    TOKENS_PER_S,
    open_stand_in,
    steady_rate,
    transcribe_bare,
)
from jobs.benchmarks.measuring import watch
from jobs.benchmarks.speech import DISTINCT, MANIFESTS, labelled_speech, write_archive, write_long_recording
from jobs.transcription.discovery import find_recordings
from jobs.transcription.work_items import durations, plan_items
from tests.support import media, tiny_models

pytestmark = pytest.mark.usefixtures("thread_count")


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("bulk") / "graft"))


def test_the_stand_in_answers_at_its_rate_and_without_loops(graft: str) -> None:
    transcriber = open_stand_in(graft, 200.0)
    clips = [read_audio(path) for path in media.PROMPTS[:40]]
    start = time.monotonic()
    segments = asyncio.run(transcriber.transcribe_chunks([Chunk(0.0, clip) for clip in clips]))
    assert time.monotonic() - start >= sum(clip.duration_s for clip in clips) / 200
    assert [segment.flags for segment in segments] == [()] * len(clips)
    engine = transcriber._engine
    assert not has_repeated_ngram(engine._answer_ids, 2 * NO_REPEAT_NGRAM)

    asked = _Asked(None, None, None, words=False)

    async def count_tokens() -> int:
        return len([token async for token in engine.stream(transcriber._featurize(Chunk(0.0, clips[0]), asked))])

    assert asyncio.run(count_tokens()) == round(-(-len(clips[0].samples) // 160) / 100 * TOKENS_PER_S)
    transcriber.close()


def test_the_bare_loop_transcribes_every_item(graft: str, tmp_path: Path) -> None:
    count = (STARTING + 1) * ITEMS_PER_BATCH + 5
    written = write_archive(tmp_path / "archive", count, seconds=0.5)
    assert len(written) == DISTINCT
    recordings = find_recordings([str(tmp_path / "archive")])
    plan = plan_items(recordings, item_s=60.0, probe=durations)
    assert len(plan) == count
    transcribe_bare(plan, functools.partial(open_stand_in, graft, 50_000.0), tmp_path)
    files = sorted((tmp_path / "items").glob("*.parquet"))
    assert len(files) == STARTING + 2
    assert sorted(id for file in files for id in pq.read_table(file)["id"].to_pylist()) == sorted(
        plan["id"].to_pylist()
    )
    assert steady_rate(tmp_path, count) > 0
    files[-1].unlink()
    with pytest.raises(RuntimeError, match=f"of {count} clips have results"):
        steady_rate(tmp_path, count)


def test_a_long_recording_is_as_long_as_asked(tmp_path: Path) -> None:
    write_long_recording(tmp_path / "long.wav", 0.1)
    info = soundfile.info(tmp_path / "long.wav")
    assert (info.frames, info.samplerate, info.subtype) == (360 * 8000, 8000, "ULAW")
    assert (tmp_path / "long.wav").stat().st_size < 360 * 8000 + 1000


def hold_memory(own_mb: int, child: str = "") -> str:
    """Write a script that holds memory, and starts another."""
    held = f"held = bytearray({own_mb} << 20); held[::4096] = b'x' * len(held[::4096])"
    return f"import subprocess, sys, time; {held}; " + (
        f"subprocess.run([sys.executable, '-c', {child!r}])" if child else "time.sleep(2)"
    )


@pytest.mark.processes
def test_the_memory_of_a_process_and_of_those_below_it_is_seen() -> None:
    seen = watch(exec, hold_memory(100, hold_memory(300)))
    assert 100 < seen.peak_mb() < 300
    assert 300 < seen.peak_mb("python") < 500
    assert seen.peak_mb("no such process") == 0
    assert watch(divmod, 7, 2).result == (3, 1)
    with pytest.raises(ZeroDivisionError):
        watch(divmod, 1, 0)
    with pytest.raises(BrokenProcessPool):
        watch(os._exit, 1)


def test_labelled_speech_is_read_whole_or_refused(tmp_path: Path) -> None:
    assert len(labelled_speech(None)) == len(media.PROMPTS)
    manifest = tmp_path / "speech.jsonl"
    soundfile.write(tmp_path / "long.wav", media.speech(16_000, seconds=31.0, channels=1), 16_000)
    manifest.write_text(json.dumps({"id": "long", "audio": "long.wav", "text": "too long"}))
    with pytest.raises(AudioError, match=r"long\.wav: 31\.0 s"):
        labelled_speech([str(manifest)])
    manifest.write_text(json.dumps({"id": "mute", "audio": "long.wav"}))
    with pytest.raises(DataError, match=r"speech\.jsonl: line 1: "):
        labelled_speech([str(manifest)])


@pytest.mark.slow
@pytest.mark.bundled
def test_peers_transcribe_and_missing_ones_are_named(
    graft: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "speech.jsonl"
    rows = [json.loads(line) for line in Path(MANIFESTS[0]).read_text().splitlines()[:3]]
    manifest.write_text(
        "\n".join(json.dumps(row | {"audio": str(Path(MANIFESTS[0]).parent / row["audio"])}) for row in rows)
    )
    file = tmp_path / "bulk.json"
    arguments = ["--model", graft, "--speech", str(manifest), "--json", str(file)]
    assert bench(["bulk", "--only", "peers,bf16", *arguments]) == 0
    numbers = json.loads(file.read_text())
    assert numbers["peers"]["transformers WER %"] < 30 < numbers["peers"]["graft WER %"]
    assert numbers["peers"]["graft clips"] == 3
    assert numbers["bf16"].get("clips") == (3 if multiplies_bf16("cpu") else None)
    assert numbers["peers"]["graft audio s"] == pytest.approx(sum(row["duration_s"] for row in rows), abs=0.1)
    assert numbers["peers"]["graft MB"] > 100
    assert ("faster-whisper is not installed: pip install faster-whisper" in capfd.readouterr().out) == (
        "faster-whisper int8 WER %" not in numbers["peers"]
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_keeps_pace_with_the_bare_loop(graft: str, tmp_path: Path) -> None:
    """Ray keeps pace at the device's own rate and where the device is the bottleneck. This wants idle cores."""
    file = tmp_path / "bulk.json"
    assert bench(["bulk", "--only", "pipeline", "--model", graft, "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())["pipeline"]
    assert numbers["device_ray_to_bare"] >= 0.95
    assert numbers["slowed_ray_to_bare"] >= 0.95


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_archive(graft: str, tmp_path: Path) -> None:
    """Memory is bounded from 100 to 10,000 recordings, in ten hours of one, and with a plan of a million rows."""
    file = tmp_path / "bulk.json"
    assert bench(["bulk", "--only", "memory", "--model", graft, "--json", str(file)]) == 0
    numbers = json.loads(file.read_text())["memory"]
    assert (numbers["few_recordings"], numbers["many_recordings"], numbers["long_hours"]) == (100, 10_000, 10)
    assert numbers["many_driver_mb"] - numbers["few_driver_mb"] < 200
    assert min(numbers["long_reader_mb"], numbers["long_transcriber_mb"]) > 0
    assert max(numbers["long_reader_mb"], numbers["long_transcriber_mb"]) < 2048
    assert numbers["plan_rows"] == 1_000_000
    assert numbers["plan_s"] < 120
    assert numbers["plan_driver_mb"] < 1024
