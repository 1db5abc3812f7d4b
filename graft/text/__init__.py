"""Everything about words: prompts, instructions, the case and punctuation of labels, and word error rates."""
