"""Convert a Llama to the Qwen2-VL class with equal text logits: GGUF -> LlamaForCausalLM -> checkpoint folder."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from graft.checkpoints.quiet import no_gguf_bars
from graft.errors import ModelError, require

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
VISION_TOWER = {
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
SHARED_SETTINGS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": VISION_TOWER["patch_size"],
    "temporal_patch_size": VISION_TOWER["temporal_patch_size"],
    "merge_size": VISION_TOWER["spatial_merge_size"],
    "min_pixels": 56 * 56,
    "max_pixels": 28 * 28 * 1280,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def read_llama_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Read a Llama and its byte-level tokenizer from a GGUF file, dequantized to float32.

    The tokenizer of transformers' own reader does not split numbers into digits as SmolLM2's does. Raises MissingExtra
    where gguf or accelerate is not installed.
    """
    require("accelerate", extra="bundled")  # transformers reads weights of GGUF files with it alone
    reader = require("gguf", extra="bundled").GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    with no_gguf_bars():
        llama = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # tokenizer.ggml.pre is "smollm": every digit alone, then GPT-2's pattern
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        extra_special_tokens=control,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
    )
    return llama, tokenizer


def llama_as_qwen2vl(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a Llama with tied embeddings as a Qwen2VLForConditionalGeneration folder with equal text logits.

    Qwen2-VL's five vision tokens get embedding rows near the table's mean, and the vision tower is tiny and random.
    numpy draws both, because its random numbers are equal on every machine, and with them a graft's digest of its base.
    Raises ModelError for a Llama whose logits would change.
    """
    ids = {token: llama.config.vocab_size + i for i, token in enumerate(VISION_TOKENS)}
    tokenizer.add_special_tokens({"extra_special_tokens": list(VISION_TOKENS)}, replace_extra_special_tokens=False)
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(_qwen2vl_config(llama.config, ids))
    generator = np.random.Generator(np.random.PCG64(0))

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(0.02 * generator.standard_normal(shape, dtype=np.float32))

    known = {name.replace("model.", "model.language_model.", 1): value for name, value in llama.state_dict().items()}
    table = known["model.language_model.embed_tokens.weight"]
    mean = table.double().mean(dim=0).to(table.dtype)
    table = torch.cat([table, mean + normal(len(ids), table.shape[1])])
    known |= {"model.language_model.embed_tokens.weight": table, "lm_head.weight": table}
    state = {}
    for name, value in sorted(model.state_dict().items()):
        if name in known:
            state[name] = known[name]
        elif name.endswith(".bias"):  # the Llama's projections have none
            state[name] = torch.zeros(value.shape)
        else:
            state[name] = torch.ones(value.shape) if value.ndim == 1 else normal(*value.shape)
    model.load_state_dict(state, strict=True, assign=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.unk_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2) + "\n")


def _qwen2vl_config(llama: LlamaConfig, ids: dict[str, int]) -> Qwen2VLConfig:
    rope = dict(llama.rope_parameters or {})
    if not llama.tie_word_embeddings or rope["rope_type"] != "default":
        raise ModelError(
            "the Llama has untied embeddings or scaled rotary positions, so its logits would change: "
            "give SmolLM2 or a Llama with tied embeddings and default rotary positions"
        )
    # Half a head's width is divided 2:1:1 between the positions in time, height and width.
    quarter = llama.hidden_size // llama.num_attention_heads // 8
    text = {key: getattr(llama, key) for key in SHARED_SETTINGS}
    text |= {
        "vocab_size": llama.vocab_size + len(ids),
        "rope_parameters": rope | {"mrope_section": [2 * quarter, quarter, quarter]},
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=VISION_TOWER | {"hidden_size": llama.hidden_size},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
