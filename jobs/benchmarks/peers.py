"""The steps that graft's own is measured against, each written out as others write it: a batch in, its loss out.

All train a projector alone between frozen parts in bf16, as stage 1 does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration

from graft.model.configuration import WINDOW_FRAMES, GraftConfig
from graft.model.encoder import pad_with_silence
from graft.model.modeling import GraftForConditionalGeneration
from graft.processor import IGNORED_LABEL
from graft.training.backends import trained_parameters

from .batches import Inputs


class PlainStep:
    """A whole step on a model that makes batches into losses: autocast to bf16, backward, clipping, fused AdamW."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.trained = list(trained_parameters(model).values())
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.0, fused=True)

    def __call__(self, inputs: Inputs) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**inputs)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


class AllLogits(nn.Module):
    """A graft's loss by way of the logits at every position."""

    def __init__(self, graft: GraftForConditionalGeneration):
        super().__init__()
        self.graft = graft

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        return _loss_everywhere(self.graft(**inputs, use_cache=False).logits, labels)


class SeedStep(nn.Module):
    """The reference system's way to a loss, with a graft's weights: the padded window, all its tokens, logits at every position."""

    def __init__(self, graft: GraftForConditionalGeneration):
        super().__init__()
        self.graft = graft

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, input_features: Tensor) -> Tensor:
        graft = self.graft
        states = graft.audio_tower(input_features.to(graft.dtype)).last_hidden_state  # (clips, 1500, d_model)
        audio = graft.audio_projector(states).flatten(0, 1)
        embeddings = graft.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_scatter(
            (input_ids == graft.config.audio_token_id)[..., None], audio.to(embeddings.dtype)
        )
        hidden = graft.model(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return _loss_everywhere(graft.lm_head(hidden), labels)


def seed_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Pad a batch of graft's to the 30 s window."""
    features = pad_with_silence(inputs["input_features"], inputs["audio_frame_counts"], WINDOW_FRAMES)
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")} | {"input_features": features}


class FlamingoStep(nn.Module):
    """AudioFlamingo3 of a graft's size, with random weights, called as its documentation calls it."""

    def __init__(self, config: GraftConfig):
        super().__init__()
        self.flamingo = AudioFlamingo3ForConditionalGeneration(_flamingo_config(config)).bfloat16().train()
        self.flamingo.requires_grad_(False)
        self.flamingo.model.multi_modal_projector.float().requires_grad_(True)

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.flamingo(**inputs, use_cache=False).loss


def flamingo_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Pad a batch of graft's to the 30 s window that AudioFlamingo3's encoder takes, and mask it; the tokens are the same."""
    frame_counts = inputs["audio_frame_counts"]
    is_clip = torch.arange(WINDOW_FRAMES) < frame_counts[:, None]
    padded = seed_inputs(inputs)
    return padded | {"input_features": padded["input_features"].bfloat16(), "input_features_mask": is_clip.long()}


def _loss_everywhere(logits: Tensor, labels: Tensor) -> Tensor:
    # (clips, length, vocabulary), (clips, length)
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def _flamingo_config(config: GraftConfig) -> AudioFlamingo3Config:
    audio, text = config.audio_config, config.text_config
    encoder = {
        "num_mel_bins": audio.num_mel_bins,
        "hidden_size": audio.d_model,
        "num_hidden_layers": audio.encoder_layers,
        "num_attention_heads": audio.encoder_attention_heads,
        "intermediate_size": audio.encoder_ffn_dim,
    }
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    words: dict[str, Any] = {name: getattr(text, name) for name in names}
    return AudioFlamingo3Config(audio_config=encoder, text_config=words, audio_token_id=config.audio_token_id)
