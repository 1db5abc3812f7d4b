"""Training steps of stage 1 on one core: graft's own, the reference system's and AudioFlamingo3's; and what each of graft's gains is worth.

All hear the same clips, featurized and tokenized beforehand, and train a projector between frozen bf16 weights of the same shape.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import IGNORED_LABEL, GraftProcessor
from graft.training.stages import ComputeSettings, Stage, make_backend, stage_model

from .batches import BATCH_CLIPS, Inputs, in_order, length_grouped, made_examples, padded, planned
from .measuring import Findings, Numbers, in_turns, median_ratio, table
from .peers import AllLogits, FlamingoStep, PlainStep, SeedStep, flamingo_inputs, seed_inputs

COMPUTING = ComputeSettings(dtype="bf16", backend="torch")
ABOUT_STEPS = """\
graft           25 Hz on the clip's own frames, token-budget batches from the plan, logits at label positions, nothing computed twice
seed-style      1500 tokens a clip from the padded 30 s window, arrival order, logits at all positions, gradient checkpointing
AudioFlamingo3  transformers' own, random weights: 25 Hz from a masked 30 s window, length-grouped batches, logits at all positions"""
ABOUT_GAINS = "graft's step with one gain off at a time; x is how many times as long a clip takes without it"


@dataclass(frozen=True)
class Way:
    """A way to train: its step, and its batches of so many clips."""

    step: Callable[[Inputs], object]
    batches: Sequence[Inputs]
    clip_count: int

    def warm_up(self) -> None:
        self.step({name: tensor[:1] for name, tensor in self.batches[0].items()})

    def run(self) -> None:
        for batch in self.batches:
            self.step(batch)


def bench_step(graft: str, *, clips: int, repetitions: int) -> Findings:
    """Measure graft's step beside the reference system's and AudioFlamingo3's."""
    ways = {
        "graft": graft_way(graft, clips),
        "seed-style": seed_way(graft),
        "AudioFlamingo3": flamingo_way(graft, clips),
    }
    return _measured(ABOUT_STEPS, ways, repetitions)


def bench_gains(graft: str, *, clips: int, repetitions: int) -> Findings:
    """Measure graft's step with each gain switched off."""
    ways = {
        "graft": graft_way(graft, clips),
        "50 Hz (no pooling)": graft_way(graft, clips, audio_pool=1),
        "30 s window (750 tokens)": graft_way(graft, BATCH_CLIPS, audio_context="full"),
        "logits at all positions": graft_way(graft, clips, all_logits=True),
        "gradient checkpointing": graft_way(graft, clips, checkpointing=True),
        "arrival order": graft_way(graft, clips, bucketed=False),
    }
    return _measured(ABOUT_GAINS, ways, repetitions)


def graft_way(
    graft: str,
    clips: int,
    *,
    bucketed: bool = True,
    all_logits: bool = False,
    checkpointing: bool = False,
    **audio: Any,
) -> Way:
    """graft's own step, of which one thing can be changed; `audio` are settings of GraftConfig."""
    model, processor = _opened(graft, **audio)
    if checkpointing:
        model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    examples = made_examples(processor, clips)
    is_planned = bucketed and processor.audio_context != "full"
    batches = [batch.rows for batch in planned(examples)] if is_planned else in_order(range(clips))
    return Way(
        PlainStep(AllLogits(model)) if all_logits else _own_step(model), padded(processor, examples, batches), clips
    )


def seed_way(graft: str) -> Way:
    """The reference system's step, on clips enough for one batch: they cost the same whatever their length."""
    model, processor = _opened(graft, audio_pool=1, audio_context="full")
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = padded(processor, made_examples(processor, BATCH_CLIPS), in_order(range(BATCH_CLIPS)))
    return Way(PlainStep(SeedStep(model)), [seed_inputs(batch) for batch in batches], BATCH_CLIPS)


def flamingo_way(graft: str, clips: int) -> Way:
    """AudioFlamingo3's step on the same clips, tokenized alike, grouped by length."""
    model, processor = _opened(graft)
    examples = made_examples(processor, clips)
    batches = padded(processor, examples, length_grouped(examples))
    return Way(PlainStep(FlamingoStep(model.config)), [flamingo_inputs(batch) for batch in batches], clips)


def _opened(graft: str, **audio: Any) -> tuple[GraftForConditionalGeneration, GraftProcessor]:
    model, processor = stage_model(Stage(1), graft, COMPUTING)
    for name, value in audio.items():
        setattr(model.config, name, value)
        setattr(processor, name, value)
    return model, processor


def _own_step(model: GraftForConditionalGeneration) -> Callable[[Inputs], object]:
    backend = make_backend(model, COMPUTING, accumulation=1, weight_decay=0.0, max_grad_norm=1.0)

    def step(inputs: Inputs) -> float:
        backend.backward(inputs, label_count=int((inputs["labels"] != IGNORED_LABEL).sum()), is_last=True)
        return backend.step(1e-3)

    return step


def _measured(about: str, ways: Mapping[str, Way], repetitions: int) -> Findings:
    """Measure ways in turns: samples a second, and how many times as long as the first way each takes for a clip."""
    for way in ways.values():
        way.warm_up()
    spent = in_turns({name: way.run for name, way in ways.items()}, repetitions)
    wall_s = {name: [one.wall_s / way.clip_count for one in spent[name]] for name, way in ways.items()}
    cpu_s = {name: [one.cpu_s / way.clip_count for one in spent[name]] for name, way in ways.items()}
    own = next(iter(ways))
    numbers: Numbers = {}
    rows = []
    for name in ways:
        rate, cpu = 1 / statistics.median(wall_s[name]), statistics.median(cpu_s[name])
        ratio, cpu_ratio = median_ratio(wall_s[name], wall_s[own]), median_ratio(cpu_s[name], cpu_s[own])
        rows.append([name, f"{rate:.2f}", f"{cpu:.2f}", f"{ratio:.2f}", f"{cpu_ratio:.2f}"])
        values = {"samples_per_s": rate, "cpu_s_per_sample": cpu, "ratio": ratio, "cpu_ratio": cpu_ratio}
        numbers |= {f"{name} {key}": value for key, value in values.items()}
    header = ["", "samples/s", "CPU s/sample", "x wall", "x CPU"]
    return Findings(numbers, f"{about}\n{table(header, rows)}")
