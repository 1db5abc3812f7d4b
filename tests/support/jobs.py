"""Run commands in this process."""

from jobs.common.cli import run_job
from jobs.transcribe import TranscribeRecipe, run


def transcribe(*arguments: str) -> int:
    """Run `python -m jobs.transcribe` with arguments; returns the exit code."""
    return run_job(TranscribeRecipe, run, summary="", argv=list(arguments))
