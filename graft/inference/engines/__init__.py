"""Engines turn prompts with audio into tokens: in transformers, in vLLM, and plain Whisper as the baseline."""
