"""Made clips become the batches of training steps: as graft plans them, as a sampler groups them, or as they come."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from graft.processor import Example, GraftProcessor
from graft.training.plan import Batches, Plan, PlanColumns, PlanSettings

from .speech import labelled_clips

Inputs = Mapping[str, Tensor]
BATCH_CLIPS = 4
"""To a batch where their number is fixed; token-budget batches have as many tokens as so many clips have on average."""


def made_examples(processor: GraftProcessor, clips: int) -> list[Example]:
    return [processor.example(clip, text) for clip, text in labelled_clips(clips)]


def planned(examples: Sequence[Example], *, step_batches: int = 1) -> Batches:
    """Batch examples as a training run does, steps of so many batches."""
    lengths, labels = _lengths(examples), np.array([len(example.target_ids) for example in examples])
    settings = PlanSettings(token_budget=int(max(lengths.max(), BATCH_CLIPS * lengths.mean())))
    plan = Plan(PlanColumns(lengths, labels, np.zeros(len(lengths), int)), settings)
    return plan.delivery(position=0, step_batches=step_batches)


def length_grouped(examples: Sequence[Example]) -> list[Sequence[int]]:
    """Batch examples as transformers' Trainer does with group_by_length.

    All in one mega-batch, as the fifty batches that it sorts of a large corpus; of few clips it would sort fewer together.
    """
    order = get_length_grouped_indices(_lengths(examples).tolist(), len(examples), 1, torch.Generator().manual_seed(0))
    return in_order(order)


def in_order(order: Sequence[int]) -> list[Sequence[int]]:
    return [order[start : start + BATCH_CLIPS] for start in range(0, len(order), BATCH_CLIPS)]


def padded(processor: GraftProcessor, examples: Sequence[Example], batches: Iterable[Sequence[int]]) -> list[Inputs]:
    """Make the model's inputs of batches of examples."""
    arrays = (processor.training_batch([examples[index] for index in batch]) for batch in batches)
    return [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in arrays]


def _lengths(examples: Sequence[Example]) -> np.ndarray:
    return np.array([len(example.prompt_ids + example.target_ids) for example in examples])
