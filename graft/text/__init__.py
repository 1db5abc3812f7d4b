"""Write prompts and instructions, give labels case and punctuation, and score transcripts."""
