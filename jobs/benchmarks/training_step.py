"""Measure stage 1's training step on one core, beside the reference system's and AudioFlamingo3's.

All take the same clips, prepared beforehand, and train a projector alone between frozen weights of the same shape: in
bf16 where the processor multiplies it, else in fp32. Each way's first step tells how many clips fit the given time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

from graft.checkpoints.loading import DTYPES, multiplies_bf16
from graft.model.configuration import WINDOW_FRAMES, GraftConfig
from graft.model.encoder import pad_with_silence
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import IGNORED_LABEL, Example
from graft.training.backends import trainable_parameters
from graft.training.plan import Plan, PlanColumns, PlanSettings
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage

from ..common.speed import about
from .measuring import Numbers, in_turns, report_table, seconds_of
from .speech import spoken_clips

Inputs = Mapping[str, Tensor]
Step = Callable[[Inputs], object]
# Clips of a batch where their number is fixed; a token budget holds so many clips of average length.
BATCH_CLIPS = 4
LEARNING_RATE = 1e-3

ABOUT_STEPS = """\
graft           25 Hz on the clip's own frames, token-budget batches, logits at label positions, nothing computed twice
seed-style      1500 tokens from the padded 30 s window, arrival order, all logits, gradient checkpointing
AudioFlamingo3  transformers' own, random weights: 25 Hz from a masked 30 s window, grouped by length, all logits"""
ABOUT_GAINS = "graft's step with one gain off at a time; x is how many times as long a clip takes without it"


class Way(NamedTuple):
    """A way to train: its step, its batches of the first clips by their number, and a batch of one average clip."""

    step: Step
    batches: Callable[[int], list[Inputs]]
    most_clips: int
    """Most clips that it takes; a few where all clips cost the same."""
    average: Inputs

    def clips(self, count: int) -> int:
        """Return how many of `count` clips it takes."""
        return min(count, self.most_clips)


def bench_step(graft: str, clips: int, repetitions: int, seconds: float) -> Numbers:
    """Measure graft's step beside AudioFlamingo3's and the reference system's, for which all clips cost the same."""
    plain = partial(plain_step, loss=all_logits_loss)
    seed: Any = {"checkpointing": True, "audio_pool": 1, "audio_context": "full"}
    ways = {
        "graft": way(graft, clips),
        "seed-style": way(graft, BATCH_CLIPS, in_arrival_order, plain, **seed),
        "AudioFlamingo3": way(graft, clips, length_grouped, flamingo_step),
    }
    return _compare(ABOUT_STEPS, ways, clips, repetitions, seconds)


def bench_gains(graft: str, clips: int, seconds: float) -> Numbers:
    """Measure graft's step with each gain switched off."""
    ways = {
        "graft": way(graft, clips),
        "50 Hz (no pooling)": way(graft, clips, audio_pool=1),
        "30 s window (750 tokens)": way(graft, BATCH_CLIPS, in_arrival_order, audio_context="full"),
        "logits at all positions": way(graft, clips, step=partial(plain_step, loss=all_logits_loss)),
        "gradient checkpointing": way(graft, clips, checkpointing=True),
        "arrival order": way(graft, clips, in_arrival_order),
    }
    return _compare(ABOUT_GAINS, ways, clips, 1, seconds)


def _compare(description: str, ways: Mapping[str, Way], clips: int, repetitions: int, limit_s: float) -> Numbers:
    """Measure ways in turns: samples a second, and how many times as long as the first way each takes for a clip.

    There are fewer turns, and then fewer clips, where they would take longer than `limit_s`.
    """
    torch.set_num_threads(1)
    for one in ways.values():  # warm up
        one.step(one.average)
    clip_s = {name: seconds_of(partial(one.step, one.average))[0] for name, one in ways.items()}

    def turn_s(count: int) -> float:
        return sum(one.clips(count) * clip_s[name] for name, one in ways.items())

    repetitions = max(1, min(repetitions, int(limit_s / turn_s(clips))))
    while clips > 1 and turn_s(clips) > limit_s:
        clips //= 2
    planned_s = repetitions * turn_s(clips)
    print(f"{clips} clips in {compute_settings().dtype}, {repetitions} times each: {about(planned_s)}", flush=True)
    works = {name: partial(_train, one.step, one.batches(one.clips(clips))) for name, one in ways.items()}
    spent = in_turns(works, repetitions)
    rows = []
    for name, one in ways.items():
        seconds = spent[name] / one.clips(clips)  # (turns, 2): wall and CPU
        ratios = seconds / spent["graft"] * ways["graft"].clips(clips)
        (wall_s, cpu_s), (ratio, cpu_ratio) = np.median([seconds, ratios], axis=1).tolist()
        rows.append((name, {"samples/s": 1 / wall_s, "CPU s/sample": cpu_s, "x wall": ratio, "x CPU": cpu_ratio}))
    return report_table(description, rows)


def _train(step: Step, batches: Sequence[Inputs]) -> None:
    for batch in batches:
        step(batch)


@cache
def compute_settings() -> ComputeSettings:
    """Return how all ways compute: in bf16 where the processor multiplies it, else in fp32."""
    return ComputeSettings(dtype="bf16" if multiplies_bf16("cpu") else "fp32", backend="torch")


def planned(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Group examples into batches as a training run does."""
    lengths = np.array([_length(example) for example in examples])
    labels = np.array([len(example.target_ids) for example in examples])
    settings = PlanSettings(token_budget=int(max(lengths.max(), BATCH_CLIPS * lengths.mean())))
    batches = Plan(PlanColumns(lengths, labels, np.zeros_like(labels)), settings).batches(position=0, step_batches=1)
    return [[examples[row] for row in batch.rows] for batch in batches]


def length_grouped(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Group examples as transformers' Trainer does with group_by_length, which sorts fifty batches at a time."""
    return in_arrival_order(sorted(examples, key=_length, reverse=True))


def in_arrival_order(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """Group examples as they come."""
    return [examples[start : start + BATCH_CLIPS] for start in range(0, len(examples), BATCH_CLIPS)]


def _length(example: Example) -> int:
    return len(example.prompt_ids + example.target_ids)


def own_step(model: GraftForConditionalGeneration) -> Step:
    """Make graft's step."""
    backend = make_backend(model, compute_settings(), accumulation=1, weight_decay=0.0, max_grad_norm=1.0)

    def step(inputs: Inputs) -> None:
        label_count = int((inputs["labels"] != IGNORED_LABEL).sum())
        backend.backward(inputs, label_count=label_count, is_last=True)
        backend.step(LEARNING_RATE)

    return step


def plain_step(model: Any, loss: Callable[..., Tensor]) -> Step:
    """Make a step as others write it: autocast where it is in bf16, backward, clipping, fused AdamW."""
    is_bf16 = compute_settings().dtype == "bf16"
    trained = list(trainable_parameters(model).values())
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(inputs: Inputs) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            value = loss(model, **inputs)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def flamingo_step(model: GraftForConditionalGeneration) -> Step:
    """Make the step of an AudioFlamingo3 of a graft's size; padding the features takes no thousandth of it."""
    own = flamingo_model(model.config)
    return plain_step(own, lambda flamingo, **inputs: flamingo(**flamingo_inputs(inputs), use_cache=False).loss)


def way(
    graft: str,
    clips: int,
    group: Callable[[Sequence[Example]], list[Sequence[Example]]] = planned,
    step: Callable[[GraftForConditionalGeneration], Step] = own_step,
    *,
    checkpointing: bool = False,
    **audio: Any,
) -> Way:
    """Prepare a way to train, by default graft's own; `audio` holds settings of GraftConfig."""
    settings = replace(compute_settings(), gradient_checkpointing=checkpointing)
    model: Any
    model, processor = open_for_stage(Stage(1), graft, settings)
    for name, value in audio.items():
        setattr(model.config, name, value)
        setattr(processor, name, value)
    examples = [processor.example(clip, text) for clip, text in spoken_clips(clips)]

    def inputs(together: Sequence[Example]) -> Inputs:
        return {name: torch.from_numpy(array) for name, array in processor.training_batch(together).items()}

    mean_length = np.mean([_length(example) for example in examples])
    average = min(examples, key=lambda example: abs(_length(example) - mean_length))
    return Way(step(model), lambda count: [*map(inputs, group(examples[:count]))], clips, inputs([average]))


def all_logits_loss(graft: GraftForConditionalGeneration, *, labels: Tensor, **inputs: Tensor) -> Tensor:
    """Return a graft's loss by way of the logits at every position."""
    logits = graft(**inputs, use_cache=False).logits  # (clips, length, vocabulary)
    return ForCausalLMLoss(logits, labels, logits.shape[-1])


def flamingo_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Pad a batch of graft's to the 30 s window that AudioFlamingo3's encoder takes, and mask it."""
    counts = inputs["audio_frame_counts"]
    is_clip = torch.arange(WINDOW_FRAMES) < counts[:, None]  # (clips, 3000)
    features = pad_with_silence(inputs["input_features"], counts, WINDOW_FRAMES).to(DTYPES[compute_settings().dtype])
    window = {"input_features": features, "input_features_mask": is_clip.long()}
    return window | {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}


def flamingo_model(config: GraftConfig) -> AudioFlamingo3ForConditionalGeneration:
    """Make an AudioFlamingo3 of a graft's size, with random weights, whose projector alone is trained."""
    audio, text = config.audio_config, config.text_config
    encoder = {
        "num_mel_bins": audio.num_mel_bins,
        "hidden_size": audio.d_model,
        "num_hidden_layers": audio.encoder_layers,
        "num_attention_heads": audio.encoder_attention_heads,
        "intermediate_size": audio.encoder_ffn_dim,
    }
    sizes = ("vocab_size", "hidden_size", "intermediate_size")
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    decoder: Any = {name: getattr(text, name) for name in sizes + counts}
    settings = AudioFlamingo3Config(audio_config=encoder, text_config=decoder, audio_token_id=config.audio_token_id)
    model: Any = AudioFlamingo3ForConditionalGeneration(settings)
    model.to(DTYPES[compute_settings().dtype]).train().requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    return model
