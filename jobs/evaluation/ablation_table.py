"""The variants of an ablation beside one another, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = {
    "loss": "loss_last",
    "validation loss": "validation_loss",
    "steps": "steps",
    "audio s": "audio_s",
    "seconds": "seconds",
}
"""Columns that are of each stage -> keys of its results."""


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay results out, the least WER on the first set first; `a / b` is of stage 1 and of stage 2, where there is one."""
    stages = [stage for stage in ("stage1", "stage2") if stage in results[0]]
    sets = list(_scores(results[0]["stage1"]))
    titles = [f"WER {name}, stage {stage[-1]}" for name in sets for stage in reversed(stages)]
    rows = [["variant", "change", *titles, *COUNTS, "audio tokens/s"]]
    rows += [["---"] * len(rows[0])]
    for line in sorted(results, key=lambda line: _scores(line[stages[-1]])[sets[0]]["wer"]):
        rates = [_rate(line[stage], name) for name in sets for stage in reversed(stages)]
        counts = [[line[stage][key] for stage in stages] for key in COUNTS.values()]
        numbers = [
            " / ".join("-" if n is None else f"{n:.4g}" if n < 1000 else f"{n:.0f}" for n in pair) for pair in counts
        ]
        rows += [
            [f"{line['variant']}-{line['seed']}", line["change"], *rates, *numbers, f"{line['audio_tokens_per_s']:.1f}"]
        ]
    unequal = len({tuple(line[stage]["steps"] for stage in stages) for line in results}) > 1
    note = (
        "\nNot all took equally many steps: raise token_budget or lower max_batch_clips, unless steps are compared.\n"
        if unequal
        else ""
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + note


def _scores(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    return stage["spelled"] if "spelled" in stage else stage["scores"]


def _rate(stage: Mapping[str, Any], name: str) -> str:
    rates = _scores(stage)[name]
    wer = f"{rates['wer']:.1%} [{rates['wer_low']:.1%}, {rates['wer_high']:.1%}]"
    return f"{wer}, CER {rates['cer']:.1%}, by CTC" if "spelled" in stage else wer
