"""Test projector.safetensors, and the digests that identify a base by its tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from graft.checkpoints.projector_file import PROJECTOR_FILE, load_projector, state_digest
from graft.errors import ModelError
from tests.support import tiny_models
from tests.support.adapters import save_projector

DIGESTS = {"audio": "sha256:aaa", "text": "sha256:bbb"}


def graft(seed: int = 0, **audio: object):
    return tiny_models.graft_model(seed, **{"base_digests": DIGESTS, **audio})


@pytest.fixture
def projector_folder(tmp_path: Path) -> Path:
    save_projector(graft(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["linear", "mlp", "conv"])
def test_a_saved_projector_is_loaded_exactly(tmp_path, kind):
    model, other = graft(audio_projector=kind), graft(1, audio_projector=kind)
    save_projector(model, tmp_path)
    load_projector(other, tmp_path)
    for name, tensor in model.audio_projector.state_dict().items():
        assert torch.equal(other.audio_projector.state_dict()[name], tensor)
    assert load_file(tmp_path / PROJECTOR_FILE).keys() == model.audio_projector.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_digests": {**DIGESTS, "text": "sha256:ccc"}}, ["base_digests", "sha256:bbb", "sha256:ccc"]),
        ({"audio_projector": "mlp"}, ["audio_projector=linear", "mlp"]),
        ({"audio_pool": 4}, ["audio_pool=2", "4"]),
        ({"prompt_style": "reference"}, ["prompt_style=graft", "reference"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_projector_trained_elsewhere_is_refused_with_both_values(projector_folder, change, words):
    model = graft(1, **change)
    before = {name: tensor.clone() for name, tensor in model.audio_projector.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_projector(model, projector_folder)
    assert all(
        word in str(caught.value) for word in [str(projector_folder / PROJECTOR_FILE), *words, "train it on this graft"]
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.audio_projector.state_dict().items())


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(
        ModelError, match=r"projector\.safetensors is missing: give the output folder of a finished stage"
    ):
        load_projector(graft(), tmp_path)
    (tmp_path / PROJECTOR_FILE).write_bytes(b"half a file")
    with pytest.raises(ModelError, match=r"projector\.safetensors"):
        load_projector(graft(), tmp_path)


def test_a_digest_depends_on_names_dtypes_shapes_and_bits():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    digest = state_digest(state)
    assert digest.startswith("sha256:")
    assert state_digest(dict(reversed(state.items()))) == digest
    assert state_digest({name: tensor.clone() for name, tensor in state.items()}) == digest
    assert state_digest({**state, "a": state["a"].T.contiguous().T}) == digest  # the memory layout does not matter
    flipped = state["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        {"a": flipped},
        {"a": state["a"].reshape(3, 2)},
        {"b": state["b"].half()},
        {"c": torch.tensor(4)},
        {"d": torch.ones(1)},
    ]
    assert len({digest, *(state_digest({**state, **other}) for other in others)}) == 6


def test_a_digest_does_not_depend_on_shards(tmp_path):
    model = tiny_models.whisper_model()
    digests = []
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        digests.append(state_digest(type(model).from_pretrained(tmp_path / name).state_dict()))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert digests[0] == digests[1] == state_digest(model.state_dict())
