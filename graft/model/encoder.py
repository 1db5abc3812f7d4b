"""Encode log-mels with a frozen Whisper encoder, on the 30 s window or on a clip's own frames only.

WhisperEncoder.forward takes 30 s windows only, and pooling belongs before its final LayerNorm, as in Qwen2Audio's and
AudioFlamingo3's encoders. Therefore this module calls the encoder's layers one by one.
"""

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .configuration import TAIL_FRAMES, WINDOW_FRAMES, AnyGraftConfig, audio_token_count

ENCODER_FRAMES_PER_S = 50


def encode_audio(tower: WhisperEncoder, input_features: Tensor, frame_counts: Tensor, config: AnyGraftConfig) -> Tensor:
    """Encode clips to the states that the projector takes.

    Args:
        tower: the encoder, whose weights may have any dtype.
        input_features: log-mels (clips, mels, frames), float32. Frames after a clip's own and its tail are replaced by
            silence.
        frame_counts: number of mel frames of each clip (clips,).
        config: pooling and context.

    Returns the states (states of all clips, d_model), one clip after the other: one for each audio token, or for the
    projector `conv` audio_pool of them. Raises ValueError as audio_token_count does.
    """
    own_counts = torch.tensor(projected_counts(frame_counts, config), device=input_features.device)  # (clips,)
    state_counts = (frame_counts + 1) // 2  # (clips,): the second convolution has stride 2
    if config.audio_context == "valid":
        margin = round(config.audio_margin_s * ENCODER_FRAMES_PER_S)
        context_lengths = (state_counts + margin).clamp(max=WINDOW_FRAMES // 2)
    else:
        context_lengths = torch.full_like(state_counts, WINDOW_FRAMES // 2)
    length = int(context_lengths.max())

    # One frame of silence more than is encoded keeps the convolutions' zero padding away from the last states.
    features = pad_with_silence(input_features, frame_counts, min(2 * length + 2, WINDOW_FRAMES))
    features = features.to(tower.conv1.weight.dtype)
    hidden_states = nn.functional.gelu(tower.conv1(features))  # (clips, mels, frames) -> (clips, d_model, frames)
    hidden_states = nn.functional.gelu(tower.conv2(hidden_states))  # -> (clips, d_model, frames / 2)
    hidden_states = hidden_states.transpose(1, 2)[:, :length]  # -> (clips, length, d_model)
    hidden_states = hidden_states + tower.embed_positions.weight[:length]

    # (clips, length): each clip attends to its own context, not to the padding of the batch.
    is_context = torch.arange(length, device=hidden_states.device) < context_lengths[:, None]
    mask = create_bidirectional_mask(config=tower.config, inputs_embeds=hidden_states, attention_mask=is_context)
    for layer in tower.layers:
        hidden_states = layer(hidden_states, mask)

    pool = config.averaged_states
    grouped = hidden_states[:, : length // pool * pool].unflatten(1, (-1, pool))  # -> (clips, T // pool, pool, d_model)
    hidden_states = tower.layer_norm(grouped.mean(dim=2))  # -> (clips, length // pool, d_model)

    is_own = torch.arange(hidden_states.shape[1], device=hidden_states.device) < own_counts[:, None]
    return hidden_states[is_own]  # (clips, length // pool, d_model) -> (states of all clips, d_model)


def token_counts(frame_counts: Tensor, config: AnyGraftConfig) -> list[int]:
    """Count the audio tokens of clips with so many mel frames (clips,). Raises ValueError as audio_token_count does."""
    return [
        audio_token_count(count, pool=config.audio_pool, context=config.audio_context)
        for count in frame_counts.tolist()
    ]


def projected_counts(frame_counts: Tensor, config: AnyGraftConfig) -> list[int]:
    """Count the states that the projector takes of clips with so many mel frames (clips,), as token_counts."""
    return [config.audio_pool // config.averaged_states * count for count in token_counts(frame_counts, config)]


def pad_with_silence(input_features: Tensor, frame_counts: Tensor, length: int) -> Tensor:
    """Pad or cut log-mels (clips, mels, frames) to (clips, mels, length).

    Everything after a clip's own frames and its tail becomes silence,
    the value to which Whisper normalises digital silence: (max(-10, 4 * max - 12) + 4) / 4, with max over
    the clip's frames.
    """
    missing = max(0, length - input_features.shape[-1])
    features = nn.functional.pad(input_features, (0, missing))[..., :length]
    is_clip = torch.arange(length, device=features.device) < (frame_counts[:, None] + TAIL_FRAMES)  # (clips, length)
    is_clip = is_clip[:, None]  # (clips, 1, length), the same for every mel
    loudest = features.masked_fill(~is_clip, float("-inf")).amax(dim=(1, 2), keepdim=True)  # (clips, 1, 1)
    silence = ((4 * loudest - 12).clamp(min=-10) + 4) / 4
    return torch.where(is_clip, features, silence)
