"""Run commands in this process."""

from jobs.transcribe import main


def transcribe(*arguments: str) -> int:
    """Run `graft transcribe` with arguments; returns the exit code."""
    return main(argv=list(arguments))
