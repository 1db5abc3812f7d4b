"""Write the trained part of a graft, without its bases, for others to build the graft from.

stage's output -> projector, adapters cut to a smaller rank, the audio tokens' embeddings -> small shards,
pretrained.json, the recipes of its training, a model card. `jobs.build pretrained=FOLDER` puts it onto its bases again.
"""

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from graft.config import Recipe
from graft.errors import ModelError

from .build import SETTINGS
from .common.cli import run_job
from .common.outputs import RECIPE_FILE, staged_output
from .evaluation.model_card import model_card
from .merge import ADAPTER_FOLDER, read_stage_output

RECIPES_FOLDER = "recipes"


class ExportRecipe(Recipe):
    """The stage to export, and the size and description of the result."""

    model: str
    """Output folder of stage 1 or stage 2."""
    out: str
    """Folder for the trained part; a folder below graft/pretrained/ becomes part of the package."""
    name: str | None = None
    """Name of the graft in its model card; null takes the name of the folder."""
    rank: int = Field(default=16, ge=1)
    """Largest rank of the adapters; adapters of a larger one are cut to their best approximation."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the tensors on disk."""
    shard_mb: float = Field(default=4.5, gt=0)
    """Largest size of a file in megabytes."""
    onto: Literal["full", "nf4"] = "full"
    """Text base that the adapters belong onto: full as it is, nf4 with the values that NF4 rounds it to, on which QLoRA
    trained them (see jobs.merge)."""
    audio_base: str | None = None
    """Name of the Whisper checkpoint, as jobs.build takes it; null takes it from the graft's own recipe."""
    text_base: str | None = None
    """Name of the Qwen2-VL checkpoint, as jobs.build takes it; null takes it from the graft's own recipe."""
    data_list: str | None = None
    """File that lists the training data and their licences for the model card, as Markdown or a JSON list of
    objects."""
    report: str | None = None
    """A report.json of jobs.evaluate, whose scores the model card quotes."""


def run(recipe: ExportRecipe) -> None:
    """Export recipe.model into recipe.out. Raises ModelError if it is no stage's output on a joined graft,
    DataError."""
    from graft.checkpoints.release import write_pretrained

    recipes = _training_recipes(recipe.model)
    pretrained, state, energy_kept = _trained_part(recipe, recipes.get("build", {}))
    name = recipe.name or Path(recipe.out).resolve().name
    card = model_card(name, pretrained, energy_kept, data_list=recipe.data_list, report=recipe.report)
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
    from graft.checkpoints.loading import base_graft, read_stage

    folder, stage = model, read_stage_output(model)
    found = {"build": _read_recipe_file(base_graft(model))}
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


def _trained_part(recipe: ExportRecipe, build: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, float]]:
    """Return the description, the tensors, and for each adapted matrix the share of its adapter's energy that is
    kept."""
    from graft.checkpoints.loading import DTYPES, base_graft, open_processor
    from graft.checkpoints.projector_file import read_projector, state_digest
    from graft.checkpoints.release import AUDIO_TOKENS, PROJECTOR, Pretrained, audio_token_rows
    from graft.model.configuration import GraftConfig

    graft = base_graft(recipe.model)
    config = GraftConfig.from_pretrained(graft)
    base_names = _base_names(recipe, build, graft, config)
    processor = open_processor(recipe.model)
    state = {f"{PROJECTOR}{name}": tensor for name, tensor in read_projector(recipe.model, config).items()}
    adapters, lora, energy_kept = _truncated_adapters(recipe)
    state |= {**adapters, AUDIO_TOKENS: audio_token_rows(graft, config)}
    state = {name: tensor.to(DTYPES[recipe.dtype]).contiguous() for name, tensor in state.items()}
    pretrained = Pretrained(
        **base_names,
        base_digests=config.base_digests or {},
        settings={**{name: getattr(config, name) for name in SETTINGS}, "seed": build.get("seed", 0)},
        trained_styles=list(processor.trained_styles),
        trained_context=processor.trained_context,
        adapters=lora,
        onto=recipe.onto,
        dtype=recipe.dtype,
        digest=state_digest(state),
    )
    return pretrained, state, energy_kept


def _truncated_adapters(recipe: ExportRecipe) -> tuple[dict[str, Any], Any, dict[str, float]]:
    """Read the stage's adapters, cut to recipe.rank; nothing where it has none."""
    from graft.checkpoints.lora import LoraSettings, has_adapters, read_adapters, truncate_adapters

    if not has_adapters(recipe.model):
        return {}, None, {}
    state, config = read_adapters(recipe.model)
    on_encoder = any(name.startswith("audio_tower.") for name in state)
    lora = LoraSettings(config.r, config.lora_alpha, config.lora_dropout, encoder=on_encoder)
    return truncate_adapters(state, lora, recipe.rank)


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
            raise ModelError(f"{graft} has no {RECIPE_FILE} of jobs.build that names its bases: give {key}=")
    if has_adapters(Path(graft, ADAPTER_FOLDER)):
        raise ModelError(
            f"{graft} holds merged adapters, so the stage belongs onto no two bases: "
            "export one that was trained on a new graft"
        )
    if not config.base_digests:
        raise ModelError(f"{graft} has no digests of its bases: build it with jobs.build and train on that")
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


if __name__ == "__main__":
    raise SystemExit(run_job(ExportRecipe, run, summary=__doc__))
