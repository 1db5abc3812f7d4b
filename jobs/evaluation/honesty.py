"""Check an evaluation: whether its numbers can be trusted, as far as data and answers tell.

    {"checks": [{"name", "title", "verdict", "ok", "numbers", "ids"}, ...]}

`verdict` is a sentence. `ok` is true or false, or null where nothing could be checked, or where people must judge.
`numbers` are what the verdict is made of, `ids` the clips that it is about, as [set, id]. The checks, by their names:

    duplicates       clips that stand twice in the test sets
    overlap          test clips that the model was trained on
    swapped_audio    the WER with the audio of other clips, which must be high
    prompt_leakage   answers that repeat the prompt, or hold special tokens
    no_speech        characters a minute where nobody speaks
    context_words    words given as context: how many more are written, and how many that nobody said
    label_noise      clips where the systems agree against the label
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from graft.data.splits import comparable_text
from graft.text.prompts import DEFAULT_INSTRUCTION, INSTRUCTIONS
from graft.text.wer import score

from .check_sets import CONTEXT, SWAPPED
from .overlap import Overlap
from .predictions import Prediction
from .samples import ScoringSettings
from .scoring import score_predictions

Check = dict[str, Any]
MOST_IDS = 1000
"""Most clips that a check names."""
HIGH_WER = 0.6
"""WER over which a text has little to do with its reference."""
NOTABLE_CHARS = 10.0
"""Characters a minute without speech over which a model invents text."""
NOTABLE_LEAKS = 0.05
"""Wrong words among those given, over which a model writes what it is given."""
SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>")
_PROMPTS = [
    comparable_text(one) for one in (DEFAULT_INSTRUCTION, *(one for some in INSTRUCTIONS.values() for one in some))
]


def check(
    name: str,
    title: str,
    verdict: str,
    *,
    ok: bool | None = None,
    numbers: Mapping[str, Any] | None = None,
    ids: Iterable[tuple[str | None, str]] = (),
) -> Check:
    """Make a check."""
    listed = [list(one) for one in ids]
    return {
        "name": name,
        "title": title,
        "verdict": verdict,
        "ok": ok,
        "numbers": dict(numbers or {}),
        "ids": listed[:MOST_IDS],
    }


def check_duplicates(found: Overlap, predictions: Sequence[Prediction]) -> Check:
    """Tell how many clips stand twice, and the WER without the repetitions."""
    title = "Clips that stand twice in the test sets"
    clips, count = found.clips, found.compared["clips"]
    numbers = {"clips": count, "ids": len(found.ids), "texts": len(found.texts), "audio": len(found.audio)}
    if not clips:
        return check("duplicates", title, f"None of {_count(count, 'clip')} stands twice.", ok=True, numbers=numbers)
    kinds = _kinds({"id": found.ids, "text": found.texts, "audio": found.audio})
    changes = _wer_without(predictions, clips)
    verdict = f"{len(clips)} of {_count(count, 'clip')} stand twice ({kinds}). {_changes(changes)}"
    return check(
        "duplicates", title, verdict, ok=not found.audio and not found.ids, numbers=numbers | changes, ids=clips
    )


def check_overlap(found: Overlap | None, predictions: Sequence[Prediction], reason: str = "") -> Check:
    """Tell how many test clips stand in the training data, and the WER without them; or why that is not known."""
    title = "Test clips in the training data"
    if found is None:
        return check("overlap", title, f"It was not checked: {reason}.")
    clips, compared = found.clips, found.compared
    numbers = {**compared, "ids": len(found.ids), "texts": len(found.texts), "audio": len(found.audio)}
    of = f"{_count(compared['clips'], 'clip')}, compared with {_count(compared['training'], 'training clip')}"
    part = compared["of_equal_length"] - compared["decoded"]
    limits = f" The audio of {part} training clips of equal length was not compared." if part else ""
    if not clips:
        verdict = f"The training data hold none of {of} by id, text and audio.{limits}"
        return check("overlap", title, verdict, ok=True, numbers=numbers)
    kinds = _kinds({"id": found.ids, "text": found.texts, "audio": found.audio})
    changes = _wer_without(predictions, clips)
    verdict = f"The training data hold {len(clips)} of {of} ({kinds}).{limits} {_changes(changes)}"
    return check("overlap", title, verdict, ok=False, numbers=numbers | changes, ids=clips)


def check_swapped_audio(predictions: Sequence[Prediction], checks: Sequence[Prediction], system: str) -> Check:
    """Compare the WER of the swapped clips with that of the same references with their own audio."""
    title = "The audio of another clip"
    swapped = [one for one in checks if one.set_name == SWAPPED and one.system == system]
    own = {one.id: one for one in predictions if one.system == system}
    pairs = [(own[one.id], one) for one in swapped if one.id in own]
    if not pairs:
        return check("swapped_audio", title, "It was not checked: that takes two clips at least.")
    references = [one.reference or "" for one, _ in pairs]
    numbers = {"clips": len(pairs)} | {
        name: score(references, [answer.hypothesis or "" for answer in answers]).wer
        for name, answers in (("wer", [one for one, _ in pairs]), ("wer_swapped", [other for _, other in pairs]))
    }
    right, wrong = numbers["wer"], numbers["wer_swapped"]
    figures = f"The WER of {_count(len(pairs), 'clip')} is {right:.1%}, and {wrong:.1%} with the audio of other clips"
    if wrong >= HIGH_WER and right < HIGH_WER:
        return check("swapped_audio", title, f"{figures}: {system} listens.", ok=True, numbers=numbers)
    if wrong < HIGH_WER:
        verdict = f"{figures}: {system} knows the texts without listening, or the clips are alike."
        return check("swapped_audio", title, verdict, ok=False, numbers=numbers)
    return check("swapped_audio", title, f"{figures}: {system} hears too little to tell.", numbers=numbers)


def check_prompt_leakage(predictions: Iterable[Prediction], instructions: Sequence[str] = ()) -> Check:
    """List the answers that hold special tokens, or an instruction that is not in their reference."""
    title = "The prompt in the answers"
    prompts = [*_PROMPTS, *map(comparable_text, instructions)]
    answers = [one for one in predictions if one.hypothesis]
    leaks = [one for one in answers if _leaks(one, prompts)]
    counts = dict(Counter(str(one.system) for one in leaks))
    numbers = {"answers": len(answers), "leaks": counts}
    if not leaks:
        verdict = f"None of {_count(len(answers), 'answer')} repeats an instruction or holds special tokens."
        return check("prompt_leakage", title, verdict, ok=True, numbers=numbers)
    named = ", ".join(f"{system} {count}" for system, count in counts.items())
    verdict = f"{len(leaks)} of {_count(len(answers), 'answer')} repeat the prompt: {named}."
    ids = dict.fromkeys((one.set_name, one.id) for one in leaks)
    return check("prompt_leakage", title, verdict, ok=False, numbers=numbers, ids=ids)


def check_no_speech(predictions: Iterable[Prediction], system: str) -> Check:
    """Count the characters that a system writes where nobody speaks."""
    title = "Text where nobody speaks"
    silent = [one for one in predictions if one.system == system and one.reference == "" and one.duration_s]
    if not silent:
        return check("no_speech", title, "It was not checked: no clips without speech were made.")
    rates: dict[str, float] = {}
    for name in dict.fromkeys(str(one.set_name) for one in silent):
        own = [one for one in silent if one.set_name == name]
        minutes = sum(one.duration_s or 0 for one in own) / 60
        rates[name] = sum(len(one.hypothesis or "") for one in own) / minutes
    figures = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    verdict = f"{system} writes so many characters a minute: {figures}."
    written = [(one.set_name, one.id) for one in silent if one.hypothesis]
    return check("no_speech", title, verdict, ok=max(rates.values()) <= NOTABLE_CHARS, numbers=rates, ids=written)


def check_context_words(checks: Iterable[Prediction], words: Sequence[str], system: str, reason: str = "") -> Check:
    """Compare answers with a list of words that may occur with those without, by the words of the list."""
    title = "Words given as context"
    if not words:
        return check("context_words", title, f"It was not checked: {reason}.")
    answers: dict[str, dict[str, Prediction]] = {}
    for one in checks:
        if one.set_name == CONTEXT:
            answers.setdefault(one.id, {})[str(one.system)] = one
    pairs = [(found[system], found[told_name(system)]) for found in answers.values() if len(found) == 2]
    keys = [comparable_text(word) for word in words]
    numbers: dict[str, Any] = {"clips": len(pairs), "words": len(words)}
    for name, own in (("without", [one for one, _ in pairs]), ("with", [one for _, one in pairs])):
        hits = wanted = leaks = others = 0
        for one in own:
            said, written = (_words(text) for text in (one.reference, one.hypothesis))
            hits += sum(key in written for key in keys if key in said)
            wanted += sum(key in said for key in keys)
            leaks += sum(key in written for key in keys if key not in said)
            others += sum(key not in said for key in keys)
        numbers |= {f"recall_{name}": hits / max(1, wanted), f"leaks_{name}": leaks / max(1, others)}
        numbers[f"wrong_words_{name}"] = leaks
    verdict = (
        f"Of words that are said, {system} writes {numbers['recall_without']:.0%} without the list and "
        f"{numbers['recall_with']:.0%} with it; of those that nobody said in the clip, {numbers['leaks_with']:.1%} are "
        f"written with the list ({_count(numbers['wrong_words_with'], 'word')} in {_count(len(pairs), 'clip')})."
    )
    is_helpful = numbers["recall_with"] >= numbers["recall_without"] and numbers["leaks_with"] <= NOTABLE_LEAKS
    return check(
        "context_words", title, verdict, ok=is_helpful, numbers=numbers, ids=[(CONTEXT, one) for one in answers]
    )


def check_label_noise(scores: Mapping[str, Any]) -> Check:
    """Tell how the WER moves without the clips where systems agree against the label."""
    title = "Labels that the systems contradict together"
    parts: list[str] = []
    ids: list[tuple[str, str]] = []
    numbers: dict[str, Any] = {}
    for name, one in scores["sets"].items():
        noise = one.get("label_noise")
        if not noise or len(one["systems"]) < 2:
            continue
        ids += [(name, clip) for clip in noise["set_aside"]]
        numbers[name] = {"set_aside": len(noise["set_aside"]), **noise["systems"]}
        rates = noise["systems"].items()
        moves = [f"{system} {found['wer']:.1%} -> {found['wer_kept']:.1%}" for system, found in rates]
        if noise["set_aside"]:
            parts.append(f"{name}: without {_count(len(noise['set_aside']), 'clip')}, {', '.join(moves)}")
    if not numbers:
        return check("label_noise", title, "It was not checked: that takes two systems that transcribe the same clips.")
    if not parts:
        return check("label_noise", title, "The systems agree against no label.", ok=True, numbers=numbers)
    verdict = f"Where systems agree on another text, the label may be wrong. WER of {'; '.join(parts)}."
    return check("label_noise", title, verdict, numbers=numbers, ids=ids)


def told_name(system: str) -> str:
    """Return the name of a system that is told words which may occur."""
    return f"{system} with context"


def honesty_lines(honesty: Mapping[str, Any]) -> Iterator[str]:
    """Lay the checks out for people, a line each."""
    marks = {True: "ok", False: "LOOK", None: "-"}
    for one in honesty["checks"]:
        yield f"check {marks[one['ok']]:<4} {one['title']}: {one['verdict']}"


def _words(text: str | None) -> set[str]:
    """Return the words of a text, as they are compared."""
    return set(comparable_text(text or "").split())


def _leaks(one: Prediction, prompts: Sequence[str]) -> bool:
    reference, hypothesis = one.reference or "", one.hypothesis or ""
    tokens = set(SPECIAL_TOKEN.findall(hypothesis)) - set(SPECIAL_TOKEN.findall(reference))
    said, written = comparable_text(reference), comparable_text(hypothesis)
    return bool(tokens) or any(prompt in written and prompt not in said for prompt in prompts if prompt)


def _wer_without(predictions: Sequence[Prediction], clips: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the WER of all clips by system, and without some of them."""
    left_out = set(clips)
    kept = [one for one in predictions if (one.set_name, one.id) not in left_out]
    return {"wer": _pooled_wer(predictions), "wer_without": _pooled_wer(kept)}


def _pooled_wer(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return each system's WER over all sets with speech."""
    one_set = [one for one in predictions if (one.reference or "").strip()]
    if not one_set:
        return {}
    scores = score_predictions(one_set, ScoringSettings(by=(), resamples=1))
    errors: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for found in scores["sets"].values():
        for system, rates in found["systems"].items():
            errors[system] += rates["substitutions"] + rates["deletions"] + rates["insertions"]
            words[system] += rates["words"]
    return {system: errors[system] / max(1, words[system]) for system in words}


def _changes(changes: Mapping[str, Mapping[str, float]]) -> str:
    """Say how the WER changes."""
    without = changes["wer_without"]
    if not without:
        return "No clip is left without them."
    moves = (
        f"{system} {wer:.1%} -> {without[system]:.1%}" for system, wer in changes["wer"].items() if system in without
    )
    return f"WER without them: {', '.join(moves)}."


def _kinds(found: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{len(clips)} by {kind}" for kind, clips in found.items() if clips)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
