"""Aligners say when each word is spoken: by Whisper's cross-attention or by a CTC model."""
