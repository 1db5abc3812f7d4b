"""Check that a graft on Qwen2-VL still sees: its answers about pictures beside those of the model that it was built on.

    {"verdict", "ok", "pictures", "is_identical", "largest_difference", "equal_answers", "token_agreement"}

pictures, questions -> the base's logits and greedy answers -> the graft's own, and its choices after the base's tokens

Before stage 2 the language model is the base's, so the logits are the same bits. Afterwards the answers may differ.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from graft.checkpoints.build import VISION_MODEL_TYPE, check_kind
from graft.checkpoints.bundled.cache import bundled_qwen2vl
from graft.checkpoints.loading import DTYPES, base_checkpoint, check_model, open_graft, open_processor
from graft.checkpoints.names import absolute_checkpoint
from graft.checkpoints.quiet import no_loading_bars
from graft.errors import ModelError
from graft.model.configuration import TextGraftConfig, read_graft_config
from graft.processor import IMAGE_TOKEN, GraftProcessor
from graft.storage.locations import one_line_error
from graft.text.prompts import CHATML

from ..common.cli import user_message
from ..transcription.pipeline import Workers
from .checking import recipes_of

BUNDLED = "bundled"
SIDE = 168
"""Pixels of a picture's sides: six image tokens each in Qwen2-VL."""
SHAPES = ("circle", "square", "stripes")
COLOURS = {"red": (210, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (230, 210, 50)}
QUESTIONS = ("Describe this picture.", "What colour is the shape?", "Which shape is in this picture?")
ANSWER_TOKENS = 24
KEPT = 0.8
"""Share of the base's tokens that a graft also chooses, from which on vision counts as kept."""
WIRING = " The vision tower of the bundled pair is random, so that this proves the wiring only."


@dataclass(frozen=True)
class Answer:
    """What a model says about a picture: its logits after the prompt (vocabulary,), and its greedy answer."""

    logits: Tensor
    token_ids: Tensor


def ask_about_pictures(model: str, base: str | None, *, pictures: int, seed: int, workers: Workers) -> dict[str, Any]:
    """Check in a process of the cluster, with a worker's share of a GPU, that a model still sees.

    What fails there is told as the reason why it was not checked: it must not cost the evaluation before it.
    """
    if check_model(model) != "graft":
        return not_checked("the model is no graft")
    base = base or find_vision_base(model)
    bases = absolute_checkpoint(model), base and absolute_checkpoint(base)
    try:
        found: dict[str, Any] = run_beside(workers, check_vision, *bases, pictures=pictures, seed=seed)
    except Exception as error:
        return not_checked(f"asking about pictures failed ({type(error).__name__}: {one_line_error(error)})")
    return found


def check_vision_base(base: str) -> str:
    """Return the Qwen2-VL that a name stands for. Raises ModelError for anything else."""
    folder = str(bundled_qwen2vl()) if base == BUNDLED else base
    check_kind(folder, VISION_MODEL_TYPE, name="Qwen2-VL")
    return folder


def run_beside(workers: Workers, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Call a function in a process of the cluster, on a worker's kind of `device`, which it is told.

    Raises ModelError for what the user can mend.
    """
    import ray

    gpus = min(1.0, workers.gpus_per_transcriber)
    remote: Any = ray.remote(num_cpus=workers.reserved_cpus(1), num_gpus=gpus)
    task = remote(function).remote(*arguments, device="cuda" if gpus else "cpu", **settings)
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if message := user_message(error):
            raise ModelError(message) from error
        raise error.cause from error  # whose text is a line, where Ray's is a traceback


def check_vision(
    model: str, base: str | None, *, pictures: int, seed: int = 0, dtype: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Compare a graft's answers about generated pictures with those of its base.

    `base` is a Qwen2-VL, or `bundled`; None takes the one that the recipes in the model's folder name. Raises
    ModelError for models that cannot be opened.
    """
    config = read_graft_config(base_checkpoint(model))
    if isinstance(config, TextGraftConfig):
        return not_checked("the graft's language model takes no pictures")
    base = base or find_vision_base(model)
    if base is None:
        return not_checked("the model's folder does not say which Qwen2-VL it was built on: give vision_base")
    folder = check_vision_base(base)
    processor = open_processor(model)
    prompts = [_inputs(processor, picture, question) for picture, question in make_pictures(pictures, seed)]
    torch_dtype: Any = DTYPES[dtype] if dtype else config.dtype or torch.float32
    # A graft never writes tokens of pictures and audio, so that neither may the base.
    settings = GenerationConfig.from_pretrained(base_checkpoint(model))
    suppressed = list(settings.suppress_tokens or [])
    wanted = _ask(_open_base(folder, torch_dtype, device), prompts, suppressed)
    graft, _ = open_graft(model, dtype=torch_dtype, device=device)
    found = _ask(graft, prompts, suppressed)
    pairs = zip(prompts, wanted, strict=True)
    chosen = [_choices(graft, inputs, answer.token_ids, suppressed) for inputs, answer in pairs]
    return _compare(wanted, found, chosen, is_bundled=base == BUNDLED)


def not_checked(reason: str) -> dict[str, Any]:
    """Say why there is nothing to check."""
    return {"verdict": f"Vision was not checked: {reason}.", "ok": None, "pictures": 0}


def find_vision_base(model: str) -> str | None:
    """Return the text_base of the recipe with which a model was built; None where its folder does not lead to one."""
    from graft.checkpoints.release import known_names

    if model in known_names():
        return BUNDLED
    bases = (recipe.get("text_base") for recipe in recipes_of(model))
    return next((base for base in bases if isinstance(base, str)), None)


def make_pictures(count: int, seed: int = 0) -> list[tuple[np.ndarray, str]]:
    """Draw shapes in a colour on a noisy ground, and ask about each: uint8 (SIDE, SIDE, 3), and a question."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pictures = []
    for number in range(count):
        shape, colour = SHAPES[number % len(SHAPES)], list(COLOURS)[number % len(COLOURS)]
        x, y, half = *rng.integers(SIDE // 3, 2 * SIDE // 3, 2), rng.integers(SIDE // 8, SIDE // 4)
        covered = {
            "circle": (rows - y) ** 2 + (columns - x) ** 2 < half**2,
            "square": (abs(rows - y) < half) & (abs(columns - x) < half),
            "stripes": (rows // half) % 2 == 0,
        }[shape]
        ground = rng.integers(200, 256, (SIDE, SIDE, 3))
        picture = np.where(covered[..., None], COLOURS[colour], ground).astype(np.uint8)
        pictures.append((picture, QUESTIONS[number % len(QUESTIONS)]))
    return pictures


def _inputs(processor: GraftProcessor, picture: np.ndarray, question: str) -> Mapping[str, Tensor]:
    text = f"{CHATML.user}<|vision_start|>{IMAGE_TOKEN}<|vision_end|>{question}{CHATML.prompt_end}"
    return processor(text=text, images=[picture])


def _open_base(folder: str, dtype: torch.dtype, device: str) -> Any:
    from transformers import Qwen2VLForConditionalGeneration

    with no_loading_bars():
        model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval()


@torch.no_grad()
def _ask(model: Any, prompts: Sequence[Mapping[str, Tensor]], suppressed: Sequence[int]) -> list[Answer]:
    """Ask a model about each picture, one at a time, so that the batch changes nothing."""
    answers = []
    for inputs in prompts:
        here = {name: value.to(model.device) for name, value in inputs.items()}
        logits = model(**here).logits[0, -1].float().cpu()  # (rows, length, vocabulary) -> (vocabulary,)
        settings = {"suppress_tokens": suppressed} if suppressed else {}
        ids = model.generate(**here, max_new_tokens=ANSWER_TOKENS, do_sample=False, **settings)
        answers.append(Answer(logits, ids[0, inputs["input_ids"].shape[1] :].cpu()))
    gc.collect()
    return answers


@torch.no_grad()
def _choices(model: Any, inputs: Mapping[str, Tensor], token_ids: Tensor, suppressed: Sequence[int]) -> Tensor:
    """Return the token that a model would choose at each place of an answer, after the tokens before: (tokens,)."""
    here = {name: value.to(model.device) for name, value in inputs.items()}
    given = token_ids[None].to(model.device)
    here["input_ids"] = torch.cat([here["input_ids"], given], dim=1)
    here["attention_mask"] = torch.cat([here["attention_mask"], torch.ones_like(given)], dim=1)
    here["mm_token_type_ids"] = torch.cat([here["mm_token_type_ids"], torch.zeros_like(given)], dim=1)
    logits = model(**here).logits[0, -len(token_ids) - 1 : -1]  # (tokens, vocabulary)
    logits[:, list(suppressed)] = -torch.inf
    return logits.argmax(-1).cpu()


def _compare(
    wanted: Sequence[Answer], found: Sequence[Answer], chosen: Sequence[Tensor], *, is_bundled: bool
) -> dict[str, Any]:
    pairs = list(zip(wanted, found, strict=True))
    # The graft's vocabulary is the base's; rows of audio tokens may be added at its end.
    sizes = [min(len(one.logits), len(other.logits)) for one, other in pairs]
    is_identical = all(
        torch.equal(one.logits[:size], other.logits[:size]) for (one, other), size in zip(pairs, sizes, strict=True)
    )
    largest = max(
        float((one.logits[:size] - other.logits[:size]).abs().max())
        for (one, other), size in zip(pairs, sizes, strict=True)
    )
    equal = sum(torch.equal(one.token_ids, other.token_ids) for one, other in pairs) / len(pairs)
    tokens = torch.cat([one.token_ids for one in wanted])
    agreement = float((tokens == torch.cat(list(chosen))).float().mean())
    count = f"{len(pairs)} generated picture{'s' * (len(pairs) != 1)}"
    if is_identical and equal == 1:
        verdict = f"Vision is kept: on {count} the logits are the base's, bit for bit, and so are all answers."
    else:
        verdict = (
            f"On {count} the graft gives {equal:.0%} of the base's answers word for word, and chooses "
            f"{agreement:.0%} of their tokens."
        )
    return {
        "verdict": verdict + (WIRING if is_bundled else ""),
        "ok": None if is_bundled and not is_identical else is_identical or agreement >= KEPT,
        "pictures": len(pairs),
        "is_identical": is_identical,
        "largest_difference": largest,
        "equal_answers": equal,
        "token_agreement": agreement,
    }
