"""GraftForConditionalGeneration: Qwen2-VL that also hears. Audio embeddings replace the placeholders' embeddings; all else is Qwen2-VL."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLCausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from .configuration import GraftConfig
from .encoder import encode_audio
from .projector import AudioProjector


class GraftForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with a Whisper encoder (`audio_tower`) and the trained join (`audio_projector`).

    Besides Qwen2-VL's inputs, forward takes input_features (clips, mels, frames) float32 and audio_frame_counts (clips,), the clips in the
    order of their placeholders; or, in place of the features, audio_states (tokens of all clips, d_model), what the encoder made of them.
    With `labels` it returns the loss alone: the sum of the cross-entropy over the labels that are not -100, divided by `label_count` (by
    default their number), computed from logits at those positions only.
    """

    config: GraftConfig
    config_class = GraftConfig
    _no_split_modules = [  # noqa: RUF012 (transformers' own form)
        *Qwen2VLForConditionalGeneration._no_split_modules,
        WhisperEncoderLayer.__name__,
    ]

    def __init__(self, config: GraftConfig):
        super().__init__(config)
        self.audio_tower = WhisperEncoder._from_config(config.audio_config)
        self.audio_projector = AudioProjector(
            config.audio_projector, audio_width=config.audio_config.d_model, text_width=self.lm_head.in_features
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a graft. Raises ValueError for a checkpoint that lacks graft's tensors instead of initialising them at random."""
        wants_info = kwargs.pop("output_loading_info", False)
        config = kwargs.get("config")
        if config is None:
            found, _ = GraftConfig.get_config_dict(pretrained_model_name_or_path)
            if found.get("model_type") != GraftConfig.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a {found.get('model_type')} checkpoint, not a graft: "
                    "build one from it with python -m jobs.build"
                )
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of a graft, {missing[0]} first: build it again"
            )
        return (model, info) if wants_info else model

    def get_audio_features(self, input_features: Tensor, audio_frame_counts: Tensor) -> Tensor:
        """Encode and project clips to (tokens of all clips, hidden_size)."""
        return self.project(encode_audio(self.audio_tower, input_features, audio_frame_counts, self.config))

    def project(self, audio_states: Tensor) -> Tensor:
        """Project the encoder's states (tokens, d_model) to (tokens, hidden_size)."""
        return self.audio_projector(audio_states.to(next(self.audio_projector.parameters()).dtype))

    def embed(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        audio_frame_counts: Tensor | None = None,
        audio_states: Tensor | None = None,
    ) -> Tensor:
        """Embed ids (rows, length) and put the clips' audio where their placeholders stand.

        Raises ValueError when placeholders and audio tokens differ in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        is_audio = input_ids == self.config.audio_token_id
        placeholder_count = int(is_audio.sum())
        if audio_states is not None:
            audio = self.project(audio_states)
        elif input_features is not None and audio_frame_counts is not None:
            audio = self.get_audio_features(input_features, audio_frame_counts)
        elif placeholder_count:
            raise ValueError(
                f"{placeholder_count} audio placeholders in input_ids, but no input_features with audio_frame_counts"
            )
        else:
            return embeddings
        if placeholder_count != audio.shape[0]:
            raise ValueError(
                f"{placeholder_count} audio placeholders in input_ids, but {audio.shape[0]} audio tokens in input_features"
            )
        return embeddings.masked_scatter(is_audio[..., None], audio.to(embeddings.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        input_features: Tensor | None = None,
        audio_frame_counts: Tensor | None = None,
        audio_states: Tensor | None = None,
        label_count: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids, input_features, audio_frame_counts, audio_states)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
            "mm_token_type_ids": mm_token_type_ids,
        }
        if labels is None:
            return super().forward(logits_to_keep=logits_to_keep, **inputs, **kwargs)
        hidden = self.model(**{**inputs, "use_cache": False}, **kwargs).last_hidden_state
        loss: Any = self._loss(hidden, labels, label_count)
        return Qwen2VLCausalLMOutputWithPast(loss=loss)

    def _loss(self, hidden: Tensor, labels: Tensor, label_count: int | Tensor | None) -> Tensor:
        targets = labels[:, 1:]
        is_label = targets != -100
        logits = self.lm_head(hidden[:, :-1][is_label]).float()  # (labels, vocabulary)
        total = nn.functional.cross_entropy(logits, targets[is_label], reduction="sum")
        return total / (label_count if label_count is not None else is_label.sum().clamp(min=1))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AudioProjector):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.zeros_(parameter)


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(GraftConfig, GraftForConditionalGeneration)
