"""Sample the instructions of training samples.

    text and seed of a sample -> instruction, for some with a list of words that may occur -> style of the answer

Source of the word lists: Le et al., Contextualized Streaming End-to-End Speech Recognition with Trie-Based Deep Biasing
and Shallow Fusion, Interspeech 2021. Rare words are those outside the most frequent ones, which make up 90 % of a
corpus.
"""

import bisect
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import regex
from pydantic import Field, model_validator

from graft.config import Recipe
from graft.errors import DataError, RecipeError
from graft.text.characters import JOINERS, UNSPACED
from graft.text.prompts import (
    INSTRUCTIONS,
    MAX_CONTEXT_WORDS,
    PLAIN_INSTRUCTION,
    Instruction,
    is_formatted,
    with_context,
    with_language,
)

COMMON_SHARE = 0.9
"""Share of all words in a corpus that its common words make up."""
MAX_RARE_WORDS = 200_000
_BLOCK = 100_000  # texts that are counted at a time
_LETTERS = rf"[[\p{{L}}\p{{M}}{JOINERS}]--{UNSPACED}]+"
_WORD = regex.compile(rf"(?V1){_LETTERS}(?:['’·-]{_LETTERS})*")
_EDGES = regex.compile(r"^[^\p{L}\p{M}\p{N}]+|[^\p{L}\p{M}\p{N}]+$")

Share = Annotated[float, Field(ge=0, le=1)]


class InstructionRecipe(Recipe):
    """Instructions of training samples besides the default one, which all samples have by default."""

    styles: dict[Literal["raw", "lower", "formatted"], Share] = Field(default={})
    """Share of the samples that ask for each text style in words; the others keep the default instruction."""
    context: Share = 0.0
    """Share of the samples that have a list of words which may occur."""
    context_words: int = Field(default=20, ge=1, le=MAX_CONTEXT_WORDS)
    """Largest number of words in a list."""
    context_empty: Share = 0.1
    """Share of the lists that are empty."""
    context_absent: Share = 0.3
    """Share of the lists that hold none of the clip's words."""
    language: Share = 0.0
    """Share of the samples whose instruction names the language of the speech, where the data says which it is."""

    @model_validator(mode="after")
    def _check_shares(self) -> "InstructionRecipe":
        if sum(self.styles.values()) > 1 - 1e-9:
            raise ValueError(
                f"the shares of styles add up to {sum(self.styles.values()):g}: "
                "leave some samples the default instruction"
            )
        if self.context_empty + self.context_absent > 1:
            raise ValueError("context_empty and context_absent add up to more than 1")
        return self

    @property
    def is_default(self) -> bool:
        """Whether all samples have the default instruction."""
        return not self.context and not self.language and not any(self.styles.values())


@dataclass(frozen=True, eq=False)
class InstructionSampler:
    """Draws the instruction of a sample, a pure function of its text and seed.

    `default_style` is the text style of the graft, and `rare_words` are the candidates of word lists.
    """

    settings: InstructionRecipe
    default_style: str = "lower"
    rare_words: Sequence[str] = ()

    @cached_property
    def is_default(self) -> bool:
        """Whether every sample has the default instruction."""
        return self.settings.is_default and self.default_style != "formatted"

    def sample(self, text: str, sample_seed: int, language: str | None = None) -> Instruction:
        """Draw the instruction of a sample, whose language may be known.

        The answer `formatted` is never asked for where the label is not formatted itself.
        """
        if self.is_default:
            return PLAIN_INSTRUCTION
        chance = random.Random(int(sample_seed)).random
        styles, drawn = sorted(self.settings.styles.items()), chance()
        ends = itertools.accumulate(share for _, share in styles)
        style: str | None = next((style for (style, _), end in zip(styles, ends, strict=True) if drawn < end), None)
        if (style or self.default_style) == "formatted" and text.strip() and not is_formatted(text):
            style = "lower" if self.default_style == "formatted" else None
        phrasing, listed = chance(), chance()
        choices = _INSTRUCTIONS[style]
        instruction = choices[int(phrasing * len(choices))]
        if language and self.settings.language and chance() < self.settings.language:
            instruction = Instruction(with_language(instruction.text, language), style)
        if listed >= self.settings.context:
            return instruction
        formatted = (style or self.default_style) == "formatted"
        return Instruction(with_context(instruction.text, self._sample_list(text, chance, formatted=formatted)), style)

    def _sample_list(self, text: str, chance: Any, *, formatted: bool) -> list[str]:
        """Draw a list of words: rare ones of the text and others, shuffled and in one case, which hides the text's."""
        kind, length = chance(), 1 + int(chance() * self.settings.context_words)
        if kind < self.settings.context_empty:
            return []
        own = {key: word for word in text.split() if (key := _key(word)) and key in self._rare_keys}
        others = self._sample_others(text, chance)
        words: list[str] = []
        if own and kind >= self.settings.context_empty + self.settings.context_absent:
            count = 1 + int(chance() * min(len(own), length))
            words = [_EDGES.sub("", own[key]) for key in _shuffled(sorted(own), chance)[:count]]
        words += itertools.islice(others, length - len(words))
        case = 0.0 if formatted else chance()
        return _shuffled([_apply_case(word, text, case) for word in words], chance)

    def _sample_others(self, text: str, chance: Any) -> Iterator[str]:
        """Draw rare words of the corpus that the text lacks, each once; there may be fewer than wanted."""
        seen = set(map(_key, text.split()))
        for _ in range(4 * self.settings.context_words if self.rare_words else 0):
            word = self.rare_words[int(chance() * len(self.rare_words))]
            if (key := _key(word)) not in seen:
                seen.add(key)
                yield word

    @cached_property
    def _rare_keys(self) -> frozenset[str]:
        return frozenset(map(_key, self.rare_words))


def make_instruction_sampler(
    settings: InstructionRecipe, texts: Sequence[str], *, prompt_style: str, text_style: str
) -> InstructionSampler:
    """Make the sampler of a corpus's instructions, for a graft of these styles.

    Raises RecipeError where the graft's prompt is the reference's, which is fixed, and DataError where texts lack what
    is to be trained.
    """
    if prompt_style == "reference":
        if not settings.is_default:
            raise RecipeError(
                "words: the graft's prompt is the reference's, which is fixed: "
                "leave words out, or build with prompt_style=graft"
            )
        # `raw` writes texts as `formatted` does, and never asks for another style.
        return InstructionSampler(settings, "raw")
    formatted = text_style == "formatted" or settings.styles.get("formatted")
    if formatted and not any(is_formatted(str(text)) for text in texts):
        raise DataError(
            f"none of {len(texts)} texts is formatted: "
            "make them with `graft format`, and name its output in data's texts"
        )
    words = rare_words(texts) if settings.context else []
    if settings.context and not words:
        raise DataError(
            f"words.context={settings.context}: {len(texts)} texts hold no rare words: leave it out, or train on more"
        )
    return InstructionSampler(settings, text_style, words)


def trained_instructions(settings: InstructionRecipe, languages: Sequence[str] = ()) -> dict[str, Any]:
    """Summarise for stage.json which instructions a checkpoint trained with these settings understands.

    `languages` are those of the training data.
    """
    return {
        "styles": sorted(style for style, share in settings.styles.items() if share),
        "context": settings.context > 0,
        "languages": sorted(filter(None, languages)) if settings.language else [],
    }


def rare_words(texts: Sequence[str], *, most: int = MAX_RARE_WORDS) -> list[str]:
    """List the rare words of a corpus in alphabetical order, as they are most often written.

    They are those outside the most frequent ones, which make up COMMON_SHARE of all. They have three letters or more,
    no digits, and no letters of scripts without spaces; of more than `most` the rarest are left out. `texts` may be an
    Arrow array.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    written: Counter[str] = Counter()
    for start in range(0, len(texts), _BLOCK):
        block: Any = texts[start : start + _BLOCK]
        array = block if isinstance(block, pa.Array | pa.ChunkedArray) else pa.array(block, pa.large_string())
        for entry in pc.value_counts(pc.list_flatten(pc.utf8_split_whitespace(array))).to_pylist():
            written[entry["values"] or ""] += entry["counts"]
    forms: dict[str, Counter[str]] = defaultdict(Counter)  # key of a word -> counts of its written forms
    for form, count in written.items():
        if key := _key(form):
            forms[key][_EDGES.sub("", form)] += count
    counts = {key: sum(form.values()) for key, form in forms.items()}
    by_frequency = sorted(counts, key=lambda key: (-counts[key], key))
    seen = itertools.accumulate(counts[key] for key in by_frequency)
    common = bisect.bisect_left(list(seen), COMMON_SHARE * sum(counts.values())) + 1
    chosen = sorted(key for key in by_frequency[common : common + most] if len(key) >= 3)
    return [min(forms[key], key=lambda form: (-forms[key][form], form)) for key in chosen]


def _key(word: str) -> str:
    """Reduce a word to a key without its case and the punctuation around it; "" for what is no word.

    Scripts without spaces have none: what stands between two spaces may be the whole text, which a list would give
    away.
    """
    core = _EDGES.sub("", word)
    return core.casefold().replace("’", "'") if _WORD.fullmatch(core) else ""


def _apply_case(word: str, text: str, case: float) -> str:
    """Write a word in the case of the text or, for a `case` from 0.5 to 1, in lower case or with a capital."""
    if case >= 0.5:
        return word.lower() if case < 0.75 else word.capitalize()
    if text.isupper():
        return word.upper()
    if text.islower():
        return word.lower()
    return word.capitalize() if word.isupper() else word


def _shuffled(words: list[str], chance: Any) -> list[str]:
    return [word for _, word in sorted((chance(), word) for word in words)]


_INSTRUCTIONS: dict[str | None, list[Instruction]] = {
    None: [PLAIN_INSTRUCTION],
    **{style: [Instruction(phrasing, style) for phrasing in phrasings] for style, phrasings in INSTRUCTIONS.items()},
}
