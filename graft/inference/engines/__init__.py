"""Engines turn prompts with audio into tokens: in transformers, a graft or a plain Whisper, or a graft in vLLM."""
