"""faster-whisper behind a plain FastAPI server, as one would write it: `python -m jobs.benchmarks.serve_peer FOLDER KIND THREADS PORT`."""

import sys
from typing import Annotated

import uvicorn
from fastapi import FastAPI, Form, UploadFile


def peer_api(folder: str, kind: str, threads: int) -> FastAPI:
    """Serve a converted Whisper. Requests wait for its threads in those of the server."""
    from faster_whisper import WhisperModel

    whisper = WhisperModel(folder, device="cpu", compute_type=kind, cpu_threads=threads)
    api = FastAPI()

    @api.post("/v1/audio/transcriptions")
    def transcribe(file: UploadFile, model: Annotated[str, Form()]) -> dict[str, str]:
        segments, _ = whisper.transcribe(file.file, language="en", beam_size=1)
        return {"text": "".join(segment.text for segment in segments)}

    @api.get("/v1/models")
    def models() -> dict[str, list[dict[str, str]]]:
        return {"data": [{"id": "base"}]}

    return api


if __name__ == "__main__":
    uvicorn.run(peer_api(sys.argv[1], sys.argv[2], int(sys.argv[3])), port=int(sys.argv[4]), log_level="error")
