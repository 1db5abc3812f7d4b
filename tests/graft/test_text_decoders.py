"""Grafts on decoders for text alone: Qwen3 and Llama (SmolLM2), from the bases to the merged model that transcribes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.audio.clip import AudioClip
from graft.checkpoints.build import build_graft
from graft.checkpoints.loading import check_model, open_graft, write_stage
from graft.checkpoints.lora import LoraSettings, save_adapters
from graft.checkpoints.merging import write_merged
from graft.errors import ModelError
from graft.inference.transcriber import make_transcriber
from graft.model.modeling import GraftForCausalLM, GraftForConditionalGeneration
from graft.processor import TextGraftProcessor
from graft.text.prompts import CHATML, find_chat_format
from graft.training.backends import TorchBackend
from graft.training.estimate import count_parameters, layer_matrices, matrix_parameters, text_forward_flops
from graft.training.stages import ComputeSettings, Stage, open_for_stage
from tests.support import media, tiny_models
from tests.support.adapters import SETTINGS, adapt, largest_difference, logits, save_projector
from tests.support.paths import ROOT
from tests.support.training import clip_steps, run_steps, weights

pytestmark = pytest.mark.seconds

KINDS = tuple(tiny_models.TEXT_DECODERS)


@pytest.fixture(scope="module", params=KINDS)
def bases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp(request.param)
    audio = tiny_models.save_audio_base(folder / "audio")
    return audio, tiny_models.save_text_decoder(folder / "text", kind=request.param)


@pytest.fixture(scope="module")
def folder(bases: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "graft"
    model, processor = build_graft(*bases, audio_projector="conv", audio_projector_blocks=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_texts_have_the_logits_of_the_base_bit_for_bit(bases: tuple[str, str], folder: Path):
    base = AutoModelForCausalLM.from_pretrained(bases[1])
    ids = torch.tensor([[5, 9, 30, 31, 7, 60, 5]])
    expected = base(input_ids=ids).logits
    for model in (build_graft(*bases)[0], open_graft(folder)[0], AutoModelForCausalLM.from_pretrained(folder)):
        assert isinstance(model, GraftForCausalLM)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.generate(ids, max_new_tokens=8).tolist() == base.generate(ids, max_new_tokens=8).tolist()


def test_a_fresh_process_needs_the_package_alone(folder: Path):
    code = (
        "import sys, torch, graft.model.modeling; from transformers import AutoModelForCausalLM as M\n"
        "print(type(M.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "GraftForCausalLM"


@torch.no_grad()
def test_a_batch_equals_single_rows(folder: Path):
    model, _ = open_graft(folder)
    counts = [37, 250, 8]
    features, frame_counts = tiny_models.log_mels(counts)
    prompts = [prompt(model, count) for count in counts]
    ids, mask = tiny_models.pad_rows(prompts, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    audio: dict[str, Any] = {"input_features": features, "audio_frame_counts": frame_counts}
    together = model(input_ids=ids, attention_mask=mask, position_ids=positions, **audio).logits[:, -1]
    for index, count in enumerate(counts):
        alone = model(
            input_ids=torch.tensor([prompts[index]]),
            input_features=features[index : index + 1, :, : count + 2],
            audio_frame_counts=frame_counts[index : index + 1],
        ).logits[0, -1]
        torch.testing.assert_close(together[index], alone, rtol=0, atol=2e-5)


def prompt(model: Any, frame_count: int) -> list[int]:
    count = tiny_models.audio_token_count(frame_count, pool=model.config.audio_pool, context=model.config.audio_context)
    return [5, 6, *[model.config.audio_token_id] * count, 7, 8, 9]


def test_both_stages_learn_and_the_merged_model_transcribes_as_the_adapters_do(folder: Path, tmp_path: Path):
    first, processor = open_for_stage(Stage(1), str(folder), ComputeSettings("fp32", "torch"))
    learn(first, processor)
    save_projector(first, tmp_path)
    stage = Stage(2, lora=LoraSettings(rank=4, alpha=8), projector=str(tmp_path))
    model, processor = open_for_stage(stage, str(folder), ComputeSettings("fp32", "torch", gradient_checkpointing=True))
    before = weights(model)
    learn(model, processor)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len([name for name in changed if ".lora_A." in name]) == 14  # two layers of seven matrices

    save_projector(model, tmp_path)
    save_adapters(dict(model.named_parameters()), stage.lora or SETTINGS, tmp_path)
    write_stage(tmp_path, stage=2, graft=folder)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path, tmp_path / "merged", dtype=torch.float32, onto_nf4=False)
    clips = [AudioClip(media.speech(16_000, seconds=seconds, channels=1)[:, 0]) for seconds in (1.0, 2.5)]
    texts = []
    for path in (tmp_path, tmp_path / "merged"):
        opened, processor = open_graft(path)
        transcriber = make_transcriber(opened, processor, name="tiny")
        try:
            texts.append([transcript.text for transcript in transcriber.transcribe_many(clips)])
        finally:
            transcriber.close()
    assert texts[0] == texts[1]


def learn(model: Any, processor: Any) -> None:
    backend = TorchBackend(model, weight_decay=0.0, max_grad_norm=1.0)
    (batch,) = clip_steps(processor, steps=1, size=4)
    _, logs = run_steps([batch] * 10, backend, learning_rate=1e-2)
    assert logs[-1].loss < logs[0].loss - 0.02


def test_merged_adapters_give_their_logits(folder: Path, tmp_path: Path):
    model, _ = open_graft(folder)
    save_projector(model, tmp_path)
    save_adapters(dict(adapt(model).named_parameters()), SETTINGS, tmp_path)
    write_stage(tmp_path, stage=2, graft=folder)
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path, tmp_path / "merged", dtype=torch.float32, onto_nf4=False)
    merged, _ = open_graft(tmp_path / "merged")
    with torch.no_grad():
        assert largest_difference(logits(merged), logits(model)) < 1e-4
        assert largest_difference(logits(merged), logits(open_graft(folder)[0])) > 1e-2


def test_the_engine_gives_the_tokens_of_generate(folder: Path):
    from tests.graft.inference.engines.test_transformers_engine import collect_all, generated, running

    model, _ = open_graft(folder)
    from graft.audio.features import Features
    from graft.inference.engines.protocol import EngineRequest

    requests = []
    for index, count in enumerate([37, 250, 8, 120]):
        features, _ = tiny_models.log_mels([count], seed=index)
        requests.append(EngineRequest(f"r{index}", Features(features[0].numpy(), count), prompt(model, count), 12))
    expected = [generated(model, request)[0] for request in requests]
    assert len({tuple(ids) for ids in expected}) > 1  # the audio decides
    import asyncio

    with running(model) as engine:
        streams = asyncio.run(collect_all(engine, requests))
    assert [[token.id for token in stream] for stream in streams] == expected


def test_parameters_and_matrices_are_counted(folder: Path):
    model, _ = open_graft(folder)
    counted = count_parameters(model.config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert counted.vision == 0
    layer: Any = model.model.language_model.layers[0]
    matrices = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(layer_matrices(model.config)) == sorted((one.in_features, one.out_features) for one in matrices)
    attention = text_forward_flops(model.config, [10]) - 2 * 10 * matrix_parameters(model.config)
    assert attention == 2 * 2 * layer.self_attn.o_proj.in_features * 10**2  # 2 layers, half of 4 FLOPs a pair of tokens


def test_what_does_not_go_with_it_is_refused_in_one_line(bases: tuple[str, str], folder: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="which engine=vllm does not run: leave engine out"):
        check_model(folder, engine="vllm")
    with pytest.raises(ValueError, match="which GraftForConditionalGeneration does not load: load it with AutoModel"):
        GraftForConditionalGeneration.from_pretrained(folder)
    sliding = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    windowed = tiny_models.save_text_decoder(tmp_path / "windowed", kind="qwen3", **sliding)
    with pytest.raises(ModelError, match="sliding window: give a model whose layers see the whole text"):
        build_graft(bases[0], windowed)
    words = AutoTokenizer.from_pretrained(bases[1])
    plain = tiny_models.save_text_decoder(tmp_path / "plain", kind="llama")
    assert "<|im_start|>" in words.get_added_vocab()
    file = Path(plain, "tokenizer.json")
    file.write_text(file.read_text().replace("<|im_start|>", "<|begin|>"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := Path(plain, name)).is_file():
            path.write_text(path.read_text().replace("<|im_start|>", "<|begin|>"))
    with pytest.raises(ModelError, match="has neither the chat token <\\|im_start\\|> nor"):
        build_graft(bases[0], plain)


def test_prompts_are_written_in_the_form_of_the_models_chats():
    assert find_chat_format(["<|im_start|>", "<think>"]) is CHATML
    assert find_chat_format(["<|im_start|>"], "Assistant: ") is CHATML  # a template of another kind
    thought = CHATML.answer + "<think>\n\n</think>\n"
    assert find_chat_format(["<|im_start|>"], thought).prompt_end == CHATML.user_end + thought
    assert find_chat_format(["<|im_start|>"], CHATML.answer + "<think>\n").answer.endswith("<think>\n\n</think>\n\n")
    assert find_chat_format(["<|start_header_id|>"]).user.endswith("user<|end_header_id|>\n\n")
    assert find_chat_format(["<s>"]) is None


THINKING = """{%- for message in messages -%}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


def test_a_thinking_model_answers_without_thoughts_as_its_template_does(bases: tuple[str, str], tmp_path: Path):
    _, processor = build_graft(*bases)
    assert processor.tokenizer.decode(processor.prompt_end_ids()) == CHATML.prompt_end
    processor.tokenizer.chat_template = processor.chat_template = THINKING
    processor.save_pretrained(tmp_path)
    opened = TextGraftProcessor.from_pretrained(tmp_path)
    assert opened.tokenizer.decode(opened.prompt_end_ids()).endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_tokenizer_without_a_padding_token_pads_too(bases: tuple[str, str]):
    _, processor = build_graft(*bases)
    processor.tokenizer.pad_token = None
    (batch,) = clip_steps(processor, steps=1, size=3)
    assert batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape
    assert not batch.inputs["attention_mask"].all()
    clips = [AudioClip(np.ones(16_000 // part, np.float32)) for part in (1, 3)]
    assert len(processor(audio=clips)["input_ids"]) == 2
