"""Transcribe files at a running graft service with OpenAI's client: the text as it is decoded, then the subtitles.

OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=sk-mine python examples/openai_client.py a.flac b.mp3
"""

import sys
from pathlib import Path

from openai import OpenAI


def main(paths: list[str]) -> None:
    """Print the streamed text and the SubRip subtitles of each file."""
    client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
    model = client.models.list().data[0].id
    for path in map(Path, paths):
        print(f"{path.name}: ", end="")
        for event in client.audio.transcriptions.create(file=path, model=model, stream=True):
            if event.type == "transcript.text.delta":
                print(event.delta, end="", flush=True)
        print()
        print(client.audio.transcriptions.create(file=path, model=model, response_format="srt"))


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
