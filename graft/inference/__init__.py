"""Audio of any length becomes a transcript: the Transcriber, its engines, aligners, guards and subtitles."""
