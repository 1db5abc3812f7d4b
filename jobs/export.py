"""Write the trained part of a graft, without its bases, for others to build the graft from.

stage's output -> projector, adapters cut to a smaller rank, the audio tokens' embeddings -> small shards, pretrained.json, recipes, card
"""

import statistics
import sys
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
from .evaluation.card import card
from .merge import ADAPTER_FOLDER

RECIPES_FOLDER = "recipes"


class ExportRecipe(Recipe):
    """What to write, and how small."""

    model: str
    """Output folder of stage 1 or stage 2."""
    out: str
    """Folder for the trained part; below graft/pretrained/ it comes with the package."""
    name: str | None = None
    """What the card calls it; by default the folder's name."""
    rank: int = Field(default=16, ge=1)
    """Of the adapters: those of a larger rank are cut to their best approximation."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the tensors on disk."""
    shard_mb: float = Field(default=4.5, gt=0)
    """Most megabytes of a file."""
    onto: Literal["full", "nf4"] = "full"
    """The text base that the adapters belong onto: as it is, or as NF4 rounds it, on which QLoRA trained them (see jobs.merge)."""
    audio_base: str | None = None
    """Name of the Whisper checkpoint, as jobs.build takes it; by default what the graft's own recipe says."""
    text_base: str | None = None
    """Name of the Qwen2-VL checkpoint; by default what the graft's own recipe says."""
    data_list: str | None = None
    """For the card: what it was trained on and under which licences, as Markdown or as a JSON list of objects."""
    report: str | None = None
    """For the card: a report.json of jobs.evaluate."""


def run(recipe: ExportRecipe) -> None:
    """Export recipe.model into recipe.out. Raises ModelError unless it is a stage's output on a joined graft, DataError."""
    from graft.checkpoints.release import write_pretrained

    runs = _runs(recipe.model)
    pretrained, state, kept = _trained_part(recipe, runs.get("build", {}))
    name = recipe.name or Path(recipe.out).resolve().name
    with staged_output(recipe.out, ExportRecipe.model_validate(_without_paths(recipe.model_dump()))) as out:
        write_pretrained(out, pretrained, state, shard_bytes=int(recipe.shard_mb * 1e6))
        (out / RECIPES_FOLDER).mkdir()
        for job, run_recipe in runs.items():
            text = yaml.safe_dump(_without_paths(run_recipe), sort_keys=False, allow_unicode=True, width=1000)
            (out / RECIPES_FOLDER / f"{job}.yaml").write_text(text)
        (out / "README.md").write_text(card(name, pretrained, kept, data_list=recipe.data_list, report=recipe.report))
    size = sum(path.stat().st_size for path in Path(recipe.out).rglob("*") if path.is_file())
    print("\n".join([*_energy_lines(kept), f"export: {recipe.model} -> {recipe.out}: {size / 1e6:.2f} MB"]), flush=True)


def _trained_part(recipe: ExportRecipe, build: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, float]]:
    """What pretrained.json says, the tensors, and the share of its energy that each adapter keeps."""
    from graft.checkpoints.loading import DTYPES, base_graft, open_processor
    from graft.checkpoints.projector_file import read_projector, state_digest
    from graft.checkpoints.release import AUDIO_TOKENS, PROJECTOR, Pretrained, audio_token_rows
    from graft.model.configuration import GraftConfig

    graft = base_graft(recipe.model)
    config = GraftConfig.from_pretrained(graft)
    processor = open_processor(recipe.model)
    state = {f"{PROJECTOR}{name}": tensor for name, tensor in read_projector(recipe.model, config).items()}
    adapters, settings, kept = _adapters(recipe)
    state |= {**adapters, AUDIO_TOKENS: audio_token_rows(graft, config)}
    state = {name: tensor.to(DTYPES[recipe.dtype]).contiguous() for name, tensor in state.items()}
    pretrained = Pretrained(
        **_bases(recipe, build, graft),
        base_digests=_digests(config, graft),
        settings={**{name: getattr(config, name) for name in SETTINGS}, "seed": build.get("seed", 0)},
        trained_styles=list(processor.trained_styles),
        trained_context=processor.trained_context,
        adapters=settings,
        onto=recipe.onto,
        dtype=recipe.dtype,
        digest=state_digest(state),
    )
    return pretrained, state, kept


def _adapters(recipe: ExportRecipe) -> tuple[dict[str, Any], Any, dict[str, float]]:
    from graft.checkpoints.lora import LoraSettings, has_adapters, read_adapters, truncate_adapters

    if not has_adapters(recipe.model):
        return {}, None, {}
    state, config = read_adapters(recipe.model)
    on_encoder = any(name.startswith("audio_tower.") for name in state)
    settings = LoraSettings(config.r, config.lora_alpha, config.lora_dropout, encoder=on_encoder)
    return truncate_adapters(state, settings, recipe.rank)


def _digests(config: Any, graft: str) -> dict[str, str]:
    from graft.checkpoints.lora import has_adapters

    if has_adapters(Path(graft, ADAPTER_FOLDER)):
        raise ModelError(
            f"{graft} holds merged adapters, so the stage belongs onto no two bases: export one that was trained on a new graft"
        )
    if not config.base_digests:
        raise ModelError(f"{graft} has no digests of its bases: build it with jobs.build and train on that")
    return config.base_digests


def _bases(recipe: ExportRecipe, build: Mapping[str, Any], graft: str) -> dict[str, str]:
    """What the two bases are called, without a path of this machine."""
    if build.get("reference"):
        raise ModelError(
            f"{graft} was imported from {build['reference']}, not joined from two bases: export a stage on a graft that was"
        )
    names = {key: getattr(recipe, key) or build.get(key) for key in ("audio_base", "text_base")}
    for key, name in names.items():
        if name is None:
            raise ModelError(f"{graft} has no {RECIPE_FILE} of jobs.build that names its bases: give {key}=")
    return _without_paths(names)


def _runs(model: str) -> dict[str, dict[str, Any]]:
    """The recipes that led to a stage's output, as far as they are found: build, stage1, stage2, and stage2-before where one trained on.

    Raises ModelError for another folder.
    """
    from graft.checkpoints.loading import base_graft, read_stage

    folder, stage = model, read_stage(model)
    if stage is None:
        raise ModelError(
            f"{model} is no stage's output (it has no stage.json): give the out folder of jobs.stage1 or jobs.stage2"
        )
    found = {"build": _recipe_in(base_graft(model))}
    while stage:
        name = f"stage{stage['stage']}"
        while name in found:
            name += "-before"
        found[name] = _recipe_in(folder)
        folder = found[name].get("adapters") or found[name].get("projector") or ""
        stage = read_stage(folder) if folder else None
    return {job: found[job] for job in sorted(found) if found[job]}


def _recipe_in(folder: str) -> dict[str, Any]:
    path = Path(folder, RECIPE_FILE)
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def _without_paths(value: Any) -> Any:
    """The same values with each absolute path reduced to its last component: no machine's folders travel."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", "file:")) else value


def _energy_lines(kept: Mapping[str, float]) -> Iterator[str]:
    """How much of what the adapters change is left: of all, and of each kind of matrix."""
    if kept:
        least = min(kept, key=lambda matrix: kept[matrix])
        where = least[least.index("layers.") :]
        yield f"energy kept: {statistics.mean(kept.values()):.1%} on average, {kept[least]:.1%} at least ({where})"
    for kind in sorted({matrix.rpartition(".")[2] for matrix in kept}):
        shares = [share for matrix, share in kept.items() if matrix.endswith(f".{kind}")]
        yield f"  {kind:<9} {statistics.mean(shares):6.1%} on average, {min(shares):6.1%} at least"


def main(recipe: ExportRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(ExportRecipe, main, summary=__doc__))
