"""Languages are named by codes, with or without a region, or in English."""

import pytest

from graft.errors import DataError, ModelError
from graft.text.instructions import InstructionRecipe, InstructionSampler, trained_instructions
from graft.text.languages import language_code, language_name
from graft.text.prompts import DEFAULT_INSTRUCTION, Instruction, request_instruction


def test_codes_regions_and_names_are_one_language():
    given = ["de", "DE", "de-AT", "de_ch", "vi_vn", "cmn_hans_cn", "yue", "gsw"]
    assert [language_code(one) for one in given] == ["de", "de", "de", "de", "vi", "zh", "yue", "gsw"]
    assert [language_code(one) for one in ("German", " vietnamese", "Burmese")] == ["de", "vi", "my"]
    assert [language_code(one) for one in ("deu", "ger", "eng", "zho-TW", "English (US)")] == [
        "de",
        "de",
        "en",
        "zh",
        "en",
    ]
    assert [language_name(one) for one in ("de", "gsw")] == ["German", "gsw"]
    for wrong in ("", "Klingon", "d", "12"):
        with pytest.raises(DataError, match="is none that is known: give its code by ISO 639-1, such as de"):
            language_code(wrong)


def test_a_prompt_names_the_languages_that_were_trained():
    styles = {"text_style": "lower", "trained_styles": [], "trained_context": True}
    known = {**styles, "trained_languages": ["de", "vi"]}
    spoken = request_instruction(None, ["Aachen"], language="de-AT", **known)
    assert spoken == f"{DEFAULT_INSTRUCTION} The language is German. These words may occur: Aachen."
    assert request_instruction(None, None, **known) == DEFAULT_INSTRUCTION
    with pytest.raises(ModelError, match="language=fr: this checkpoint knows de, vi: give one of these, or none"):
        request_instruction(None, None, language="fr", **known)
    with pytest.raises(ModelError, match=r"names no language: leave it out, or train stage 2 with words.language"):
        request_instruction(None, None, language="de", **styles)


def test_a_share_of_the_samples_names_its_language():
    settings = InstructionRecipe(language=0.25)
    sampler = InstructionSampler(settings)
    assert not sampler.is_default
    drawn = [sampler.sample("xin chào", seed, "vi") for seed in range(4000)]
    named = Instruction(f"{DEFAULT_INSTRUCTION} The language is Vietnamese.")
    assert set(drawn) == {Instruction(), named}
    assert drawn.count(named) / len(drawn) == pytest.approx(0.25, abs=0.03)
    assert {sampler.sample("xin chào", seed) for seed in range(100)} == {Instruction()}
    assert trained_instructions(settings, ["", "vi", "de"])["languages"] == ["de", "vi"]
    assert trained_instructions(InstructionRecipe(context=0.1), ["vi"])["languages"] == []
