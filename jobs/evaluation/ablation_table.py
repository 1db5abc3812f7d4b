"""Lay out the variants of an ablation beside one another as a Markdown table."""

from collections.abc import Mapping, Sequence
from typing import Any

COUNTS = {
    "loss": "loss_last",
    "validation loss": "validation_loss",
    "steps": "steps",
    "audio s": "audio_s",
    "seconds": "seconds",
}
"""Columns for each stage, and the keys of its results that they show."""
UNEQUAL_STEPS = """
Not all variants took equally many steps: raise token_budget or lower max_batch_clips, unless steps are compared.
"""


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay results out by WER on the first set, the lowest first; `a / b` are stage 1 and, if it was run, stage 2."""
    stages = [stage for stage in ("stage1", "stage2") if stage in results[0]]
    sets = list(_scores(results[0]["stage1"]))
    columns = [(name, stage) for name in sets for stage in reversed(stages)]
    titles = [f"WER {name}, stage {stage[-1]}" for name, stage in columns]
    header = ["variant", "change", *titles, *COUNTS, "audio tokens/s"]
    rows = [header, ["---"] * len(header)]
    for result in sorted(results, key=lambda result: _scores(result[stages[-1]])[sets[0]]["wer"]):
        rates = [_rates_text(result[stage], name) for name, stage in columns]
        counts = [" / ".join(_number_text(result[stage][key]) for stage in stages) for key in COUNTS.values()]
        name, tokens_per_s = f"{result['variant']}-{result['seed']}", f"{result['audio_tokens_per_s']:.1f}"
        rows.append([name, result["change"], *rates, *counts, tokens_per_s])
    steps = {tuple(result[stage]["steps"] for stage in stages) for result in results}
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + (UNEQUAL_STEPS if len(steps) > 1 else "")


def _scores(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    return stage["spelled"] if "spelled" in stage else stage["scores"]


def _rates_text(stage: Mapping[str, Any], name: str) -> str:
    rates = _scores(stage)[name]
    wer = f"{rates['wer']:.1%} [{rates['wer_low']:.1%}, {rates['wer_high']:.1%}]"
    return f"{wer}, CER {rates['cer']:.1%}, by CTC" if "spelled" in stage else wer


def _number_text(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}" if number < 1000 else f"{number:.0f}"
