"""Write prompts and answers: the templates around the audio, instructions, lists of words, and text styles.

The module imports nothing heavy, because a Serve ingress checks requests without torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from graft.errors import ModelError
from graft.model.tokens import AUDIO_END_TOKEN, AUDIO_PAD_TOKEN, AUDIO_START_TOKEN
from graft.text.characters import SENTENCE_MARK, compose, lower_case
from graft.text.languages import language_code, language_name

MAX_CONTEXT_WORDS = 100
MAX_WORD_LENGTH = 100

DEFAULT_INSTRUCTION = "Transcribe this audio."
INSTRUCTIONS = {
    "raw": (
        "Transcribe this audio word for word, as spoken.",
        "Write down exactly what is said.",
        "Give a verbatim transcript of this audio.",
    ),
    "lower": (
        "Transcribe this audio in lower case, without punctuation.",
        "Write what is said in small letters and leave out the punctuation.",
        "Give a transcript of this audio that is all lower case and has no punctuation.",
    ),
    "formatted": (
        "Transcribe this audio with punctuation and capital letters.",
        "Write what is said in proper sentences, with case and punctuation.",
        "Give a punctuated and capitalised transcript of this audio.",
    ),
}
"""Text style -> instructions that ask for it; a checkpoint trained for a style knows all of its phrasings."""


@dataclass(frozen=True)
class Instruction:
    """The text that a prompt asks with, and the text style of its answer; None is the graft's own style."""

    text: str = DEFAULT_INSTRUCTION
    style: str | None = None


PLAIN_INSTRUCTION = Instruction()


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a clip's placeholders, within the message of a chat.

    The question and the answer are plain text: nothing in them becomes a special token.
    """

    before: str
    after: str
    question: str
    answer: str


@dataclass(frozen=True)
class ChatFormat:
    """How a language model's chats are written: what is around a user's message, and around the answer to it."""

    user: str
    user_end: str
    answer: str
    answer_end: str

    @property
    def prompt_end(self) -> str:
        """The end of every prompt, which the answer's text follows."""
        return self.user_end + self.answer


CHATML = ChatFormat("<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>")
CHAT_FORMATS = {
    "<|im_start|>": CHATML,
    "<|start_header_id|>": ChatFormat(
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}
"""The special token with which a message begins, of ChatML or of Llama 3 -> the form of the chats."""
THOUGHT, THOUGHT_END = "<think>", "</think>"

TEMPLATES = {
    "graft": PromptTemplate(
        before=AUDIO_START_TOKEN,
        after=AUDIO_END_TOKEN,
        question="\n{instruction}",
        answer="{text}",
    ),
    # The released reference weights were trained with two literals that never became tokens, and need the same ids.
    "reference": PromptTemplate(
        before="<|audio_bos|>", after="", question="<|audio_eos|>\n{instruction}", answer=" {text}"
    ),
}


def find_chat_format(special_tokens: Collection[str], answer: str = "") -> ChatFormat | None:
    """Return the chat format whose tokens are among a tokenizer's special ones; None where there is none.

    `answer` is what the model's own chat template begins an answer with where it is not to think: the prompt ends so,
    with an empty thought where the template has one. A thought that the template leaves open is closed.
    """
    chat = next((chat for token, chat in CHAT_FORMATS.items() if token in special_tokens), None)
    if chat is None or not answer.startswith(chat.answer):
        return chat
    is_open = answer.rfind(THOUGHT) > answer.rfind(THOUGHT_END)
    return replace(chat, answer=f"{answer}\n{THOUGHT_END}\n\n" if is_open else answer)


def prompt_text(style: str, instruction: str = DEFAULT_INSTRUCTION, chat: ChatFormat = CHATML) -> str:
    """Write a prompt around one placeholder. Raises KeyError for an unknown style."""
    template = TEMPLATES[style]
    question = template.question.format(instruction=instruction)
    return f"{chat.user}{template.before}{AUDIO_PAD_TOKEN}{template.after}{question}{chat.prompt_end}"


def with_context(instruction: str, words: Sequence[str]) -> str:
    """Add a list of words that may occur to an instruction; it mentions an empty list, too."""
    return (
        f"{instruction} These words may occur: {', '.join(words)}." if words else f"{instruction} No words are given."
    )


def with_language(instruction: str, language: str) -> str:
    """Add the language of the speech (ISO 639-1) to an instruction."""
    return f"{instruction} The language is {language_name(language)}."


def check_context_words(context: Sequence[str]) -> list[str]:
    """Clean a request's list of words that may occur: each once, in NFC, without spaces, commas and stops around it.

    Raises ModelError for anything else.
    """
    if isinstance(context, str):
        raise ModelError(f"context {context!r:.80} is a text: give a list of words")
    words = list(dict.fromkeys(" ".join(compose(word).split()).strip(" ,.、，。،।") for word in context))
    if len(words) > MAX_CONTEXT_WORDS or max(map(len, words), default=0) > MAX_WORD_LENGTH or "" in words:
        raise ModelError(
            f"context of {len(words)} words: give at most {MAX_CONTEXT_WORDS}, "
            f"none of them empty or over {MAX_WORD_LENGTH} characters"
        )
    return words


def style_text(text: str, style: str) -> str:
    """Write a transcript in a text style, in NFC and with single spaces.

    `raw` and `formatted` leave it as it is otherwise; `lower` is graft.text.characters.lower_case.
    """
    return lower_case(text) if style == "lower" else " ".join(compose(text).split())


def is_formatted(text: str) -> bool:
    """Whether a text is written in sentences: with lower-case letters, and capitals or punctuation beside them.

    Letters of scripts without case need punctuation beside them.
    """
    has_small = any(map(str.islower, text))
    if has_small and any(map(str.isupper, text)):
        return True
    has_letters = has_small or any(character.isalpha() and not character.isupper() for character in text)
    return has_letters and SENTENCE_MARK.search(text) is not None


def check_language(language: str, known: Sequence[str]) -> str:
    """Return the code of a language that a model's prompt can name. Raises ModelError for any other."""
    code = language_code(language)
    if not known:
        raise ModelError(
            f"language={language}: this checkpoint's prompt names no language: "
            "leave it out, or train stage 2 with words.language"
        )
    if code not in known:
        names = ", ".join(sorted(known))
        raise ModelError(f"language={language}: this checkpoint knows {names}: give one of these, or none")
    return code


def request_instruction(
    instruction: str | None,
    context: Sequence[str] | None,
    *,
    text_style: str,
    trained_styles: Sequence[str],
    trained_context: bool,
    language: str | None = None,
    trained_languages: Sequence[str] = (),
) -> str:
    """Write the instruction of a request: a style's name or a trained phrasing, a language, and words that may occur.

    Raises ModelError for a request that the checkpoint was not trained for, with those that it was, and for an unusable
    list of words.
    """
    asked = instruction or DEFAULT_INSTRUCTION
    if asked == text_style:
        asked = DEFAULT_INSTRUCTION
    elif asked in INSTRUCTIONS and asked in trained_styles:
        asked = INSTRUCTIONS[asked][0]
    phrasings = [DEFAULT_INSTRUCTION, *(phrasing for style in trained_styles for phrasing in INSTRUCTIONS[style])]
    if asked not in phrasings:
        known = ", ".join(dict.fromkeys([text_style, *trained_styles]))
        raise ModelError(
            f"instruction {asked!r:.80}: this checkpoint was trained for {known}: give one of these, or none"
        )
    if language is not None:
        asked = with_language(asked, check_language(language, trained_languages))
    if context is None or (not context and not trained_context):
        return asked
    if not trained_context:
        raise ModelError(
            "context: this checkpoint was not trained for lists of words: "
            "leave it out, or train stage 2 with words.context"
        )
    return with_context(asked, check_context_words(context))
