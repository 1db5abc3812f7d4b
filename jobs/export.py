"""Write the trained part of a graft, without its bases, for others to build the graft from.

stage's output -> projector, adapters (on request cut to a smaller rank), the audio tokens' embeddings -> small shards,
pretrained.json, the recipes of its training, a model card. `graft build pretrained=FOLDER` puts it on its bases again.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from graft.config import Recipe
from graft.errors import DataError, ModelError
from graft.keys import Location, ModelKey, OutputKey, StageFolder

from .build import SETTINGS
from .common.cli import run_job
from .common.outputs import RECIPE_FILE, staged_output
from .merge import ADAPTER_FOLDER, read_stage_output

if TYPE_CHECKING:
    from graft.checkpoints.release import Pretrained

RECIPES_FOLDER = "recipes"
HEAD = """# {name}

The trained part of a graft: the projector between a Whisper encoder and a language model{adapters}.
It holds none of the weights of its bases. This command puts it onto them, whose tensors must have the digests in
pretrained.json (audio_base={audio_base}, text_base={text_base}):

    graft build pretrained={name} out=FOLDER

pretrained= also takes this folder. recipes/ holds the recipes of its training, without the folders of the data."""


class ExportRecipe(Recipe):
    """The stage to export, and the size and description of the result."""

    model: ModelKey[StageFolder]
    """Output folder of stage 1 or stage 2."""
    out: OutputKey[str]
    """Folder for the trained part; a folder below graft/pretrained/ becomes part of the package."""
    name: OutputKey[str | None] = None
    """Name of the graft in its model card; null takes the name of the folder."""
    rank: OutputKey[int | None] = Field(default=None, ge=1)
    """Largest rank of the adapters; adapters of a larger one are cut to their best approximation. null keeps the rank
    that was trained."""
    dtype: OutputKey[Literal["bf16", "fp32"]] = "bf16"
    """Precision of the tensors on disk."""
    shard_mb: OutputKey[float] = Field(default=4.5, gt=0)
    """Largest size of a file in megabytes."""
    onto: ModelKey[Literal["full", "nf4"]] = "full"
    """Text base that the adapters belong onto: full as it is, nf4 with the values that NF4 rounds it to, on which QLoRA
    trained them (see graft merge)."""
    audio_base: ModelKey[str | None] = None
    """Name of the Whisper checkpoint, as graft build takes it; null takes it from the graft's own recipe."""
    text_base: ModelKey[str | None] = None
    """Name of the language model's checkpoint, as graft build takes it; null takes it from the graft's own recipe."""
    data_list: OutputKey[Location | None] = None
    """File that lists the training data and their licences for the model card, as Markdown or a JSON list of
    objects."""
    report: OutputKey[Location | None] = None
    """A report.json of graft evaluate, whose scores the model card quotes."""


def run(recipe: ExportRecipe) -> None:
    """Export recipe.model into recipe.out. Raises ModelError if it is no stage's output on a joined graft,
    DataError."""
    from graft.checkpoints.release import write_pretrained

    recipes = _training_recipes(recipe.model)
    pretrained, state, energy_kept = _trained_part(recipe, recipes.get("build", {}))
    name = recipe.name or Path(recipe.out).resolve().name
    card = _model_card(name, pretrained, energy_kept, data_list=recipe.data_list, report=recipe.report)
    with staged_output(recipe.out, ExportRecipe.model_validate(_without_paths(recipe.model_dump()))) as out:
        write_pretrained(out, pretrained, state, shard_bytes=int(recipe.shard_mb * 1e6))
        (out / RECIPES_FOLDER).mkdir()
        for job, values in recipes.items():
            text = yaml.safe_dump(_without_paths(values), sort_keys=False, allow_unicode=True, width=1000)
            (out / RECIPES_FOLDER / f"{job}.yaml").write_text(text)
        (out / "README.md").write_text(card)
    size = sum(path.stat().st_size for path in Path(recipe.out).rglob("*") if path.is_file())
    summary = f"export: {recipe.model} -> {recipe.out}: {size / 1e6:.2f} MB"
    print("\n".join([*_energy_lines(energy_kept), summary]), flush=True)


def _training_recipes(model: str) -> dict[str, dict[str, Any]]:
    """Find the recipes that led to a stage's output: build, stage1, stage2, and stage2-before for one trained further.

    Recipes whose folders are gone are left out. Raises ModelError for a folder that is no stage's output.
    """
    from graft.checkpoints.loading import base_checkpoint, read_stage

    folder, stage = model, read_stage_output(model)
    found = {"build": _read_recipe_file(base_checkpoint(model))}
    while stage:
        name = f"stage{stage['stage']}"
        while name in found:
            name += "-before"
        found[name] = _read_recipe_file(folder)
        folder = found[name].get("adapters") or found[name].get("projector") or ""
        stage = (read_stage(folder) or {}) if folder else {}
    return {job: found[job] for job in sorted(found) if found[job]}


def _read_recipe_file(folder: str) -> dict[str, Any]:
    path = Path(folder, RECIPE_FILE)
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _trained_part(
    recipe: ExportRecipe, build: Mapping[str, Any]
) -> "tuple[Pretrained, dict[str, Any], dict[str, float]]":
    """Return the description, the tensors, and for each adapted matrix the share of its adapter's energy that is
    kept."""
    from graft.checkpoints.loading import DTYPES, base_checkpoint, open_processor
    from graft.checkpoints.lora import LoraSettings, has_adapters, read_adapters, truncate_adapters
    from graft.checkpoints.projector_file import read_projector, state_digest
    from graft.checkpoints.release import AUDIO_TOKENS, PROJECTOR, Pretrained, audio_token_rows
    from graft.model.configuration import read_graft_config

    graft = base_checkpoint(recipe.model)
    config = read_graft_config(graft)
    base_names = _base_names(recipe, build, graft, config)
    processor = open_processor(recipe.model)
    state = {f"{PROJECTOR}{name}": tensor for name, tensor in read_projector(recipe.model, config).items()}
    lora, energy_kept = None, dict[str, float]()
    if has_adapters(recipe.model):
        whole, peft_config = read_adapters(recipe.model)
        on_encoder = any(name.startswith("audio_tower.") for name in whole)
        lora = LoraSettings(peft_config.r, peft_config.lora_alpha, peft_config.lora_dropout, encoder=on_encoder)
        adapters, lora, energy_kept = truncate_adapters(whole, lora, recipe.rank or lora.rank)
        state |= adapters
    state[AUDIO_TOKENS] = audio_token_rows(graft, config)
    state = {name: tensor.to(DTYPES[recipe.dtype]).contiguous() for name, tensor in state.items()}
    pretrained = Pretrained(
        **base_names,
        base_digests=config.base_digests or {},
        settings={**{name: getattr(config, name) for name in SETTINGS}, "seed": build.get("seed", 0)},
        trained_styles=list(processor.trained_styles),
        trained_context=processor.trained_context,
        trained_languages=list(processor.trained_languages),
        tokens_per_s=processor.tokens_per_s,
        adapters=lora,
        onto=recipe.onto,
        dtype=recipe.dtype,
        digest=state_digest(state),
    )
    return pretrained, state, energy_kept


def _base_names(recipe: ExportRecipe, build: Mapping[str, Any], graft: str, config: Any) -> dict[str, str]:
    """Name the two bases, without paths of this machine. Raises ModelError if the graft was not joined from two
    bases."""
    from graft.checkpoints.lora import has_adapters

    if build.get("reference"):
        raise ModelError(
            f"{graft} was imported from {build['reference']}, not joined from two bases: "
            "export a stage on a graft that was"
        )
    names = {key: getattr(recipe, key) or build.get(key) for key in ("audio_base", "text_base")}
    for key, name in names.items():
        if name is None:
            raise ModelError(f"{graft} has no {RECIPE_FILE} of `graft build` that names its bases: give {key}=")
    if has_adapters(Path(graft, ADAPTER_FOLDER)):
        raise ModelError(
            f"{graft} holds merged adapters, so the stage belongs onto no two bases: "
            "export one that was trained on a new graft"
        )
    if not config.base_digests:
        raise ModelError(f"{graft} has no digests of its bases: build it with `graft build` and train on that")
    return _without_paths(names)


def _without_paths(value: Any) -> Any:
    """Reduce each absolute path inside a value to its last component, so that no machine's folders are published."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "file:")) else value


def _energy_lines(energy_kept: Mapping[str, float]) -> Iterator[str]:
    """Report the share of the adapters' energy (squared singular values) that is kept: of all, and by kind of
    matrix."""
    if energy_kept:
        least = min(energy_kept, key=lambda matrix: energy_kept[matrix])
        where = least[least.index("layers.") :]
        mean = statistics.mean(energy_kept.values())
        yield f"energy kept: {mean:.1%} on average, {energy_kept[least]:.1%} at least ({where})"
    for kind in sorted({matrix.rpartition(".")[2] for matrix in energy_kept}):
        shares = [share for matrix, share in energy_kept.items() if matrix.endswith(f".{kind}")]
        yield f"  {kind:<9} {statistics.mean(shares):6.1%} on average, {min(shares):6.1%} at least"


def _model_card(
    name: str,
    pretrained: "Pretrained",
    energy_kept: Mapping[str, float],
    *,
    data_list: str | None,
    report: str | None,
) -> str:
    """Write the model card as Markdown: what the graft is, its settings, training data and scores.

    Raises DataError when the data list or the report cannot be read.
    """
    settings = {
        **pretrained.settings,
        "instructions for a text style": ", ".join(pretrained.trained_styles) or "not trained",
        "instructions that name a language": ", ".join(pretrained.trained_languages) or "not trained",
        "lists of words": "trained" if pretrained.trained_context else "not trained",
    }
    adapters = ""
    if pretrained.adapters:
        adapters = f", and LoRA adapters of rank {pretrained.adapters.rank}"
        base = "as NF4 rounds it" if pretrained.onto == "nf4" else "as it is"
        mean, least = statistics.mean(energy_kept.values()), min(energy_kept.values())
        settings["adapters"] = f"rank {pretrained.adapters.rank}, for the text base {base}"
        settings["energy of the adapters kept"] = f"{mean:.1%} on average, {least:.1%} at least"
    settings["precision of the tensors"] = pretrained.dtype
    bases = {"audio_base": pretrained.audio_base, "text_base": pretrained.text_base}
    sections = [
        HEAD.format(name=name, adapters=adapters, **bases),
        "## Settings",
        _markdown_table([{"setting": key, "value": value} for key, value in settings.items()]),
        "## Training data",
        _training_data(data_list) if data_list else "Not listed.",
        "## Evaluation",
        _evaluation(report) if report else "Not scored.",
    ]
    return "\n\n".join(sections) + "\n"


def _training_data(path: str) -> str:
    """Quote a Markdown file, or lay out a JSON list of objects as a table."""
    text = _read_text(path)
    if Path(path).suffix != ".json":
        return text.strip()
    try:
        return _markdown_table(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"data_list {path} holds no list of objects ({error!r}): give one for each source of data, or Markdown"
        ) from error


def _evaluation(path: str) -> str:
    """Quote the table of a report of graft evaluate as a code block."""
    from .evaluation.score_table import report_table

    try:
        lines = report_table(json.loads(_read_text(path))).splitlines()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"report {path} is no report.json of `graft evaluate` ({error!r}): give one") from error
    return "\n".join(f"    {line}".rstrip() for line in lines)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}): give a text file") from error


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay objects out as a Markdown table; the first one names the columns."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in cells)


EXAMPLES = (
    "model=runs/stage2 out=my-graft",
    "model=runs/stage2 rank=32 report=runs/evaluation/report.json out=my-graft",
)
"""Arguments that --help shows."""
main = partial(run_job, ExportRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
