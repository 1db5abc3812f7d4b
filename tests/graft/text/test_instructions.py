"""Sampled instructions keep to their shares, to styles that fit the label, and to word lists that give nothing away."""

import pickle
import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from graft.audio.clip import AudioClip
from graft.config import read_recipe
from graft.errors import DataError, RecipeError
from graft.processor import GraftProcessor
from graft.text.instructions import (
    InstructionRecipe,
    InstructionSampler,
    make_instruction_sampler,
    rare_words,
    trained_instructions,
)
from graft.text.prompts import (
    CHATML,
    DEFAULT_INSTRUCTION,
    INSTRUCTIONS,
    TEMPLATES,
    Instruction,
    is_formatted,
    prompt_text,
    style_text,
)
from graft.text.word_counts import count_tokens
from graft.training.preflight import check_labels
from tests.support import tiny_models
from tests.support.training import example as labelled
from tests.support.training import filler

UPPER, LOWER, FORMATTED = (
    "MISTER ZEPHYR'S OWN GARDEN",
    "mister zephyr's own garden",
    "Mister Zephyr's own garden, please.",
)
RARE = [
    "Aachen",
    "GARDEN",
    "Mister",
    "Zephyr's",
    *(f"Rare{chr(97 + a)}{chr(97 + b)}" for a in range(20) for b in range(20)),
]
SAMPLE_SEEDS = np.random.default_rng(0).integers(0, 2**63, 4000).tolist()
ALL = InstructionRecipe(
    styles={"raw": 0.2, "lower": 0.2, "formatted": 0.3},
    context=0.5,
    context_words=8,
    context_empty=0.2,
    context_absent=0.3,
)


@pytest.fixture(scope="module", params=["graft", "reference"])
def any_processor(request, tmp_path_factory) -> GraftProcessor:
    return GraftProcessor.from_pretrained(
        tiny_models.save_tiny_graft(tmp_path_factory.mktemp("words") / "graft", prompt_style=request.param)
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> GraftProcessor:
    return GraftProcessor.from_pretrained(tiny_models.save_tiny_graft(tmp_path_factory.mktemp("words") / "graft"))


def drawn(text: str, settings: InstructionRecipe = ALL, style: str = "lower") -> list[Instruction]:
    sampler = InstructionSampler(settings, style, RARE)
    return [sampler.sample(text, sample_seed) for sample_seed in SAMPLE_SEEDS]


def listed(instruction: Instruction) -> list[str] | None:
    """Return the words of an instruction's list, None where it has no list."""
    if instruction.text.endswith(" No words are given."):
        return []
    found = re.search(r" These words may occur: (.*)\.$", instruction.text)
    return found[1].split(", ") if found else None


def test_nothing_changes_where_no_words_are_asked_for(any_processor):
    """Prompts and answers have the tokens of their whole texts, tokenized at once."""
    processor = any_processor
    sampler = make_instruction_sampler(
        InstructionRecipe(), [UPPER], prompt_style=processor.prompt_style, text_style="lower"
    )
    assert sampler.is_default
    assert {sampler.sample(text, sample_seed) for text in (UPPER, "") for sample_seed in SAMPLE_SEEDS[:10]} == {
        Instruction()
    }
    clip = AudioClip(np.zeros(8000, np.float32))
    for text in (UPPER, FORMATTED, "", "l'été à Zürich 12"):
        one = processor.example(clip, text, sampler.sample(text, 1))
        prompt = prompt_text(processor.prompt_style).replace(
            "<|audio_pad|>", "<|audio_pad|>" * processor.audio_token_count(50)
        )
        assert one.prompt_ids == processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = TEMPLATES[processor.prompt_style].answer.format(text=style_text(text, "lower")) + CHATML.answer_end
        assert one.target_ids == processor.tokenizer(answer, add_special_tokens=False)["input_ids"]


def test_the_references_prompt_is_fixed():
    with pytest.raises(RecipeError, match="the graft's prompt is the reference's, which is fixed"):
        make_instruction_sampler(ALL, [FORMATTED], prompt_style="reference", text_style="raw")
    sampler = make_instruction_sampler(InstructionRecipe(), [UPPER], prompt_style="reference", text_style="formatted")
    assert sampler.sample(UPPER, 1) == Instruction()


def test_a_seed_always_gives_the_same_instruction():
    sampler = InstructionSampler(ALL, "lower", RARE)
    copy = pickle.loads(pickle.dumps(sampler))
    assert [copy.sample(FORMATTED, sample_seed) for sample_seed in reversed(SAMPLE_SEEDS)][::-1] == drawn(FORMATTED)
    assert sampler.sample(FORMATTED, np.int64(SAMPLE_SEEDS[0])) == sampler.sample(FORMATTED, SAMPLE_SEEDS[0])
    # This must never change: a run that continues elsewhere must draw the same.
    expected = Instruction(
        "Write down exactly what is said. These words may occur: Raregp, Rarerk, Rareaf, Rareoi, Raresq, Mister.", "raw"
    )
    assert sampler.sample(FORMATTED, 2**62 + 1) == expected


def test_shares_are_kept():
    instructions = drawn(FORMATTED)
    styles = [instruction.style for instruction in instructions]
    for style, share in {**ALL.styles, None: 0.3}.items():
        assert styles.count(style) / len(styles) == pytest.approx(share, abs=0.03)
    lists = [words for words in map(listed, instructions) if words is not None]
    assert len(lists) / len(instructions) == pytest.approx(0.5, abs=0.03)
    assert sum(not words for words in lists) / len(lists) == pytest.approx(0.2, abs=0.03)
    own = {"Mister", "Zephyr's", "garden"}
    with_own = sum(bool({*map(str.lower, words)} & {*map(str.lower, own)}) for words in lists)
    assert with_own / len(lists) == pytest.approx(0.5, abs=0.03)
    phrasings = {instruction.text for instruction in instructions if listed(instruction) is None}
    assert phrasings == {DEFAULT_INSTRUCTION, *(phrasing for some in INSTRUCTIONS.values() for phrasing in some)}


def test_an_instruction_says_what_its_answer_is():
    for instruction in drawn(FORMATTED):
        asked = next((style for style, some in INSTRUCTIONS.items() if instruction.text.startswith(some)), None)
        assert asked == instruction.style


@pytest.mark.parametrize("text", [UPPER, LOWER, "I", "don't", "..."])
@pytest.mark.parametrize("style", ["lower", "raw", "formatted"])
def test_a_label_that_is_not_formatted_never_answers_for_one(text, style):
    for settings in (ALL, InstructionRecipe()):
        for instruction in drawn(text, settings, style):
            assert (instruction.style or style) != "formatted"


def test_what_is_formatted():
    assert all(map(is_formatted, [FORMATTED, "Yes.", "yes.", "O'Hara"]))
    assert not any(map(is_formatted, [UPPER, LOWER, "", "OK.", "it's e-mail", "…"]))
    assert {instruction.style for instruction in drawn(FORMATTED, InstructionRecipe(), "formatted")} == {None}
    assert {instruction.style for instruction in drawn("", InstructionRecipe(), "formatted")} == {None}


@pytest.mark.parametrize("text", [UPPER, LOWER, FORMATTED, "nothing of it is known", ""])
def test_a_list_gives_nothing_away(text):
    """A list holds rare words only, each once, in one case, within its length; those of the text are anywhere in it."""
    rare = {word.lower() for word in RARE}
    own = {word.lower() for word in text.replace(",", "").split()} & rare
    places, lengths, only_own, upper = [], set(), 0, 0
    for instruction in drawn(text):
        if not (words := listed(instruction)):
            continue
        folded = [word.lower() for word in words]
        assert len(set(folded)) == len(folded) <= 8
        assert set(folded) <= rare
        assert len({word.isupper() for word in words}) == 1
        assert len({word.islower() for word in words}) == 1 or is_formatted(text)
        lengths.add(len(words))
        places += [place / (len(words) - 1) for place, word in enumerate(folded) if word in own and len(words) > 1]
        only_own += len(words) > 1 and set(folded) <= own
        upper += words[0].isupper()
    assert lengths == set(range(1, 9))
    assert bool(upper) == text.isupper()
    assert bool(places) == bool(own)
    if own:
        assert np.mean(places) == pytest.approx(0.5, abs=0.05)
        assert only_own < len(SAMPLE_SEEDS) / 20


def test_lists_of_formatted_answers_have_their_case():
    lists = [
        words for instruction in drawn(FORMATTED) if instruction.style == "formatted" and (words := listed(instruction))
    ]
    assert {word for words in lists for word in words if word.lower() in ("mister", "zephyr's")} == {
        "Mister",
        "Zephyr's",
    }
    assert not any(word.isupper() for words in lists for word in words)


def test_rare_words_are_those_outside_the_frequent_ones():
    texts = ["the cat and the dog"] * 100 + ["Zwolle, the Aachen", "(AACHEN) ab x1", "Aachen's", "o'clock. Aachen"]
    expected = ["Aachen", "Aachen's", "o'clock", "Zwolle"]
    assert rare_words(texts) == expected
    for array in (pa.array(texts, pa.large_string()), pa.chunked_array([texts[:50], texts[50:]])):
        assert rare_words(array) == expected
    assert rare_words(texts, most=1) == ["Aachen"]
    assert rare_words([]) == rare_words(["", " "]) == []


def test_a_corpus_must_hold_what_is_to_be_trained():
    for settings, style in (
        (InstructionRecipe(styles={"formatted": 0.1}), "lower"),
        (InstructionRecipe(), "formatted"),
    ):
        with pytest.raises(DataError, match=r"none of 2 texts is formatted: make them with `graft format`"):
            make_instruction_sampler(settings, [UPPER, LOWER], prompt_style="graft", text_style=style)
        assert make_instruction_sampler(
            settings, pa.array([UPPER, FORMATTED]), prompt_style="graft", text_style=style
        ).sample(UPPER, 1)
    with pytest.raises(DataError, match="2 texts hold no rare words"):
        make_instruction_sampler(
            InstructionRecipe(context=0.1), ["12", "- 7"], prompt_style="graft", text_style="lower"
        )
    assert make_instruction_sampler(
        ALL, [FORMATTED, "garden own " * 20], prompt_style="graft", text_style="raw"
    ).rare_words == [
        "Mister",
        "please",
        "Zephyr's",
    ]


def test_what_stage_json_keeps():
    assert trained_instructions(ALL) == {"styles": ["formatted", "lower", "raw"], "context": True, "languages": []}
    nothing = {"styles": [], "context": False, "languages": []}
    assert trained_instructions(InstructionRecipe(styles={"raw": 0.0})) == nothing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("styles={raw: 0.6, lower: 0.6}", "shares of styles add up to 1.2: leave some samples the default instruction"),
        ("styles={upper: 0.6}", r"unknown key styles.upper \(known here: raw, lower or formatted\)"),
        ("context=2", "context=2: give a number from 0 to 1"),
        ("context_absent=0.95", "add up to more than 1"),
    ],
)
def test_wrong_shares_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(InstructionRecipe, None, [override])


def test_the_plans_lengths_are_those_of_the_samples(any_processor):
    processor = any_processor
    texts = [UPPER, "", FORMATTED, "l'été à Zürich <|im_end|>", FORMATTED]
    styles = [None, None, "formatted", "raw", "lower"]
    assert processor.target_lengths(texts, styles).tolist() == [
        len(processor.target_ids(*one)) for one in zip(texts, styles, strict=True)
    ]
    assert processor.tokenizer.decode(processor.target_ids(FORMATTED, "formatted")).strip() == f"{FORMATTED}<|im_end|>"
    assert processor.tokenizer.decode(processor.target_ids(FORMATTED)).strip() == f"{LOWER} please<|im_end|>"
    assert processor.target_lengths(texts).tolist() == [len(processor.target_ids(text)) for text in texts]
    asked = (
        [instruction.text for instruction in drawn(FORMATTED)[:50]] * 2
        if processor.prompt_style == "graft"
        else [DEFAULT_INSTRUCTION] * 3
    )
    expected = [len(processor.prompt_ids(100, instruction)) - processor.audio_token_count(100) for instruction in asked]
    assert processor.prompt_lengths(asked).tolist() == expected
    assert processor.prompt_lengths([]).shape == processor.target_lengths([]).shape == (0,)


TEXTS = [UPPER, FORMATTED, "", " ", "--- hello", "two  spaces ", "AT&T costs $5.20, 50%", "a\tb\nc", "Été à Zürich"]
TEXTS += [
    "İstanbul",
    "ΟΔΟΣ ΟΔΟΣ.",
    "नमस्ते दुनिया",
    "日本語 テスト。",
    "- -",
    "I 'am' it's",
    "12 345 6.7 -3",
    "<|im_end|> a",
]


@pytest.mark.parametrize("style", ["lower", "raw"])
@pytest.mark.parametrize("block", [5, 1000])
def test_a_corpus_is_counted_by_its_words_as_by_its_texts(any_processor, monkeypatch, style, block):
    monkeypatch.setattr("graft.text.word_counts.BLOCK", block)
    monkeypatch.setattr("graft.text.word_counts.CHECKED", 1)  # the first text of a block; all are compared here
    monkeypatch.setattr("graft.text.word_counts.MOST_WORDS", 20)
    monkeypatch.setattr(any_processor, "text_style", style)
    corpus = pa.array(["unused", *TEXTS, *TEXTS[::-1]], pa.large_string()).slice(1)
    expected = any_processor.target_lengths(corpus.to_pylist())
    assert any_processor.corpus_target_lengths(corpus).tolist() == expected.tolist()
    assert any_processor.corpus_target_lengths(corpus[:0]).tolist() == []


def test_texts_whose_tokens_reach_across_spaces_are_counted_whole():
    def lengths(texts):  # a pair of words is one token
        return np.array([(len(text.split()) + 1) // 2 for text in texts])

    corpus = pa.array(["one", "one two", "one two three", ""], pa.large_string())
    assert count_tokens(corpus, lengths, write=str.lower, template="{text}").tolist() == [1, 1, 2, 0]


def test_padding_left_on_by_others_does_not_reach_the_lengths(processor):
    processor.tokenizer(["a", "a b c d e"], padding=True, truncation=True, max_length=4)
    assert processor.target_lengths(["a", "a b c d e"]).tolist() == [2, 10]


def test_no_prompt_token_is_ever_a_label(processor):
    clip = AudioClip(np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32))
    for text in (UPPER, FORMATTED, "", "label <|im_start|>assistant\n of <|audio_pad|> tokens"):
        instructions = {
            *drawn(text)[:40],
            *(Instruction(phrasing, style) for style, some in INSTRUCTIONS.items() for phrasing in some),
        }
        examples = [processor.example(clip, text, instruction) for instruction in instructions]
        batch = {
            name: torch.from_numpy(array)
            for name, array in processor.training_batch([*examples, labelled(processor, 1)]).items()
        }
        labels = check_labels(batch["input_ids"], batch["labels"], processor.prompt_end_ids())
        assert labels == sum(len(one.target_ids) for one in examples) + len(labelled(processor, 1).target_ids)
        pads = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|audio_pad|>")).sum(1)
        assert set(pads[:-1].tolist()) == {processor.audio_token_count(25)}
    assert filler(processor)[0].target_ids == []
