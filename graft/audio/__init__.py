"""Turn audio files into 16 kHz clips, clips into chunks of speech, and chunks into log-mel features."""
