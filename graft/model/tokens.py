"""The special tokens around audio; the module imports nothing."""

AUDIO_PAD_TOKEN = "<|audio_pad|>"
AUDIO_START_TOKEN = "<|audio_start|>"
AUDIO_END_TOKEN = "<|audio_end|>"
# In this order the ids in Qwen2-VL's spare rows are 151657, 151658, 151659, as in the reference system.
AUDIO_TOKENS = (AUDIO_PAD_TOKEN, AUDIO_START_TOKEN, AUDIO_END_TOKEN)
