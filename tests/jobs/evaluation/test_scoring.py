"""Scores are those of jiwer and kaldialign, of hand-made cases, and say how sure they are."""

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import jiwer
import kaldialign
import numpy as np
import pytest

from graft.text.wer import OPENAI_ENGLISH, RATES, normalize, score
from jobs.evaluation.predictions import Prediction
from jobs.evaluation.samples import ScoringSettings
from jobs.evaluation.score_table import score_table
from jobs.evaluation.scoring import category, score_predictions

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "away", "white", "paper"]


def clips(count: int, *, errors: dict[str, float], speakers: int = 0, seed: int = 0, **known: Any) -> list[Prediction]:
    """Clips of 1 to 20 words, and answers of systems that get a share of the words wrong."""
    random, lines = np.random.default_rng(seed), list[Prediction]()
    for place in range(count):
        words = list(random.choice(WORDS, size=random.integers(1, 20)))
        speaker = f"s{place % speakers}" if speakers else None
        lines.append(
            Prediction(f"c{place}", reference=" ".join(words), duration_s=len(words) / 2, speaker=speaker, **known)
        )
        for system, share in errors.items():
            wrong = [str(random.choice(WORDS)) if random.random() < share else word for word in words]
            heard = [word for word in wrong if random.random() > share / 3]
            lines.append(Prediction(f"c{place}", system=system, hypothesis=" ".join(heard), seconds=0.5))
    return lines


def texts_of(lines: Sequence[Prediction], system: str) -> tuple[list[str], list[str]]:
    references = {line.id: line.reference or "" for line in lines if line.reference is not None}
    texts = {line.id: line.hypothesis or "" for line in lines if line.system == system}
    return list(references.values()), [texts.get(clip_id, "") for clip_id in references]


def test_rates_are_those_of_jiwer() -> None:
    lines = clips(60, errors={"one": 0.2})
    found = score_predictions(lines)["sets"]["all"]
    one = found["systems"]["one"]
    references, texts = texts_of(lines, "one")
    aligned = jiwer.process_words(references, texts)
    assert one["wer"] == one["wer_folded"] == one["wer_raw"] == pytest.approx(aligned.wer)
    assert one["cer"] == pytest.approx(jiwer.cer(references, texts))
    assert (one["substitutions"], one["deletions"], one["insertions"]) == (
        aligned.substitutions,
        aligned.deletions,
        aligned.insertions,
    )
    assert one["counts"]["wer"] == [aligned.substitutions, aligned.deletions, aligned.insertions, aligned.hits]
    macro = [jiwer.wer(*clip) for clip in zip(references, texts, strict=True)]
    assert one["wer_macro"] == pytest.approx(np.mean(macro))
    simple = score(references, texts)
    assert (one["wer"], one["cer_raw"], one["words"]) == pytest.approx((simple.wer, simple.cer_raw, simple.words))
    for rate in (*RATES, "wer_macro", "cer_macro"):
        assert one[f"{rate}_low"] < one[rate] < one[f"{rate}_high"]
    assert (found["unit"], found["units"], found["normalizer"]) == ("clip", 60, "english")
    assert one["rtfx"] == pytest.approx(sum(line.duration_s or 0 for line in lines) / 30)


def test_case_and_punctuation_are_counted_apart() -> None:
    lines = [Prediction("a", reference="Hello, colour!", system="one", hypothesis="hello, color!")]
    one = score_predictions(lines)["sets"]["all"]["systems"]["one"]
    assert (one["wer_raw"], one["wer_folded"], one["wer"]) == (1.0, 0.5, 0.0)


def test_counts_of_shards_add_up() -> None:
    lines = clips(60, errors={"one": 0.2, "two": 0.3})
    parts = [[line for line in lines if int(line.id[1:]) % 3 == part] for part in range(3)]
    whole = score_predictions(lines)["sets"]["all"]["systems"]
    shards = [score_predictions(part)["sets"]["all"]["systems"] for part in parts]
    for system, rate in itertools.product(whole, RATES):
        summed = np.sum([shard[system]["counts"][rate] for shard in shards], axis=0)
        assert summed.tolist() == whole[system]["counts"][rate]
    for count in ("clips", "words", "answered", "exact", "partial", "mismatch"):
        assert sum(shard["two"][count] for shard in shards) == whole["two"][count]


def test_a_system_that_answers_half_is_charged_for_the_rest_and_compared_on_both_grounds() -> None:
    lines = clips(100, errors={"whole": 0.3, "half": 0.05})
    lines = [line for line in lines if line.system != "half" or int(line.id[1:]) % 2]
    scores = score_predictions(lines)
    found = scores["sets"]["all"]
    half = found["systems"]["half"]
    assert (half["clips"], half["answered"]) == (100, 50)
    assert half["missing"] == [f"c{place}" for place in range(0, 100, 2)]
    references, texts = texts_of(lines, "half")
    assert half["wer"] == pytest.approx(jiwer.wer(references, texts))
    (comparison,) = found["comparisons"]
    assert comparison["systems"] == ["whole", "half"]
    assert (comparison["all"]["clips"], comparison["both"]["clips"]) == (100, 50)
    assert comparison["all"]["difference"] < comparison["all"]["high"] < 0 < comparison["both"]["low"]
    assert comparison["all"]["verdict"].startswith("whole is better than half by ")
    assert comparison["both"]["verdict"].startswith("half is better than whole by ")
    both = [texts_of([line for line in lines if int(line.id[1:]) % 2], system) for system in ("whole", "half")]
    difference = jiwer.wer(*both[0]) - jiwer.wer(*both[1])
    assert comparison["both"]["difference"] == pytest.approx(difference)
    table = score_table(scores)
    assert "all, the 50 clips that both answered: half is better than whole by " in table
    assert "half has no answer to 50 clips (c0, c2, c4 and 47 more): all their words are deletions" in table


def test_failed_clips_are_deletions_and_listed() -> None:
    lines = [
        Prediction("a", reference="good morning", system="s", hypothesis="good morning"),
        Prediction("b", reference="how are", system="s", error="not audio"),
        Prediction("c", reference="you", system="s"),
    ]
    scores = score_predictions(lines)
    one = scores["sets"]["all"]["systems"]["s"]
    assert (one["wer"], one["deletions"], one["answered"], one["missing"]) == (3 / 5, 3, 1, [])
    assert one["failed"] == {"b": "not audio", "c": "no hypothesis"}
    assert (one["exact"], one["mismatch"]) == (1, 2)
    assert "all: s failed on 2 clips (b, c): all their words are deletions" in score_table(scores)


def test_categories_are_those_of_the_reference_system() -> None:
    for reference, text, name in [
        ("HELLO THERE", "hello  there", "exact"),
        ("hello", "oh Hello there", "partial"),
        ("hello there", "hello", "mismatch"),
        ("hello", None, "mismatch"),
        ("", "", "exact"),
        ("", "hello", "mismatch"),
        ("", None, "mismatch"),
    ]:
        assert category(reference, text) == name, (reference, text)


def test_speakers_are_resampled_where_they_are_known() -> None:
    lines = clips(200, errors={"one": 0.2}, speakers=20)
    found = score_predictions(lines)["sets"]["all"]
    assert (found["unit"], found["units"]) == ("speaker", 20)
    # One speaker alone says nothing of others: what is drawn are clips.
    assert score_predictions(clips(20, errors={"one": 0.2}, speakers=1))["sets"]["all"]["unit"] == "clip"
    few = score_predictions(clips(20, errors={"one": 0.2}, speakers=3))
    assert "intervals over 3 speakers, which are few: they are rough" in score_table(few)
    some = [line for line in lines if not line.reference or int(line.id[1:]) % 20 < 2] + [
        Prediction(f"x{place}", reference="a b", system="one", hypothesis="a b") for place in range(5)
    ]
    assert score_predictions(some)["sets"]["all"]["units"] == 2 + 5


def test_intervals_hold_what_they_promise_and_are_seeded() -> None:
    lines = clips(100, errors={"one": 0.2}, speakers=10)
    assert score_predictions(lines) == score_predictions(lines)
    other = score_predictions(lines, ScoringSettings(seed=1))
    one, moved = (scores["sets"]["all"]["systems"]["one"] for scores in (score_predictions(lines), other))
    assert one["wer"] == moved["wer"]
    assert one["wer_low"] != moved["wer_low"]
    bootstrap = kaldialign.bootstrap_wer_ci(*([text.split() for text in some] for some in texts_of(lines, "one")))
    by_clip = score_predictions([line for line in clips(100, errors={"one": 0.2})])["sets"]["all"]["systems"]["one"]
    assert by_clip["wer_low"] == pytest.approx(bootstrap["ci95min"], abs=0.004)
    assert by_clip["wer_high"] == pytest.approx(bootstrap["ci95max"], abs=0.004)


def test_few_clips_show_no_difference() -> None:
    for count, verdict in (
        (5, "no difference shown between one and two"),
        (6, "two is better than one by 50.0 points"),
    ):
        lines = [
            Prediction(f"c{place}", reference="good morning", system=system, hypothesis=text)
            for place in range(count)
            for system, text in (("one", "good"), ("two", "good morning"))
        ]
        (comparison,) = score_predictions(lines)["sets"]["all"]["comparisons"]
        assert comparison["all"]["verdict"].startswith(verdict)


def test_equal_systems_show_no_difference() -> None:
    lines = clips(50, errors={"one": 0.2})
    lines += [Prediction(line.id, system="two", hypothesis=line.hypothesis) for line in lines if line.system == "one"]
    (comparison,) = score_predictions(lines)["sets"]["all"]["comparisons"]
    assert comparison["all"]["verdict"] == "no difference shown between one and two: +0.0 points [+0.0, +0.0]"


def test_break_downs_sum_to_the_whole() -> None:
    lines = [
        line if line.reference is None else Prediction(
            line.id, reference=line.reference, duration_s=line.duration_s, speaker=line.speaker,
            source="ab"[place % 4 // 2], sex=None if place % 5 else "f",
            more={"snr_db": float(place), "room": place % 3},
        )
        for place, line in enumerate(clips(90, errors={"one": 0.2}, speakers=6))
    ]  # fmt: skip
    settings = ScoringSettings(by=("source", "sex", "speaker", "duration", "snr_db", "room", "no_such"))
    scores = score_predictions(lines, settings)
    found = scores["sets"]["all"]
    assert found["breakdowns"].keys() == {"source", "sex", "speaker", "duration", "snr_db", "room"}
    assert list(found["breakdowns"]["sex"]) == ["f", "unknown"]
    assert list(found["breakdowns"]["duration"]) == ["under 2 s", "2 to 5 s", "5 to 10 s"]
    assert len(found["breakdowns"]["snr_db"]) == 4
    assert list(found["breakdowns"]["room"]) == ["0", "1", "2"]
    one = found["systems"]["one"]
    for groups in found["breakdowns"].values():
        assert sum(group["clips"] for group in groups.values()) == 90
        assert sum(group["words"] for group in groups.values()) == one["words"]
        errors = sum(group["words"] * group["systems"]["one"]["wer"] for group in groups.values())
        assert errors == pytest.approx(one["wer"] * one["words"])
    for group in found["breakdowns"]["speaker"].values():  # of one speaker, clips are drawn
        assert group["systems"]["one"]["wer_low"] < group["systems"]["one"]["wer_high"]
    assert "all by source" in score_table(scores)


def test_sets_are_pooled_and_averaged() -> None:
    long = clips(100, errors={"one": 0.4, "two": 0.1, "absent": 0.1}, set_name="long")
    short = clips(20, errors={"one": 0.1, "two": 0.1}, seed=1, set_name="short")
    lines = [
        line if line.reference else Prediction(**vars(line) | {"set_name": name})
        for name, some in (("long", long), ("short", short))
        for line in some
    ]
    scores = score_predictions(lines)
    overall, sets = scores["overall"], scores["sets"]
    assert overall["systems"].keys() == {"one", "two"}  # absent has no answer in a set
    assert sets["short"]["systems"].keys() == {"one", "two"}
    one = overall["systems"]["one"]
    rates = [sets[name]["systems"]["one"]["wer"] for name in ("long", "short")]
    words = [sets[name]["systems"]["one"]["words"] for name in ("long", "short")]
    assert one["mean_of_sets"]["wer"] == pytest.approx(np.mean(rates))
    assert one["pooled"]["wer"] == pytest.approx(np.dot(rates, words) / sum(words))
    for basis in ("pooled", "mean_of_sets"):
        assert one[basis]["wer_low"] < one[basis]["wer"] < one[basis]["wer_high"]
        assert overall["comparisons"][0][basis]["verdict"].startswith("two is better than one by ")
    assert "mean of sets: two is better than one" in score_table(scores)
    assert score_predictions(long)["overall"] is None


def test_empty_references_add_insertions_and_silence_is_counted() -> None:
    lines = [
        Prediction("a", reference="good morning", system="s", hypothesis="good morning"),
        Prediction("b", reference="", system="s", hypothesis="thank you"),
        Prediction("c", reference="–", system="s", hypothesis=""),
    ]
    scores = score_predictions(lines)
    found = scores["sets"]["all"]
    assert (found["empty_references"], found["systems"]["s"]["wer"], found["systems"]["s"]["insertions"]) == (2, 1.0, 2)
    assert "all: 2 clips have no words in the reference: each word there is an insertion" in score_table(scores)
    silent = [Prediction("b", reference="", system="s", hypothesis="thank you", duration_s=30)]
    scores = score_predictions([*silent, Prediction("d", reference=" ", system="s", hypothesis="", duration_s=30)])
    one = scores["sets"]["all"]["systems"]["s"]
    assert (one["minutes"], one["chars_per_minute"], one["share_with_text"]) == (1.0, 9.0, 0.5)
    assert score_table(scores).splitlines()[0].startswith("no speech")


@pytest.mark.parametrize(
    ("language", "reference", "text", "normalizer", "wer", "cer"),
    [
        ("de", "Eine Tür (laut).", "eine tur", "basic", 1 / 2, 1 / 8),
        ("ja", "こんにちは、世界。", "こんばんは 世界", "basic, by character", 2 / 7, 2 / 7),
        (None, "यह एक परीक्षण है।", "यह एक परीक्षण हैं", "basic", 1 / 4, 1 / 15),
        ("ar", "صباح الخير", "صباح الخير", "basic", 0, 0),
    ],
)
def test_other_alphabets_have_their_normaliser(
    language: str | None, reference: str, text: str, normalizer: str, wer: float, cer: float
) -> None:
    lines = [Prediction("a", reference=reference, language=language, system="s", hypothesis=text)]
    found = score_predictions(lines)["sets"]["all"]
    one = found["systems"]["s"]
    assert (found["normalizer"], one["wer"], one["cer"]) == (
        normalizer,
        pytest.approx(wer),
        pytest.approx(cer, abs=0.02),
    )
    simple = score([reference], [text], language=language)
    assert (one["wer"], one["cer"], one["wer_raw"], one["cer_raw"]) == (
        simple.wer, simple.cer, simple.wer_raw, simple.cer_raw,
    )  # fmt: skip


def test_a_set_of_several_languages_becomes_one_for_each() -> None:
    lines = [
        Prediction("a", "dev", "s", "good morning", "good morning", language="en"),
        Prediction("b", "dev", "s", "guten Morgen", "guten morgen", language="de"),
        Prediction("c", "dev", "s", "five", "5"),
    ]
    sets = score_predictions(lines)["sets"]
    assert {name: one["normalizer"] for name, one in sets.items()} == {
        "dev en": "english",
        "dev de": "basic",
        "dev unknown": "english",
    }
    assert score_predictions(lines, ScoringSettings(language="en"))["sets"].keys() == {"dev en", "dev de"}


def test_open_asr_is_the_rule_of_the_leaderboard() -> None:
    lines = [
        Prediction("a", "x", "s", "The whitepaper, um, is out.", "the white paper is out", 2.0, seconds=0.5),
        Prediction("b", "x", "s", "[noise]", "thank you", 1.0, seconds=0.5),
        Prediction("c", "x", "s", "ignore time segment in scoring", "hello", 1.0, seconds=0.5),
        Prediction("d", "x", "s", "dunno", "do not know", 1.0, seconds=0.5),
        Prediction("e", "y", "s", "five dollars", "$5", 1.0, seconds=0.5),
    ]
    scores = score_predictions(lines, ScoringSettings(scorer="open-asr"))
    found = scores["sets"]["x"]
    assert (found["normalizer"], found["left_out"], found["clips"]) == (OPENAI_ENGLISH, ["b", "c"], 2)
    one = found["systems"]["s"]
    assert (one["wer"], one["words"], one["wer_raw"]) == (3 / 5, 5, pytest.approx(7 / 6))
    texts = [(normalize(line.reference or "", OPENAI_ENGLISH), normalize(line.hypothesis or "", OPENAI_ENGLISH))
             for line in lines if line.id in "ad"]  # fmt: skip
    batch = kaldialign.batch_error_rate(
        *zip(*[(a.split(), b.split()) for a, b in texts], strict=True), merge_compounds=True
    )
    assert one["wer"] == batch["err_rate"]
    assert one["rtfx"] == 3.0
    assert scores["overall"]["systems"]["s"]["rtfx"] == 4 / 1.5  # the audio of all sets by the time of all
    mean = scores["overall"]["systems"]["s"]["mean_of_sets"]["wer"]
    assert mean == np.mean([batch["err_rate"], 0.0])
    assert "x: 2 clips without reference words are left out (b, c)" in score_table(scores)


def test_label_noise_is_where_systems_agree_against_the_label() -> None:
    answers = {"a": ("good day", "good day"), "b": ("tree", "tree."), "c": ("fox", "dog"), "d": ("", "")}
    references = {"a": "Good day!", "b": "free", "c": "fox", "d": "paper"}
    lines = [
        Prediction(clip_id, reference=references[clip_id], system=system, hypothesis=text)
        for clip_id, texts in answers.items()
        for system, text in zip(("x", "y"), texts, strict=True)
    ]
    scores = score_predictions(lines)
    noise = scores["sets"]["all"]["label_noise"]
    assert noise["set_aside"] == ["b"]
    assert noise["systems"]["x"] == {"wer": pytest.approx(2 / 5), "wer_kept": pytest.approx(1 / 4)}
    assert "all: systems agree against the label of 1 clips; without those the WER is x 25.0% instead" in score_table(
        scores
    )
    lines += [Prediction(clip_id, system="z", hypothesis="nothing") for clip_id in answers]
    assert score_predictions(lines)["sets"]["all"]["label_noise"]["set_aside"] == ["b"]  # two of three agree
    alone = [line for line in lines if line.system == "x"]
    assert score_predictions(alone)["sets"]["all"]["label_noise"] is None


@pytest.mark.slow
def test_ten_thousand_clips_of_two_systems_take_seconds() -> None:
    lines = clips(10_000, errors={"one": 0.1, "two": 0.11}, speakers=300)
    start = time.process_time()
    found = score_predictions(lines)["sets"]["all"]
    assert time.process_time() - start < 30
    assert found["comparisons"][0]["all"]["verdict"].startswith("one is better than two by ")
    assert not math.isnan(found["systems"]["one"]["wer_macro_high"])
