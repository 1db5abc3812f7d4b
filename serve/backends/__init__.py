"""Backends transcribe the chunks of the service: in this process, or by engines behind Ray Serve."""
