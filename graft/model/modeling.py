"""Grafts: Qwen2-VL, or a decoder for text alone, whose audio placeholders are replaced by projected Whisper states."""

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLCausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder, WhisperEncoderLayer

from .configuration import GRAFT_MODEL_TYPES, AnyGraftConfig, GraftConfig, TextGraftConfig
from .encoder import encode_audio, token_counts
from .projector import AudioProjector


class AudioInput(PreTrainedModel):
    """The hearing part of a graft: a Whisper encoder (`audio_tower`) and a projector of its states (`audio_projector`).

    A subclass has a language model (`model.language_model`) and its head (`lm_head`).
    """

    config: Any
    config_class: Any
    model: Any
    lm_head: Any

    def add_audio(self) -> None:
        """Make the audio parts, once the language model is made."""
        self.audio_tower = WhisperEncoder._from_config(self.config.audio_config)
        self.audio_projector = AudioProjector.from_config(self.config, text_width=self.lm_head.in_features)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a graft.

        Raises ValueError for a checkpoint of another class, and for one that lacks tensors, which transformers would
        initialise at random.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("config") is None:
            found, _ = cls.config_class.get_config_dict(pretrained_model_name_or_path)
            kind = found.get("model_type")
            if kind not in GRAFT_MODEL_TYPES:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a {kind} checkpoint, not a graft: "
                    "build one from it with `graft build`"
                )
            if kind != cls.config_class.model_type:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is a {kind} checkpoint, which {cls.__name__} does not load: "
                    "load it with AutoModelForCausalLM"
                )
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} tensors of a graft, {missing[0]} first: "
                "build it again"
            )
        return (model, info) if wants_info else model

    def get_audio_features(self, input_features: Tensor, audio_frame_counts: Tensor) -> Tensor:
        """Encode and project clips.

        input_features are log-mels (clips, mels, frames), audio_frame_counts each clip's own mel frames (clips,).
        Returns audio embeddings (audio tokens of all clips, hidden_size).
        """
        audio_states = encode_audio(self.audio_tower, input_features, audio_frame_counts, self.config)
        return self.audio_projector(audio_states, token_counts(audio_frame_counts, self.config))

    def embed(
        self,
        input_ids: Tensor,
        input_features: Tensor | None = None,
        audio_frame_counts: Tensor | None = None,
        audio_states: Tensor | None = None,
    ) -> Tensor:
        """Embed input_ids (rows, length) and replace the audio placeholders' embeddings by audio embeddings, in order.

        The audio is given as for `forward`. Returns (rows, length, hidden_size). Raises ValueError when the numbers of
        placeholders and of audio tokens differ.
        """
        inputs_embeds = self.get_input_embeddings()(input_ids)  # (rows, length) -> (rows, length, hidden_size)
        is_audio = input_ids == self.config.audio_token_id  # (rows, length)
        placeholder_count = int(is_audio.sum())
        if audio_states is not None and audio_frame_counts is not None:
            audio_embeds = self.audio_projector(audio_states, token_counts(audio_frame_counts, self.config))
        elif input_features is not None and audio_frame_counts is not None:
            audio_embeds = self.get_audio_features(input_features, audio_frame_counts)  # (audio tokens, hidden_size)
        elif placeholder_count:
            raise ValueError(
                f"{placeholder_count} audio placeholders in input_ids, but no audio with audio_frame_counts"
            )
        else:
            return inputs_embeds
        if placeholder_count != len(audio_embeds):
            raise ValueError(
                f"{placeholder_count} audio placeholders in input_ids, "
                f"but {len(audio_embeds)} audio tokens in input_features"
            )
        # (rows, length) -> (rows, length, 1): the mask is broadcast over hidden_size.
        return inputs_embeds.masked_scatter(is_audio.unsqueeze(-1), audio_embeds.to(inputs_embeds.dtype))

    def _label_loss(self, hidden_states: Tensor, labels: Tensor, label_count: int | Tensor | None) -> Tensor:
        targets = labels[:, 1:]  # (rows, length - 1): position t predicts token t + 1
        is_label = targets != -100
        predicting_states = hidden_states[:, :-1][is_label]  # (rows, length - 1, hidden_size) -> (labels, hidden_size)
        logits = self.lm_head(predicting_states).float()  # (labels, vocabulary)
        total = nn.functional.cross_entropy(logits, targets[is_label], reduction="sum")
        return total / (label_count if label_count is not None else is_label.sum().clamp(min=1))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AudioProjector):
            module.reset_parameters()


class GraftForConditionalGeneration(AudioInput, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with AudioInput."""

    config: GraftConfig
    config_class = GraftConfig
    _no_split_modules = [  # noqa: RUF012 (transformers' own form)
        *Qwen2VLForConditionalGeneration._no_split_modules,
        WhisperEncoderLayer.__name__,
    ]

    def __init__(self, config: GraftConfig):
        super().__init__(config)
        self.add_audio()

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
        """Compute logits, or with `labels` the loss alone, computed from the logits at label positions only.

        Args (all others are Qwen2-VL's):
            input_features: log-mels (clips, mels, frames) of the clips in the order of their placeholders, float32.
            audio_frame_counts: number of mel frames of each clip (clips,).
            audio_states: encode_audio's states of all clips (states, d_model), given in place of input_features.
            labels: target ids (rows, length); -100 marks positions without a target.
            label_count: what the summed cross-entropy is divided by; by default the number of targets.
        """
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
        outputs = self.model(**{**inputs, "use_cache": False}, **kwargs)
        loss: Any = self._label_loss(outputs.last_hidden_state, labels, label_count)
        return Qwen2VLCausalLMOutputWithPast(loss=loss)


class GraftForCausalLM(AudioInput, GenerationMixin):
    """A decoder for text alone, such as Qwen3 or Llama, with AudioInput.

    Its parts have the names that they have in Qwen2-VL, so that adapters and training know one set of names.
    """

    config: TextGraftConfig
    config_class = TextGraftConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer"]  # noqa: RUF012

    def __init__(self, config: TextGraftConfig):
        super().__init__(config)
        self.model = TextBackbone(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.add_audio()

    def get_input_embeddings(self) -> Any:
        return self.model.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.model.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        input_features: Tensor | None = None,
        audio_frame_counts: Tensor | None = None,
        audio_states: Tensor | None = None,
        label_count: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, or with `labels` the loss alone; the arguments are GraftForConditionalGeneration's."""
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids, input_features, audio_frame_counts, audio_states)
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            **kwargs,
        )
        if labels is not None:
            loss: Any = self._label_loss(outputs.last_hidden_state, labels, label_count)
            return CausalLMOutputWithPast(loss=loss)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state[:, kept]), past_key_values=outputs.past_key_values
        )


class TextBackbone(nn.Module):
    """Holds a decoder under the name that it has in Qwen2-VL."""

    def __init__(self, config: Any):
        super().__init__()
        self.language_model = AutoModel.from_config(config)


AnyGraft: TypeAlias = GraftForConditionalGeneration | GraftForCausalLM


def graft_class(config: AnyGraftConfig) -> Any:
    """Return the class of a graft with this configuration."""
    return GraftForConditionalGeneration if isinstance(config, GraftConfig) else GraftForCausalLM


for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    auto_class.register(GraftConfig, GraftForConditionalGeneration)
    auto_class.register(TextGraftConfig, GraftForCausalLM)
AutoModelForImageTextToText.register(GraftConfig, GraftForConditionalGeneration)
