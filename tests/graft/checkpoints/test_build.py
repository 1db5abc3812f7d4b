"""Test joining two tiny checkpoints: equal base tensors, audio tokens in spare rows, errors for wrong bases."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, WhisperModel

from graft.checkpoints.build import build_graft
from graft.checkpoints.loading import open_graft
from graft.checkpoints.projector_file import state_digest
from graft.errors import ModelError
from graft.model.configuration import GraftConfig
from graft.model.tokens import AUDIO_TOKENS
from jobs.build import BuildRecipe, graft_settings, run
from jobs.common.cli import run_job
from tests.support import tiny_models


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return tiny_models.save_audio_base(folder / "whisper"), tiny_models.save_text_base(folder / "qwen")


def build_job(*arguments: str) -> int:
    return run_job(BuildRecipe, run, summary="", argv=list(arguments))


def test_the_bases_tensors_are_kept_bit_for_bit(bases):
    audio, text = bases
    model, _ = build_graft(audio, text)
    state = model.state_dict()
    encoder, words = WhisperModel.from_pretrained(audio).encoder, Qwen2VLForConditionalGeneration.from_pretrained(text)
    kept = {f"audio_tower.{name}": tensor for name, tensor in encoder.state_dict().items()} | words.state_dict()
    assert state.keys() - kept.keys() == {"audio_projector.linear.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())
    assert model.config.base_digests == {
        "audio": state_digest(encoder.state_dict()),
        "text": state_digest(words.state_dict()),
    }
    again, _ = build_graft(audio, text)
    assert state_digest(again.state_dict()) == state_digest(state)
    other, _ = build_graft(audio, text, seed=1)
    assert not torch.equal(other.audio_projector.linear.weight, model.audio_projector.linear.weight)


@pytest.mark.parametrize(("spare_rows", "tied"), [(8, False), (8, True), (1, False), (1, True)])
def test_audio_tokens_take_spare_rows_or_new_ones(bases, tmp_path, spare_rows, tied):
    text = tiny_models.save_text_base(tmp_path / "qwen", spare_rows=spare_rows, tied=tied)
    base = Qwen2VLForConditionalGeneration.from_pretrained(text)
    model, processor = build_graft(bases[0], text)
    before, after = base.get_input_embeddings().weight, model.get_input_embeddings().weight
    words = len(tiny_models.tokenizer(audio=False))
    assert (
        after.shape[0]
        == model.lm_head.weight.shape[0]
        == model.config.text_config.vocab_size
        == words + max(spare_rows, 3)
    )
    assert torch.equal(after[: len(before)], before)
    assert torch.equal(model.lm_head.weight[: len(before)], base.lm_head.weight)
    assert (model.lm_head.weight is after) == tied
    ids = processor.tokenizer.convert_tokens_to_ids(list(AUDIO_TOKENS))
    assert ids == [words, words + 1, words + 2]
    config = model.config
    assert ids == [config.audio_token_id, config.audio_start_token_id, config.audio_end_token_id]
    assert set(model.generation_config.suppress_tokens) == {
        *ids,
        *processor.tokenizer.convert_tokens_to_ids(list(tiny_models.VISION_TOKENS)),
    }
    assert processor.tokenizer("a<|audio_pad|>", add_special_tokens=False).input_ids[-1] == config.audio_token_id
    old = AutoTokenizer.from_pretrained(text)
    assert processor.tokenizer("Old words<|im_end|>").input_ids == old("Old words<|im_end|>").input_ids
    inputs = {"input_ids": torch.tensor([old("Some text").input_ids])}
    with torch.no_grad():
        torch.testing.assert_close(
            model(**inputs).logits[..., : len(before)],
            base.eval()(**inputs).logits[..., : len(before)],
            rtol=0,
            atol=1e-6,
        )


def test_the_settings_reach_model_and_processor(bases):
    settings = {
        "audio_pool": 4,
        "audio_context": "trim",
        "audio_projector": "mlp",
        "prompt_style": "reference",
        "text_style": "raw",
    }
    model, processor = build_graft(*bases, dtype=torch.bfloat16, **settings)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name in ("audio_pool", "audio_context", "prompt_style", "text_style"):
        assert getattr(model.config, name) == getattr(processor, name) == settings[name]
    assert hasattr(model.audio_projector, "linear_2")


@pytest.mark.processes
def test_the_build_job_writes_a_graft_that_a_fresh_process_loads(bases, tmp_path):
    audio, text = bases
    assert build_job(f"audio_base={audio}", f"text_base={text}", f"out={tmp_path / 'graft'}", "audio_pool=1") == 0
    model, processor = open_graft(tmp_path / "graft")
    expected, _ = build_graft(audio, text, audio_pool=1)
    assert state_digest(model.state_dict()) == state_digest(expected.state_dict())
    assert (tmp_path / "graft" / "recipe.yaml").is_file()
    script = f"""
import graft.processor, graft.model.modeling
from transformers import AutoModelForImageTextToText, AutoProcessor
from graft.checkpoints.projector_file import state_digest
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "graft")!r})
print(state_digest(model.state_dict()), model.config.base_digests["audio"], model.generation_config.suppress_tokens)
print(AutoProcessor.from_pretrained({str(tmp_path / "graft")!r}).prompt_ids(100))
"""
    found = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120
    ).stdout.splitlines()
    digests = f"{state_digest(model.state_dict())} {model.config.base_digests['audio']}"
    assert found[0] == f"{digests} {model.generation_config.suppress_tokens}"
    assert found[1] == str(processor.prompt_ids(100))


def broken(folder: str, to: Path, name: str, content: bytes | None) -> str:
    """Copy a checkpoint and damage or remove one file of the copy."""
    shutil.copytree(folder, to)
    (to / name).unlink()
    if content is not None:
        (to / name).write_bytes(content)
    return str(to)


def test_wrong_bases_end_in_one_line_and_leave_nothing(bases, tmp_path, capsys):
    audio, text = bases
    (tmp_path / "empty").mkdir()
    state = load_file(Path(text, "model.safetensors"))
    holed = save(
        {name: tensor for name, tensor in state.items() if not name.endswith(".norm.weight")}, {"format": "pt"}
    )
    cases = [
        (text, text, "is a qwen2_vl checkpoint, not whisper"),
        (audio, audio, "is a whisper checkpoint, not qwen2_vl"),
        (str(tmp_path / "nowhere"), text, "no such file or folder: audio_base="),
        ("no/where", text, "no/where can't be read as a whisper checkpoint"),
        (str(tmp_path / "empty"), text, "empty has no config.json"),
        (
            broken(audio, tmp_path / "json", "config.json", b"{"),
            text,
            "json can't be read as a whisper checkpoint (It looks",
        ),
        (
            broken(audio, tmp_path / "weightless", "model.safetensors", None),
            text,
            "weightless can't be read (Error no file named",
        ),
        (audio, broken(text, tmp_path / "cut", "model.safetensors", b"\x10"), "cut can't be read"),
        (
            audio,
            broken(text, tmp_path / "holed", "model.safetensors", holed),
            "holed lacks 1 tensors, model.language_model.norm",
        ),
        (audio, broken(text, tmp_path / "wordless", "tokenizer.json", None), "wordless can't be read"),
        (broken(audio, tmp_path / "earless", "preprocessor_config.json", None), text, "earless can't be read"),
    ]
    for audio_base, text_base, words in cases:
        assert (
            build_job(f"audio_base={audio_base}", f"text_base={text_base}", f"out={tmp_path / 'out' / 'graft'}") == 2
        ), words
        errors = capsys.readouterr().err.strip().splitlines()
        assert errors[-1].startswith("graft: error: ")
        assert words in errors[-1]
        assert len(errors) == 1, errors
        assert not list((tmp_path / "out").glob("*"))


def test_a_damaged_graft_is_refused_in_one_line(bases, tmp_path):
    model, processor = build_graft(*bases)
    model.save_pretrained(tmp_path / "graft")
    processor.save_pretrained(tmp_path / "graft")
    config = json.loads((tmp_path / "graft" / "config.json").read_text()) | {"audio_pool": 3}
    for name, content in [
        ("model.safetensors", b"\x10"),
        ("tokenizer.json", None),
        ("config.json", json.dumps(config).encode()),
    ]:
        folder = broken(str(tmp_path / "graft"), tmp_path / f"without-{name}", name, content)
        with pytest.raises(ModelError, match=f"without-{name}") as caught:
            open_graft(folder)
        assert "\n" not in str(caught.value)
    for folder, words in [
        (bases[1], "is a qwen2_vl checkpoint, not graft"),
        (str(tmp_path / "no"), "can't be read as a graft"),
    ]:
        with pytest.raises(ModelError, match=words):
            open_graft(folder)


def test_the_recipe_and_the_configuration_have_equal_defaults() -> None:
    recipe = graft_settings(BuildRecipe(out="o"))
    assert recipe == {name: getattr(GraftConfig(), name) for name in recipe}
