"""Audio files and folders of them -> transcripts, printed and written.

recordings -> Ray Data -> a pool of actors with a Transcriber each -> rows -> out/<name>.txt, out/<name>.json, out/transcripts.jsonl
A recording that can't be read becomes a line on stderr and in out/errors.jsonl, and exit code 3; the others go on.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from graft.config import Recipe
from graft.errors import AudioError, DataError, GraftError, ModelError
from jobs.cli import run_job
from jobs.cluster import connect
from jobs.outputs import claim_output, write_atomic

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
PARTLY_FAILED = 3
HOW = frozenset({"workers", "threads", "gpus_per_worker", "files_per_batch"})
"""Keys that change how fast the transcripts come, not what they say."""


class TranscribeRecipe(Recipe):
    """What jobs.transcribe does."""

    model: str
    """A graft's folder, a stage's output folder or a hub id."""
    audio: str | list[str]
    """Audio files and folders; folders are searched for wav, flac, mp3, ogg and opus files at any depth."""
    out: str | None = None
    """Folder for the transcripts; without it they are only printed."""
    instruction: str | None = None
    """A text style (raw, lower, formatted) that the model was trained for, or a phrasing that asks for one; by default its own."""
    context: list[str] | None = None
    """Words that may occur (names, terms), where the model was trained for lists of words."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the weights; by default as they are stored."""
    workers: int = Field(default=1, ge=1)
    """Models that transcribe side by side."""
    threads: int = Field(default=1, ge=1)
    """CPU threads, and CPUs taken from the cluster, of each worker."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """0 transcribes on CPU."""
    files_per_batch: int = Field(default=16, ge=1)
    """Recordings that a worker has in hand at a time."""


@dataclass(frozen=True)
class Recording:
    """An audio file as the user named it, and its results' place in `out`, without suffix."""

    path: Path
    stem: str


class TranscribeBatch:
    """Ray Data's side of a Transcriber: a batch's `audio` (paths, or bytes of files) becomes `transcript` (JSON) or `error`.

    A model that can't be opened is a value too, `fault`: raised in here, Ray would print it with three tracebacks.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str | None,
        threads: int,
        device: str,
        instruction: str | None = None,
        context: Sequence[str] | None = None,
    ) -> None:
        import torch

        from graft.transcriber import load

        torch.set_num_threads(threads)
        self.fault = ""
        self.words: dict[str, Any] = {"instruction": instruction, "context": context}
        try:
            self.transcriber = load(model, device=device, dtype=dtype)
        except GraftError as error:
            self.fault = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        audio = list(batch.pop("audio"))
        results = [AudioError()] * len(audio) if self.fault else self.transcriber.transcribe_many(audio, **self.words)
        errors = [str(result) if isinstance(result, AudioError) else "" for result in results]
        transcripts = ["" if isinstance(result, AudioError) else json.dumps(result.to_dict(), ensure_ascii=False) for result in results]
        return {**batch, "transcript": transcripts, "error": errors, "fault": [self.fault] * len(audio)}


def main(recipe: TranscribeRecipe) -> int:
    """Transcribe the recipe's recordings; 3 if one could not be read. Raises DataError when there are none, ModelError, OutputError."""
    recordings = find_recordings([recipe.audio] if isinstance(recipe.audio, str) else recipe.audio)
    _check_model(recipe)
    folder = claim_output(recipe.out, recipe, ignore=HOW) if recipe.out else None
    transcripts: dict[int, dict[str, Any]] = {}
    errors: dict[int, dict[str, str]] = {}
    for place, transcript, error in _transcribed(recordings, recipe):
        file = str(recordings[place].path)
        if error:
            errors[place] = {"file": file, "error": error}
            print(f"graft: {file}: {error}", file=sys.stderr)
        else:
            transcripts[place] = {"file": file, **transcript}
            print(f"{file}: {transcript['text']}", flush=True)
            if folder:
                _write_transcript(folder / recordings[place].stem, transcripts[place])
    if folder:
        _write_lines(folder / "transcripts.jsonl", transcripts)
        _write_lines(folder / "errors.jsonl", errors)
    return PARTLY_FAILED if errors else 0


def find_recordings(sources: Sequence[str]) -> list[Recording]:
    """List files as they are named and the audio files in folders, sorted, each once.

    Raises DataError when there are none, and when the results of two would have the same name.
    """
    stems: dict[str, Recording] = {}
    for source in sources:
        root = Path(source)
        if root.is_dir():
            paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
            found = [Recording(path, path.relative_to(root).with_suffix("").as_posix()) for path in paths]
        else:
            found = [Recording(root, root.stem)]
        for recording in found:
            other = stems.setdefault(recording.stem, recording)
            if other.path.absolute() != recording.path.absolute():
                raise DataError(f"{other.path} and {recording.path} would both become {recording.stem}.txt: transcribe them in two runs")
    if not stems:
        raise DataError(f"no audio in {', '.join(sources)}: give files, or folders with {', '.join(SUFFIXES)} files")
    return list(stems.values())


def _check_model(recipe: TranscribeRecipe) -> None:
    """Refuse what is no graft, and words that it was not trained for, before a cluster starts."""
    from graft.model.opening import check_graft, open_processor

    check_graft(recipe.model)
    if recipe.instruction or recipe.context:
        open_processor(recipe.model).instruction(recipe.instruction, recipe.context)


def _transcribed(recordings: Sequence[Recording], recipe: TranscribeRecipe) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Place, transcript and error of each recording, in the order in which they are ready."""
    import ray.data

    connect()
    # Workers need not share this process's directory.
    paths = [str(recording.path.absolute()) for recording in recordings]
    rows = ray.data.from_items([{"place": place, "audio": path} for place, path in enumerate(paths)]).map_batches(
        TranscribeBatch,
        fn_constructor_args=[os.path.abspath(recipe.model) if os.path.exists(recipe.model) else recipe.model],
        fn_constructor_kwargs={
            "dtype": recipe.dtype,
            "threads": recipe.threads,
            "device": "cuda" if recipe.gpus_per_worker else "cpu",
            "instruction": recipe.instruction,
            "context": recipe.context,
        },
        batch_size=recipe.files_per_batch,
        compute=ray.data.ActorPoolStrategy(size=recipe.workers),
        num_cpus=recipe.threads,
        num_gpus=recipe.gpus_per_worker,
    )
    for row in rows.iter_rows():
        if row["fault"]:
            raise ModelError(row["fault"])
        place = int(row["place"])
        yield place, json.loads(row["transcript"] or "{}"), row["error"].removeprefix(f"{paths[place]}: ")


def _write_transcript(path: Path, transcript: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(f"{path}.txt", transcript["text"] + "\n")
    write_atomic(f"{path}.json", json.dumps(transcript, indent=2, ensure_ascii=False) + "\n")


def _write_lines(path: Path, rows: dict[int, dict[str, Any]]) -> None:
    write_atomic(path, "".join(json.dumps(rows[place], ensure_ascii=False) + "\n" for place in sorted(rows)))


if __name__ == "__main__":
    raise SystemExit(run_job(TranscribeRecipe, main, summary="Transcribe audio files and folders of them."))
