"""Make metrics and log lines of a validation on one set of clips or several.

losses and transcripts of each set -> word error rates by language -> metrics by name, and lines for the log

Metrics of all sets together have no suffix, `validation_loss`; those of a set that has a name end with it,
`validation_loss/calls`, and those of a language in a set of several with both, `validation_wer/calls de`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from graft.text.wer import Score, score

from .validation import TranscribedClip


@dataclass(frozen=True)
class SetResult:
    """The loss of a set, summed over its labels, and the transcripts by which its word error rate is counted."""

    loss: float
    label_count: float
    clips: Sequence[TranscribedClip]

    @cached_property
    def scores(self) -> dict[str, Score]:
        """Word error rates by language, each after its own normaliser; "unknown" stands for clips without one."""
        languages = dict.fromkeys(clip.language for clip in self.clips)
        return {language or "unknown": _score(self.clips, language) for language in languages}


def validation_metrics(results: Mapping[str, SetResult]) -> dict[str, float]:
    """Name the metrics of sets; the name of a single set may be ""."""
    found = _metrics(results.values(), "")
    for name, result in results.items():
        found |= _metrics([result], f"/{name}") if name else {}
        if len(result.scores) > 1:
            found |= {f"validation_wer/{f'{name} {code}'.strip()}": one.wer for code, one in result.scores.items()}
    return found


def report_lines(title: str, results: Mapping[str, SetResult], shown: Iterable[TranscribedClip]) -> Iterator[str]:
    """Yield the lines that the log has of a validation: of all sets, of each set and language, and transcripts."""
    whole = _metrics(results.values(), "")
    scores = [one for result in results.values() for one in result.scores.values()]
    yield f"{title}  validation loss {whole['validation_loss']:.4f}{_wer_text(scores)}"
    for name, result in results.items():
        if name:
            loss = _metrics([result], "")["validation_loss"]
            yield f"  {name}: loss {loss:.4f}{_wer_text(list(result.scores.values()))}"
        if len(result.scores) > 1:
            yield from (f"  {f'{name} {code}'.strip()}:{_wer_text([one])}" for code, one in result.scores.items())
    for clip in shown:
        yield f"  {clip.id}: {clip.text!r} -> {clip.heard!r}"


def sample_fields(set_name: str, clip: TranscribedClip) -> dict[str, str]:
    """Make the fields of a line of transcripts.jsonl; set and language are left out where they have no name."""
    fields = {"set": set_name, "language": clip.language or "", "id": clip.id, "text": clip.text, "heard": clip.heard}
    return {key: value for key, value in fields.items() if value or key not in ("set", "language")}


def _score(clips: Iterable[TranscribedClip], language: str | None) -> Score:
    own = [clip for clip in clips if clip.language == language]
    return score([clip.text for clip in own], [clip.heard for clip in own], language=language)


def _metrics(results: Iterable[SetResult], suffix: str) -> dict[str, float]:
    """Compute loss and word error rate of some sets together, each label and word counted once."""
    results = list(results)
    label_count = sum(result.label_count for result in results)
    loss = sum(result.loss for result in results) / label_count if label_count else float("nan")
    scores = [one for result in results for one in result.scores.values()]
    return {f"validation_loss{suffix}": loss} | ({f"validation_wer{suffix}": _pooled_wer(scores)} if scores else {})


def _pooled_wer(scores: Sequence[Score]) -> float:
    errors = sum(round(one.wer * max(1, one.words)) for one in scores)
    return errors / max(1, sum(one.words for one in scores))


def _wer_text(scores: Sequence[Score]) -> str:
    """Write a word error rate, with its interval and normaliser where it is that of one language."""
    if not scores:
        return ""
    clips = sum(one.clips for one in scores)
    if len(scores) > 1:
        return f"  WER {_pooled_wer(scores):.1%} of {clips} clips"
    (one,) = scores
    return f"  WER {one.wer:.1%} [{one.wer_low:.1%}, {one.wer_high:.1%}] of {clips} clips ({one.normalizer})"
