"""Make small grafts with attention heads of 64, which a GPU's kernels need, and batches to train them.

Clips are arrays, so that no audio file has to be decoded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.audio.clip import SAMPLE_RATE, AudioClip
from graft.checkpoints.lora import LoraSettings
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import GraftProcessor
from graft.training.backends import TorchBackend, TrainingBatch
from graft.training.loop import LoopSettings, Observer, train
from graft.training.meter import StepLog
from graft.training.progress import Progress
from graft.training.stages import ComputeSettings, Stage, make_backend, open_for_stage
from tests.support import tiny_models

WIDTH = 128
TEXTS = ("yes", "no thanks", "one two", "go on", "please hold")
LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
STAGES = {"stage1": Stage(1), "stage2": Stage(2, lora=LORA), "qlora": Stage(2, lora=LORA, nf4=True)}
STAGES["no-dropout"] = Stage(2, lora=LoraSettings(rank=4, alpha=8, dropout=0.0))
NEEDED = {"stage1": (), "stage2": ("peft",), "no-dropout": ("peft",), "qlora": ("peft", "accelerate", "bitsandbytes")}


def wide_parts(**text: Any) -> dict[str, dict[str, Any]]:
    """Return the parts of a configuration; `text` changes the language model's."""
    base = tiny_models.qwen2vl_config().to_dict()
    heads = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 8, 8]}
    audio = {"d_model": WIDTH, "encoder_ffn_dim": 2 * WIDTH}
    return {
        "text_config": base["text_config"] | heads | {"rope_parameters": rope} | text,
        "vision_config": base["vision_config"] | {"hidden_size": WIDTH},
        "audio_config": tiny_models.whisper_config().to_dict() | audio,
    }


def wide_model(
    device: torch.device, *, dtype: torch.dtype = torch.float32, **audio: Any
) -> GraftForConditionalGeneration:
    """Make a graft on a device, with the same weights at every call except for their dtype."""
    return lively(tiny_models.graft_model(**{**wide_parts(), **audio})).to(device, dtype)


def lively(model: Any) -> Any:
    """Draw weights for a graft or a Whisper with which every part has a measurable effect, and bf16 rounds little."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data = (
            torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
            if parameter.ndim > 1
            else torch.ones(parameter.shape)
        )
    return model


def save_wide_graft(folder: Path) -> Path:
    """Write a whole graft that a stage opens."""
    words = tiny_models.tokenizer()
    vocabulary = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    tiny_models.save_tiny_graft(folder, **wide_parts(**vocabulary))
    return folder


def opened(
    folder: Path, device: torch.device, name: str = "stage1", dtype: str = "fp32", **computing: Any
) -> tuple[GraftForConditionalGeneration, GraftProcessor, TorchBackend]:
    """Return a stage's model in training mode, its processor and the torch backend.

    The test is skipped where the stage's packages are missing.
    """
    for package in NEEDED[name]:
        pytest.importorskip(package)
    chosen = ComputeSettings(dtype, "torch", **computing)
    model, processor = open_for_stage(STAGES[name], str(folder), chosen, device=device)
    backend = make_backend(model, chosen, accumulation=1, weight_decay=0.01, max_grad_norm=1.0)
    assert isinstance(backend, TorchBackend)
    return model, processor, backend


def clip(seed: int) -> AudioClip:
    """Make clips of noise of 0.2 to 0.5 seconds."""
    generator = np.random.default_rng(seed)
    return AudioClip(generator.normal(0, 0.1, round((0.2 + 0.05 * (seed % 7)) * SAMPLE_RATE)).astype(np.float32))


def training_batch(
    processor: GraftProcessor, device: torch.device, seeds: Sequence[int], *, position: int = 1
) -> TrainingBatch:
    """Make a step of one batch of clips of different lengths."""
    examples = [processor.example(clip(seed), TEXTS[seed % len(TEXTS)]) for seed in seeds]
    return TrainingBatch(
        inputs={name: torch.from_numpy(value).to(device) for name, value in processor.training_batch(examples).items()},
        position=position,
        step_position=position,
        step_label_count=sum(len(one.target_ids) for one in examples),
        ids=tuple(map(str, seeds)),
        clip_count=len(examples),
        token_count=sum(len(one.prompt_ids + one.target_ids) for one in examples),
        audio_s=0.2 * len(examples),
    )


class Logs(Observer):
    """Records what a run logs."""

    def __init__(self) -> None:
        self.logs: list[StepLog] = []

    def log(self, log: StepLog) -> None:
        self.logs.append(log)


def run_steps(
    batches: Sequence[TrainingBatch], backend: TorchBackend, *, step: int = 0, total_steps: int, **settings: Any
) -> list[StepLog]:
    """Train on batches, one per step, from `step` on, and log every step."""
    observer = Logs()
    chosen = LoopSettings(**{"learning_rate": 1e-3, "log_every": 1, **settings})
    train(
        batches,
        backend,
        chosen,
        progress=Progress(step=step, position=step),
        total_steps=total_steps,
        observer=observer,
    )
    return observer.logs


def backward(batch: TrainingBatch, backend: TorchBackend) -> tuple[float, dict[str, torch.Tensor]]:
    """Compute a batch's loss and gradients, and clear the backend's."""
    torch.manual_seed(0)
    loss = backend.backward(batch.inputs, label_count=batch.step_label_count, is_last=True)
    gradients = {name: parameter.grad.clone() for name, parameter in backend.trained.items()}
    backend.optimizer.zero_grad(set_to_none=True)
    return float(loss), gradients


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of the difference relative to the norm of `other`."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm())
