"""From log-mels to projected audio tokens' states: a frozen Whisper encoder run on the window or on the clip's own frames.

The layers are called one by one because the stock encoder takes 30 s windows only, and because the pooling belongs before its last
LayerNorm: states pooled so equal those of Qwen2Audio's and AudioFlamingo3's encoders.
"""

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .configuration import TAIL_FRAMES, WINDOW_FRAMES, GraftConfig, audio_token_count

ENCODER_FRAMES_PER_S = 50


def encode_audio(tower: WhisperEncoder, input_features: Tensor, frame_counts: Tensor, config: GraftConfig) -> Tensor:
    """Encode clips to the states of their own tokens, laid end to end.

    input_features (clips, mels, frames) float32 log-mels, frame_counts (clips,) the mel frames that are each clip's own.
    Returns (tokens of all clips, d_model). What stands past a clip's two tail frames is replaced by silence, whatever it was.
    """
    kept = token_counts(frame_counts, config)
    own = (frame_counts + 1) // 2
    if config.audio_context == "valid":
        context = (own + round(config.audio_margin_s * ENCODER_FRAMES_PER_S)).clamp(max=WINDOW_FRAMES // 2)
    else:
        context = torch.full_like(own, WINDOW_FRAMES // 2)
    length = int(context.max())
    # One silent frame past the end keeps the convolutions from seeing their own zero padding where the window goes on.
    features = pad_with_silence(input_features, frame_counts, min(2 * length + 2, WINDOW_FRAMES))
    hidden = _convolve(tower, features)[:, :length]  # (clips, length, d_model)
    hidden = _attend(tower, hidden, context)
    hidden = tower.layer_norm(_pool(hidden, config.audio_pool))
    is_kept = torch.arange(hidden.shape[1], device=hidden.device) < torch.tensor(kept, device=hidden.device)[:, None]
    return hidden[is_kept]


def token_counts(frame_counts: Tensor, config: GraftConfig) -> list[int]:
    """Count the audio tokens of clips of so many mel frames (clips,). Raises ValueError as audio_token_count does."""
    return [
        audio_token_count(count, pool=config.audio_pool, context=config.audio_context)
        for count in frame_counts.tolist()
    ]


def pad_with_silence(input_features: Tensor, frame_counts: Tensor, length: int) -> Tensor:
    """Lengthen or cut (clips, mels, frames) to `length` frames; past each clip's two tail frames stands silence.

    Silence is what Whisper's normalisation makes of zeros: (max(-10, 4 * max - 12) + 4) / 4, max over the clip's frames.
    """
    missing = max(0, length - input_features.shape[-1])
    features = nn.functional.pad(input_features, (0, missing))[..., :length]
    is_clip = torch.arange(length, device=features.device) < (frame_counts[:, None] + TAIL_FRAMES)  # (clips, length)
    loudest = features.masked_fill(~is_clip[:, None], float("-inf")).amax(dim=(1, 2), keepdim=True)
    silence = ((4 * loudest - 12).clamp(min=-10) + 4) / 4
    return torch.where(is_clip[:, None], features, silence)


def _convolve(tower: WhisperEncoder, features: Tensor) -> Tensor:
    # (B, mels, T) -> (B, T/2, d_model)
    hidden = nn.functional.gelu(tower.conv1(features.to(tower.conv1.weight.dtype)))
    hidden = nn.functional.gelu(tower.conv2(hidden)).transpose(1, 2)
    return hidden + tower.embed_positions.weight[: hidden.shape[1]]


def _attend(tower: WhisperEncoder, hidden: Tensor, context: Tensor) -> Tensor:
    visible = torch.arange(hidden.shape[1], device=hidden.device) < context[:, None]
    mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden, attention_mask=visible)
    for layer in tower.layers:
        hidden = layer(hidden, mask)
    return hidden


def _pool(hidden: Tensor, pool: int) -> Tensor:
    # (B, T, C) -> (B, T // pool, C)
    if pool == 1:
        return hidden
    whole = hidden.shape[1] // pool * pool
    return hidden[:, :whole].unflatten(1, (-1, pool)).mean(dim=2)
