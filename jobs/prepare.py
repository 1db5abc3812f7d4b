"""Turn manifests of speech into parquet files in disjoint, seeded splits.

manifest lines -> rows -> checks of text and audio, each file decoded once -> one row for each id -> splits, with longer
clips joined from their rows on request -> out/SPLIT/part-00000.parquet ..., out/dropped.jsonl, out/summary.json

Manifests are JSON, CSV, those of NeMo and lhotse, WebDataset's tar files, or tables (parquet, Hugging Face datasets);
files are in SpeechBrain's LargeScaleASR schema. Manifests and audio may lie on disks, in buckets, on the Hugging Face
hub and on web servers. Every line that a source takes ends up in a split or, with its reason, in dropped.jsonl. The
same input and seed give the same bytes, on any number of workers; the order of a manifest's lines changes no split.
"""

from functools import partial
from typing import Any

from graft.errors import require

from .common.cli import run_job
from .common.outputs import holds_results, staged_output
from .preparation.recipe import EXECUTION_KEYS, PrepareRecipe


def run(recipe: PrepareRecipe) -> None:
    """Write the splits. Raises DataError when a manifest is missing or no row remains, OutputError."""
    if holds_results(recipe.out, recipe, ignore=EXECUTION_KEYS):
        print(f"{recipe.out}: already prepared")
        return
    require("pyarrow", extra="jobs")  # before the audio is decoded, not after
    from .preparation.corpus import write_splits
    from .preparation.manifests import list_manifests

    sources = list_manifests(recipe.long_sources())
    with staged_output(recipe.out, recipe) as folder:
        summary = write_splits(recipe, folder, sources)
    _print_table(recipe.out, summary)


def _print_table(out: str, summary: dict[str, Any]) -> None:
    print(f"{'split':<16}{'rows':>8}{'hours':>10}{'speakers':>10}")
    for split, measures in summary["splits"].items():
        print(f"{split:<16}{measures['rows']:>8}{measures['hours']:>10.2f}{measures['speakers']:>10}")
    for split, measures in summary.get("joined", {}).items():
        print(f"{split + ' joined':<16}{measures['rows']:>8}{measures['hours']:>10.2f}")
    for reason, count in summary["dropped"].items():
        print(f"dropped {count:>16}  {reason}")
    print(f"in {out}; dropped rows in {out}/dropped.jsonl")


EXAMPLES = (
    "sources=my/manifest.jsonl out=runs/data",
    "sources=a.csv,b.jsonl splits.train=0.9 splits.dev=0.1 disjoint_speakers=true out=runs/data",
)
"""Arguments that --help shows."""
main = partial(run_job, PrepareRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
