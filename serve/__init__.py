"""The Ray Serve application: graft behind OpenAI's transcription endpoint."""
