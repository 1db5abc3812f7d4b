"""Audio files become 16 kHz clips, clips become chunks of speech, and chunks become log-mel features."""
