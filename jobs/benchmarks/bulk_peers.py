"""What else transcribes on a CPU, on the same clips and threads: Whisper base with transformers' pipeline, and with faster-whisper.

Each listens in a fresh process to clips that are decoded already, greedily, after it has heard one to warm up.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.checkpoints.bundled.cache import bundled_whisper
from graft.errors import AudioError
from graft.text.wer import score

from ..common.console import quiet_libraries
from .bulk_speech import labelled_speech
from .measuring import Findings, Numbers, Spent, spent_on, table
from .processes import watched

BATCH_WINDOWS = 8
"""Of transformers' pipeline."""
KINDS = ("float32", "int8")
"""Of arithmetic in faster-whisper."""

ABOUT = f"""\
graft           its Transcriber, all clips at once
transformers    Whisper base, pipeline("automatic-speech-recognition"), {BATCH_WINDOWS} clips a batch
faster-whisper  Whisper base converted for CTranslate2, a clip at a time, as it is used
All greedy, on {{threads}} threads; audio s: of speech heard; MB: the most that the process held."""
NO_GRAFT = "graft: --model names one that is trained; without training an answer has neither words nor an end"
NO_FASTER_WHISPER = "faster-whisper is not installed: pip install faster-whisper"

Transcribe = Callable[[Sequence[AudioClip]], list[str]]


def bench_peers(model: str | None, manifests: Sequence[str], *, threads: int) -> Findings:
    """Measure a graft, where one is given, and plain Whisper base in other hands."""
    openers: dict[str, Callable[[], Transcribe]] = {"graft": functools.partial(open_graft_peer, model)} if model else {}
    openers |= {"transformers": open_pipeline}
    missing = [] if model else [NO_GRAFT]
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("faster_whisper"):
            watched(convert_whisper, folder)
            openers |= {
                f"faster-whisper {kind}": functools.partial(open_faster_whisper, folder, kind, threads)
                for kind in KINDS
            }
        else:
            missing.append(NO_FASTER_WHISPER)
        heard = {name: _heard_alone(opener, manifests, threads) for name, opener in openers.items()}
    numbers = {f"{name} {key}": value for name, values in heard.items() for key, value in values.items()}
    return Findings(numbers, "\n".join([ABOUT.format(threads=threads), _table(heard), *missing]))


def open_graft_peer(model: str, dtype: str | None = None) -> Transcribe:
    """Open a graft in a precision, by default the one that its weights are stored in."""
    from graft.audio.chunking import windows
    from graft.inference.transcriber import open_transcriber

    transcriber = open_transcriber(model, device="cpu", dtype=dtype, chunker=windows)

    def transcribe(clips: Sequence[AudioClip]) -> list[str]:
        texts = []
        for transcript in transcriber.transcribe_many(clips):
            if isinstance(transcript, AudioError):
                raise transcript
            texts.append(transcript.text)
        return texts

    return transcribe


def open_pipeline() -> Transcribe:
    """transformers' own way."""
    from transformers import pipeline

    recognizer: Any = pipeline(
        "automatic-speech-recognition", model=str(bundled_whisper()), device="cpu", dtype=torch.float32
    )

    def transcribe(clips: Sequence[AudioClip]) -> list[str]:
        inputs = [{"raw": clip.samples, "sampling_rate": SAMPLE_RATE} for clip in clips]
        told = {"language": "en", "task": "transcribe", "num_beams": 1}
        return [answer["text"] for answer in recognizer(inputs, batch_size=BATCH_WINDOWS, generate_kwargs=told)]

    return transcribe


def open_faster_whisper(folder: str, kind: str, threads: int) -> Transcribe:
    """faster-whisper's own way, in a kind of arithmetic."""
    from faster_whisper import WhisperModel

    whisper = WhisperModel(folder, device="cpu", compute_type=kind, cpu_threads=threads)

    def transcribe(clips: Sequence[AudioClip]) -> list[str]:
        answers = (whisper.transcribe(clip.samples, language="en", beam_size=1)[0] for clip in clips)
        return ["".join(segment.text for segment in segments) for segments in answers]

    return transcribe


def convert_whisper(folder: str) -> None:
    """Write the bundled Whisper base as CTranslate2 reads it."""
    from ctranslate2.converters import TransformersConverter

    quiet_libraries()
    TransformersConverter(str(bundled_whisper()), copy_files=["tokenizer.json", "preprocessor_config.json"]).convert(
        folder, force=True
    )


def _heard_alone(opener: Callable[[], Transcribe], manifests: Sequence[str], threads: int) -> Numbers:
    heard = watched(_heard, opener, manifests, threads)
    return heard.result | {"peak_mb": heard.own_mb}


def _heard(opener: Callable[[], Transcribe], manifests: Sequence[str], threads: int) -> Numbers:
    """What a way to transcribe comes to on labelled clips."""
    quiet_libraries()
    torch.set_num_threads(threads)
    speech = labelled_speech(manifests)
    clips = [one.clip for one in speech]
    transcribe, texts = opener(), list[str]()
    transcribe(clips[:1])
    spent: Spent = spent_on(lambda: texts.extend(transcribe(clips)))
    found = score([one.text for one in speech], texts)
    audio_s = sum(clip.duration_s for clip in clips)
    return {
        "clips": len(clips),
        "audio_s": audio_s,
        "wer": found.wer,
        "wer_low": found.wer_low,
        "wer_high": found.wer_high,
        "rtfx": audio_s / spent.wall_s,
        "cpu_s_per_audio_s": spent.cpu_s / audio_s,
    }


def _table(heard: Mapping[str, Numbers]) -> str:
    header = ["", "clips", "audio s", "WER", "95 % interval", "RTFx", "CPU s/audio s", "MB"]
    rows = []
    for name, v in heard.items():
        wer = [f"{v['wer']:.1%}", f"[{v['wer_low']:.1%}, {v['wer_high']:.1%}]"]
        costs = [f"{v['rtfx']:.1f}", f"{v['cpu_s_per_audio_s']:.3f}", f"{v['peak_mb']:.0f}"]
        rows.append([name, f"{v['clips']}", f"{v['audio_s']:.0f}", *wer, *costs])
    return table(header, rows)
