"""The words around the audio: prompt templates, the default instruction, and how transcripts are written."""

import re
from dataclasses import dataclass

from graft.model.configuration import AUDIO_END_TOKEN, AUDIO_PAD_TOKEN, AUDIO_START_TOKEN

DEFAULT_INSTRUCTION = "Transcribe this audio."


@dataclass(frozen=True)
class PromptTemplate:
    """The text before and after a clip's placeholders, and the answer that is trained."""

    before: str
    after: str
    target: str


PROMPT_END = "<|im_end|>\n<|im_start|>assistant\n"
"""How every prompt ends: what follows is the answer."""

TEMPLATES = {
    "graft": PromptTemplate(
        before=f"<|im_start|>user\n{AUDIO_START_TOKEN}",
        after=f"{AUDIO_END_TOKEN}\n{{instruction}}{PROMPT_END}",
        target="{text}<|im_end|>",
    ),
    # The released reference weights were trained with two literals that never became tokens; they need the same ids again.
    "reference": PromptTemplate(
        before="<|im_start|>user\n<|audio_bos|>",
        after=f"<|audio_eos|>\n{{instruction}}{PROMPT_END}",
        target=" {text}<|im_end|>",
    ),
}


def prompt_text(style: str, instruction: str = DEFAULT_INSTRUCTION) -> str:
    """Write a prompt around one placeholder. Raises KeyError for an unknown style."""
    template = TEMPLATES[style]
    return template.before + AUDIO_PAD_TOKEN + template.after.format(instruction=instruction)


def target_text(style: str, text: str) -> str:
    """Write the answer to train for a transcript that is already in its text style."""
    return TEMPLATES[style].target.format(text=text)


def style_text(text: str, style: str) -> str:
    """Write a transcript in a text style: `raw` and `formatted` as it is, `lower` in lower case without punctuation but apostrophes."""
    text = " ".join(text.split())
    if style != "lower":
        return text
    words = re.sub(r"[^\w\s'#]|_", " ", text.lower().replace("’", "'"))
    return " ".join(word for word in (word.strip("'") for word in words.split()) if word)
