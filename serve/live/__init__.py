"""Speech is transcribed while it is spoken: audio goes in bit by bit, and events with text come out."""
