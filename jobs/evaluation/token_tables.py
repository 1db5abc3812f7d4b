"""Compare a graft token by token with its references: what it would write next when it is told the reference so far.

    [{"set", "id", "reference", "hypothesis", "forced": [{"token", "p", "choice", "choice_p"}, ...],
      "free": [{"token", "p"}, ...]}]

`forced` are the reference's tokens with their probabilities, each after all the tokens before it (teacher forcing), and
what the model would have chosen. `free` are the tokens that it writes by itself, greedily.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graft.audio.clip import AudioClip, read_audio
from graft.checkpoints.loading import check_model, open_graft
from graft.checkpoints.names import absolute_checkpoint
from graft.data.dataset import RowReader
from graft.processor import GraftProcessor
from graft.storage.locations import one_line_error
from graft.text.wer import score

from ..transcription.pipeline import Workers
from .predictions import Prediction
from .test_sets import Item
from .vision_check import run_beside

MOST_S = 30.0
"""Longest clip in seconds: a prompt holds one window of the encoder."""


def ask_for_tokens(
    model: str, predictions: Sequence[Prediction], items: Sequence[Item], *, system: str, count: int, workers: Workers
) -> list[dict[str, Any]]:
    """Make the tables of a graft's `count` worst clips, in a process of the cluster; `system` is its name there.

    `items` are the clips whose audio is known. Where that fails, a line says so, and there are none: it must not cost
    the evaluation before it.
    """
    chosen = worst_clips(predictions, items, system=system, count=count)
    if check_model(model) != "graft" or not chosen:
        return []
    reader = RowReader(list(dict.fromkeys(item.clip[0] for _, item in chosen)))
    clips = [(_read(reader, item), item.text) for _, item in chosen]
    try:
        tables = run_beside(workers, token_tables, absolute_checkpoint(model), clips)
    except Exception as error:
        print(f"evaluate: there are no tables of tokens ({type(error).__name__}: {one_line_error(error)})", flush=True)
        return []
    return [
        {"set": one.set_name, "id": one.id, "reference": one.reference, "hypothesis": one.hypothesis} | table
        for (one, _), table in zip(chosen, tables, strict=True)
    ]


def worst_clips(
    predictions: Sequence[Prediction], items: Sequence[Item], *, system: str, count: int
) -> list[tuple[Prediction, Item]]:
    """Choose the answered clips of at most MOST_S with the most wrong words, each with its item."""
    places = {(item.set_name, item.id): item for item in items if item.duration_s <= MOST_S}
    own = [one for one in predictions if one.system == system and one.hypothesis is not None and one.reference]
    found = [(one, item) for one in own if (item := places.get((str(one.set_name), one.id)))]
    wrong = [_wrong_words(one) for one, _ in found]
    order = sorted(range(len(found)), key=lambda place: (-wrong[place], place))
    return [found[place] for place in order[:count]]


def _wrong_words(one: Prediction) -> float:
    measured = score([one.reference or ""], [one.hypothesis or ""])
    return measured.wer * measured.words


def _read(reader: RowReader, item: Item) -> AudioClip:
    file, group, row = item.clip
    wav, path = reader.wav(reader.files.index(file), group, row)
    return read_audio(wav, name=path or item.id)


@torch.no_grad()
def token_tables(
    model: str, clips: Sequence[tuple[AudioClip, str]], *, device: str = "cpu"
) -> list[dict[str, list[dict[str, Any]]]]:
    """Return `forced` and `free` of clips of at most MOST_S seconds, given with their references.

    Raises ModelError for a model that is no graft.
    """
    graft, processor = open_graft(model, device=device)
    return [
        {"forced": forced_tokens(graft, processor, clip, text), "free": free_tokens(graft, processor, clip)}
        for clip, text in clips
    ]


def forced_tokens(graft: Any, processor: GraftProcessor, clip: AudioClip, text: str) -> list[dict[str, Any]]:
    """Read the reference's tokens, each after those before it, with what the model would have chosen there."""
    batch = processor.training_batch([processor.example(clip, text)])
    inputs = {name: torch.from_numpy(value).to(graft.device) for name, value in batch.items() if name != "labels"}
    labels = torch.from_numpy(batch["labels"])[0, 1:]  # position t predicts token t + 1
    logits = graft(**inputs).logits[0, :-1].float().cpu()  # (length - 1, vocabulary)
    is_answer = labels >= 0
    probabilities, targets = logits[is_answer].softmax(-1), labels[is_answer]
    best = probabilities.max(-1)
    return [
        {
            "token": processor.tokenizer.decode([int(target)]),
            "p": float(row[target]),
            "choice": processor.tokenizer.decode([int(choice)]),
            "choice_p": float(p),
        }
        for row, target, choice, p in zip(probabilities, targets, best.indices, best.values, strict=True)
    ]


def free_tokens(graft: Any, processor: GraftProcessor, clip: AudioClip) -> list[dict[str, Any]]:
    """Let the model write by itself, and return its tokens, the one that ends the answer included."""
    inputs = processor(audio=clip).to(graft.device)
    most = processor.max_new_tokens(clip.duration_s, processor.instruction())
    written = graft.generate(
        **inputs, max_new_tokens=most, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    ids: Tensor = written.sequences[0, inputs["input_ids"].shape[1] :]
    return [
        {"token": processor.tokenizer.decode([int(token)]), "p": float(scores[0].float().softmax(-1)[token])}
        for token, scores in zip(ids.cpu(), (one.cpu() for one in written.scores), strict=True)
    ]
