"""Give a tiny graft adapters with an effect, save adapters and projectors, and compute logits to compare."""

from pathlib import Path

import torch

from graft.checkpoints.lora import LoraSettings, add_adapters, save_adapters
from graft.checkpoints.projector_file import write_projector
from graft.model.configuration import audio_token_count
from graft.model.modeling import GraftForConditionalGeneration
from tests.support import tiny_models

SETTINGS = LoraSettings(rank=4, alpha=8)


def save_projector(model: GraftForConditionalGeneration, folder: Path) -> None:
    write_projector(model.audio_projector.state_dict(), model.config, folder)


def save_tiny_adapters(model: GraftForConditionalGeneration, folder: Path) -> None:
    save_adapters(dict(model.named_parameters()), SETTINGS, folder)


def adapt(model: GraftForConditionalGeneration, settings: LoraSettings = SETTINGS) -> GraftForConditionalGeneration:
    """Add random adapters that change the logits: neither A nor B is zero."""
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    features, counts = tiny_models.log_mels([40, 90])
    config = model.config
    tokens = [audio_token_count(count, pool=config.audio_pool, context=config.audio_context) for count in (40, 90)]
    rows = [[5, 6, *[config.audio_token_id] * count, 7, 8, 9] for count in tokens]
    ids, mask = tiny_models.pad_rows(rows, left=False)
    return model(input_ids=ids, attention_mask=mask, input_features=features, audio_frame_counts=counts).logits


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())
