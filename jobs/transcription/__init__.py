"""Bulk transcription on Ray Data: recordings become work items, chunks, results and transcripts."""
