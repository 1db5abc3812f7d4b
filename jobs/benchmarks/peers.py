"""Measure ways to transcribe on a CPU, on the same clips: Whisper base by graft, transformers and faster-whisper.

Each transcribes decoded clips in a fresh process on one thread, greedily, after one clip to warm up. As a program with
the arguments FOLDER PORT this module serves faster-whisper behind a plain FastAPI server.
"""

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch

from graft.audio.chunking import windows
from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.checkpoints.bundled.cache import bundled_whisper
from graft.checkpoints.loading import multiplies_bf16, multiplies_int8
from graft.checkpoints.names import INT8, WHISPER
from graft.inference.transcriber import open_transcriber
from graft.text.wer import score

from ..common.console import quiet_libraries
from .measuring import Numbers, Row, report, report_table, seconds_of, watch
from .speech import labelled_speech

Transcribe = Callable[[Sequence[AudioClip]], list[str]]

# Clips of a batch in transformers' pipeline.
BATCH_CLIPS = 8
# Arithmetic of faster-whisper.
KINDS = ("float32", "int8")

ABOUT_PEERS = f"""\
graft           its Transcriber, all clips at once
graft whisper   the same with Whisper base
graft ... int8  the same with int8 weights, where the processor has instructions for them
transformers    Whisper base, pipeline("automatic-speech-recognition"), {BATCH_CLIPS} clips to a batch
faster-whisper  Whisper base converted for CTranslate2, one clip at a time
All are greedy; CPU s: for a second of audio; MB: the most memory (2^20 bytes) that the process held."""
ABOUT_BF16 = "the same clips in bf16, one by one and all together: texts that differ, and both word error rates"
NO_GRAFT = "graft: --model names a trained one; the answers of an untrained one have neither words nor an end"
NO_BF16 = "this processor does not multiply bf16, and nobody would transcribe in it here"
NO_FASTER_WHISPER = "faster-whisper is not installed: pip install faster-whisper"


def bench_peers(model: str | None, speech: Sequence[str] | None) -> Numbers:
    """Measure a graft, where one is given, and plain Whisper base in other hands."""
    with tempfile.TemporaryDirectory() as folder:

        def rows() -> Iterator[Row]:
            grafts = ({"graft": model} if model else {}) | {"graft whisper": WHISPER}
            openers: dict[str, Callable[[], Transcribe]] = {}
            for name, checkpoint in grafts.items():
                openers[name] = functools.partial(open_graft, checkpoint)
                if multiplies_int8():
                    openers[f"{name} {INT8}"] = functools.partial(open_graft, checkpoint, INT8)
            openers["transformers"] = open_pipeline
            if convert_whisper(folder):
                whispers = {kind: functools.partial(open_faster_whisper, folder, kind) for kind in KINDS}
                openers |= {f"faster-whisper {kind}": opener for kind, opener in whispers.items()}
            for name, opener in openers.items():
                watched = watch(_transcribe_all, opener, speech)
                yield name, watched.result | {"MB": watched.peak_mb()}

        if not model:
            print(NO_GRAFT)
        return report_table(ABOUT_PEERS, rows())


def _transcribe_all(opener: Callable[[], Transcribe], speech: Sequence[str] | None) -> Numbers:
    """Measure a way to transcribe on labelled clips."""
    quiet_libraries()
    torch.set_num_threads(1)
    clips, references = zip(*labelled_speech(speech), strict=True)
    transcribe, texts = opener(), list[str]()
    transcribe(clips[:1])
    wall_s, cpu_s = seconds_of(lambda: texts.extend(transcribe(clips)))
    audio_s = sum(clip.duration_s for clip in clips)
    speed = {"audio s/s": audio_s / wall_s, "CPU s": cpu_s / audio_s}
    return {"clips": len(clips), "audio s": audio_s, "WER %": 100 * score(references, texts).wer} | speed


def bench_bf16(model: str | None, speech: Sequence[str] | None) -> Numbers:
    """Count the texts that a batch changes in bf16: clips one by one, and once more all together, by the same graft."""
    if not model:
        print(NO_GRAFT)
        return {}
    if not multiplies_bf16("cpu"):
        print(NO_BF16)
        return {}
    clips, references = zip(*labelled_speech(speech), strict=True)
    transcribe = open_graft(model, "bf16")
    one_by_one = [transcribe([clip])[0] for clip in clips]
    together = transcribe(clips)
    numbers = {
        "clips": len(clips),
        "changed": sum(one != other for one, other in zip(one_by_one, together, strict=True)),
        "alone_wer_percent": 100 * score(references, one_by_one).wer,
        "together_wer_percent": 100 * score(references, together).wer,
    }
    return report(ABOUT_BF16, numbers)


def open_graft(model: str, dtype: str | None = None) -> Transcribe:
    """Open a graft or a Whisper in a precision, by default the one that its weights are stored in."""
    transcriber: Any = open_transcriber(model, device="cpu", dtype=dtype, chunker=windows, threads=1)
    language = "en" if "en" in transcriber.languages else None  # as the others are told
    return lambda clips: [transcript.text for transcript in transcriber.transcribe_many(clips, language=language)]


def open_pipeline() -> Transcribe:
    """Open Whisper base as transformers' documentation does."""
    from transformers import pipeline

    whisper: Any = {"model": str(bundled_whisper()), "device": "cpu", "dtype": torch.float32}
    recognizer = pipeline("automatic-speech-recognition", **whisper)
    settings = {"language": "en", "task": "transcribe", "num_beams": 1}

    def transcribe(clips: Sequence[AudioClip]) -> list[str]:
        inputs: Any = [{"raw": clip.samples, "sampling_rate": SAMPLE_RATE} for clip in clips]
        return [answer["text"] for answer in recognizer(inputs, batch_size=BATCH_CLIPS, generate_kwargs=settings)]

    return transcribe


def convert_whisper(folder: str) -> bool:
    """Write the bundled Whisper base as CTranslate2 reads it; where faster-whisper is not installed, say so: false."""
    if importlib.util.find_spec("faster_whisper") is None:
        print(NO_FASTER_WHISPER)
        return False
    from ctranslate2.converters import TransformersConverter

    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(bundled_whisper()), copy_files=files).convert(folder, force=True)
    return True


def open_faster_whisper(folder: str, kind: str) -> Callable[[Sequence[Any]], list[str]]:
    """Open a converted Whisper in a kind of arithmetic; it takes clips and open files."""
    from faster_whisper import WhisperModel

    whisper = WhisperModel(folder, device="cpu", compute_type=kind, cpu_threads=1)

    def transcribe(audios: Sequence[Any]) -> list[str]:
        samples = (audio.samples if isinstance(audio, AudioClip) else audio for audio in audios)
        answers = (whisper.transcribe(audio, language="en", beam_size=1)[0] for audio in samples)
        return ["".join(segment.text for segment in segments) for segments in answers]

    return transcribe


def serve_whisper(folder: str, port: str) -> None:
    """Serve a converted Whisper in int8 as one would write it; requests wait for its thread in those of the server."""
    import uvicorn
    from fastapi import FastAPI, Form, UploadFile

    transcribe = open_faster_whisper(folder, "int8")
    api = FastAPI()

    @api.post("/v1/audio/transcriptions")
    def answer(file: UploadFile, model: Annotated[str, Form()]) -> dict[str, str]:
        return {"text": transcribe([file.file])[0]}

    @api.get("/v1/models")
    def models() -> dict[str, list[dict[str, str]]]:
        return {"data": [{"id": "base"}]}

    uvicorn.run(api, port=int(port), log_level="error")


if __name__ == "__main__":
    serve_whisper(*sys.argv[1:])
