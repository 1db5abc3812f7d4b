"""Tests that a graft built from an export equals the merged one, on the same bases alone, from clean files."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from graft.audio.chunking import windows
from graft.audio.clip import AudioClip
from graft.checkpoints import release
from graft.checkpoints.loading import open_graft, write_stage
from graft.checkpoints.lora import LoraSettings, save_adapters
from graft.config import recipe_yaml
from graft.errors import ModelError
from graft.inference.transcriber import open_transcriber
from graft.training.stages import ComputeSettings, Stage, open_for_stage
from jobs import build, export, merge, stage1, stage2
from jobs.common.cli import run_job
from jobs.evaluation.predictions import Prediction
from jobs.evaluation.scoring import score_predictions
from tests.support import tiny_models
from tests.support.adapters import SETTINGS, adapt, largest_difference, logits, save_projector, save_tiny_adapters

WORDS = {"styles": ["formatted", "raw"], "context": True}
SHARD_MB = 0.015


def job(module: Any, *arguments: str) -> int:
    name = module.__name__.rpartition(".")[2].capitalize()
    return run_job(getattr(module, f"{name}Recipe"), module.run, summary="", argv=arguments)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two tiny bases, a graft on them, and the output folders of both stages on it."""
    home = tmp_path_factory.mktemp("export")
    audio, text = tiny_models.save_audio_base(home / "whisper"), tiny_models.save_text_base(home / "qwen", spare_rows=1)
    assert (
        job(build, f"audio_base={audio}", f"text_base={text}", f"out={home / 'graft'}", "audio_pool=1", "seed=5") == 0
    )
    told = {"model": str(home / "graft"), "data": [str(home / "speech" / "train")]}
    recipes = {
        1: stage1.Stage1Recipe(**told, out=str(home / "stage1")),
        2: stage2.Stage2Recipe(**told, out=str(home / "stage2"), projector=str(home / "stage1")),
    }
    for number, recipe in recipes.items():
        model, _ = open_graft(home / "graft")
        model.audio_projector.linear.weight.data.mul_(1 + number)
        folder = Path(recipe.out)
        folder.mkdir()
        save_projector(model, folder)
        if number == 2:
            save_tiny_adapters(adapt(model), folder)
        write_stage(folder, stage=number, graft=home / "graft", words=WORDS)
        (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    return home


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    """Export stage 2 with nothing rounded."""
    out = home / "exported"
    assert job(export, f"model={home / 'stage2'}", f"out={out}", "dtype=fp32", f"shard_mb={SHARD_MB}") == 0
    return out


@pytest.fixture
def built(home: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(source: Path | str, *arguments: str) -> Path:
        bases = (f"audio_base={home / 'whisper'}", f"text_base={home / 'qwen'}")
        assert job(build, "--pretrained", str(source), "--out", str(tmp_path / "built"), *bases, *arguments) == 0
        return tmp_path / "built"

    return make


@pytest.mark.seconds
@pytest.mark.parametrize(("stage", "onto"), [("stage1", "full"), ("stage2", "full"), ("stage2", "nf4")])
def test_built_from_an_export_equals_the_merged_graft(home, tmp_path, built, stage, onto):
    if onto == "nf4":
        pytest.importorskip("bitsandbytes")
    assert job(export, f"model={home / stage}", f"out={tmp_path / 'exported'}", "dtype=fp32", f"onto={onto}") == 0
    assert job(merge, f"model={home / stage}", f"out={tmp_path / 'merged'}", f"onto={onto}") == 0
    (model, processor), (merged, expected) = (
        open_graft(path) for path in (built(tmp_path / "exported"), tmp_path / "merged")
    )
    assert largest_difference(logits(model), logits(merged)) < 1e-5
    assert largest_difference(logits(model), logits(open_graft(home / "graft")[0])) > 1e-3
    configs = [{**one.config.to_dict(), "_name_or_path": None} for one in (model, merged)]
    assert configs[0] == configs[1]
    assert processor.prompt_ids(40) == expected.prompt_ids(40)
    assert (processor.trained_styles, processor.trained_context) == (["formatted", "raw"], True)
    parts = {path.name for path in (tmp_path / "built" / "adapter").iterdir()}
    assert parts == {path.name for path in (tmp_path / "merged" / "adapter").iterdir()}


def test_the_recipes_of_all_runs_that_led_there_travel(home, tmp_path):
    shutil.copytree(home / "stage2", tmp_path / "more")
    recipe = stage2.Stage2Recipe(model=str(home / "graft"), data="other", out="more", adapters=str(home / "stage2"))
    (tmp_path / "more" / "recipe.yaml").write_text(recipe_yaml(recipe))
    write_stage(tmp_path / "more", stage=2, graft=home / "graft", words=WORDS)
    assert job(export, f"model={tmp_path / 'more'}", f"out={tmp_path / 'exported'}") == 0
    recipes = tmp_path / "exported" / "recipes"
    assert {path.stem for path in recipes.iterdir()} == {"build", "stage1", "stage2-before", "stage2"}
    assert yaml.safe_load((recipes / "stage2.yaml").read_text())["data"] == "other"
    assert yaml.safe_load((recipes / "stage2-before.yaml").read_text())["data"] == ["train"]


def test_the_files_are_small_and_name_no_machine(home, exported):
    shards = sorted(exported.glob("adapter-0*-of-0*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size <= SHARD_MB * 1e6 for path in shards)
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()} - {
        path.name for path in shards
    }
    assert names == {
        *("pretrained.json", "README.md", "recipe.yaml", "adapter.safetensors.index.json"),
        *(f"recipes/{name}.yaml" for name in ("build", "stage1", "stage2")),
    }
    for name in names:
        assert str(home.parent) not in (exported / name).read_text(), name
    told = yaml.safe_load((exported / "recipes" / "stage2.yaml").read_text())
    assert (told["model"], told["projector"], told["data"], told["learning_rate"]) == (
        "graft",
        "stage1",
        ["train"],
        2e-4,
    )
    found = json.loads((exported / "pretrained.json").read_text())
    assert (found["format"], found["audio_base"], found["text_base"], found["dtype"], found["onto"]) == (
        1,
        "whisper",
        "qwen",
        "fp32",
        "full",
    )
    assert found["base_digests"] == open_graft(home / "graft")[0].config.base_digests
    assert found["adapters"] == {"rank": 4, "alpha": 4, "dropout": SETTINGS.dropout, "encoder": False}
    assert (found["settings"]["audio_pool"], found["settings"]["seed"]) == (1, 5)


def test_a_smaller_rank_changes_the_adapted_matrices_alone(home, exported, tmp_path, built, capsys):
    assert job(export, f"model={home / 'stage2'}", f"out={tmp_path / 'cut'}", "rank=2", "dtype=fp32") == 0
    assert re.search(
        r"^energy kept: \d\d\.\d% on average, \d\d\.\d% at least \(layers\.\d\.", capsys.readouterr().out, re.MULTILINE
    )
    whole = load_file(built(exported) / "model.safetensors")
    shutil.rmtree(tmp_path / "built")
    cut = load_file(built(tmp_path / "cut") / "model.safetensors")
    changed = {name for name in whole if not torch.equal(whole[name], cut[name])}
    assert changed == {
        name for name in whole if "_proj.weight" in name and name.startswith("model.language_model.layers.")
    }
    assert len(changed) == 14
    one, other = (load_file(next(folder.glob("adapter*.safetensors"))) for folder in (tmp_path / "cut", exported))
    assert len(one) > len(other)


def test_bfloat16_halves_the_files_and_is_nearly_the_same(home, exported, tmp_path, built):
    assert job(export, f"model={home / 'stage2'}", f"out={tmp_path / 'half'}") == 0
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tmp_path / "half", exported)
    ]
    assert sizes[0] < 0.7 * sizes[1]
    near = logits(open_graft(built(tmp_path / "half"))[0])
    shutil.rmtree(tmp_path / "built")
    exact = logits(open_graft(built(exported, "dtype=fp32"))[0])
    assert 0 < largest_difference(near, exact) < 0.05 * float(exact.abs().max())


def test_audio_tokens_keep_the_embeddings_that_they_were_trained_with(home, exported, tmp_path, built):
    other = shutil.copytree(exported, tmp_path / "other")
    found = json.loads((other / "pretrained.json").read_text())
    found["settings"]["seed"] = 6  # as if joining drew other rows for the tokens that had no spare ones
    (other / "pretrained.json").write_text(json.dumps(found))
    model, _ = open_graft(built(other))
    expected, _ = open_graft(home / "graft")
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)
    assert not torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_a_built_graft_transcribes_and_trains_on(exported, built):
    folder = built(exported)
    transcriber = open_transcriber(folder, chunker=windows)
    assert isinstance(transcriber.transcribe(AudioClip(torch.randn(8000).numpy() * 0.1)).text, str)
    transcriber.close()
    model, _ = open_graft(folder)
    for stage in (Stage(1), Stage(2, lora=SETTINGS)):
        begun, _ = open_for_stage(stage, str(folder), ComputeSettings("fp32", "torch"))
        assert torch.equal(begun.audio_projector.linear.weight, model.audio_projector.linear.weight)
        assert largest_difference(logits(begun.eval()), logits(model)) < 1e-5


def test_a_name_stands_for_a_folder_of_the_package(exported, built, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(release, "FOLDER", tmp_path / "pretrained")
    arguments = ("pretrained=tiny", f"out={tmp_path / 'no'}")
    assert job(build, *arguments) == 2
    assert (
        "tiny is no pretrained graft: give a name (none come with this installation) or a folder"
        in capsys.readouterr().err
    )
    for name in ("tiny", "large"):
        shutil.copytree(exported, tmp_path / "pretrained" / name)
    assert job(build, "pretrained=tyni", arguments[1]) == 2
    assert (
        "tyni is no pretrained graft: give a name (large, tiny) or a folder written by `graft export`"
        in capsys.readouterr().err
    )
    assert yaml.safe_load((built("tiny") / "recipe.yaml").read_text())["pretrained"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["audio_pool=4"],
            "audio_pool=4 does not go with pretrained=, whose weights were trained with 1: leave it out",
        ),
        (["seed=1"], "seed=1 does not go with pretrained=, whose weights were trained with 5"),
        (["reference=r"], "pretrained= and reference= are two trained models: give one of them"),
        (["text_base={home}/other"], "was trained on another text base than {home}/other (sha256:"),
        (["audio_base={home}/qwen"], "qwen is a qwen2_vl checkpoint, not whisper"),
    ],
)
def test_what_a_pretrained_graft_does_not_go_with_is_refused(home, exported, tmp_path, capsys, arguments, words):
    if not (home / "other").exists():
        tiny_models.save_text_base(home / "other", spare_rows=1, seed=4)
    bases = [f"audio_base={home / 'whisper'}", f"text_base={home / 'qwen'}"]
    given = [argument.format(home=home) for argument in arguments]
    assert job(build, f"pretrained={exported}", f"out={tmp_path / 'out'}", *bases, *given) == 2
    error = capsys.readouterr().err
    assert words.format(home=home) in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def damaged(exported: Path, to: Path, name: str, content: bytes | None) -> str:
    shutil.copytree(exported, to)
    path = next(to.glob(name))
    path.unlink() if content is None else path.write_bytes(content)
    return str(to)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter-00002*", None, "its adapter*.safetensors do not hold what was exported: fetch or export it again"),
        ("adapter-00002*", b"\x10", "can't be read"),
        ("pretrained.json", b"{", "pretrained.json can't be read"),
        ("pretrained.json", b"{}", "pretrained.json can't be read"),
        (
            "pretrained.json",
            b'{"format": 2}',
            "pretrained.json has format 2, this graft reads 1: upgrade graft, or export it again",
        ),
    ],
)
def test_damaged_files_are_refused_in_one_line(home, exported, tmp_path, capsys, name, content, words):
    folder = damaged(exported, tmp_path / "damaged", name, content)
    bases = [f"audio_base={home / 'whisper'}", f"text_base={home / 'qwen'}"]
    assert job(build, f"pretrained={folder}", f"out={tmp_path / 'out'}", *bases) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_has_no_two_bases_is_not_exported(home, exported, tmp_path, built, capsys):
    def refused(model: Path, *arguments: str) -> str:
        assert job(export, f"model={model}", f"out={tmp_path / 'out'}", *arguments) == 2
        assert not list(tmp_path.glob("*out*"))
        return capsys.readouterr().err

    assert "is no stage's output (it has no stage.json)" in refused(home / "graft")
    assert "does not fit into a shard of 0.01 MB: make it 0.02 MB or more" in refused(home / "stage2", "shard_mb=0.01")
    assert "no such file or folder: data_list=" in refused(home / "stage2", f"data_list={tmp_path / 'none.md'}")
    further_stage = tmp_path / "stage"
    shutil.copytree(home / "stage1", further_stage)
    write_stage(further_stage, stage=1, graft=built(exported))
    assert "holds merged adapters, so the stage belongs onto no two bases" in refused(further_stage)
    nameless = shutil.copytree(home / "graft", tmp_path / "nameless")
    (nameless / "recipe.yaml").unlink()
    write_stage(further_stage, stage=1, graft=nameless)
    assert "has no recipe.yaml of `graft build` that names its bases: give audio_base=" in refused(further_stage)


def test_the_card_tells_data_and_scores(home, tmp_path):
    rows = [
        {"corpus": "Prompts", "hours": 2, "licence": "CC BY 4.0"},
        {"corpus": "Calls", "hours": 3, "licence": "CC0"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = Prediction("a", "dev", "graft", "good morning to you", "good morning to")
    scores = score_predictions([words])
    report = {"model": "m", "pipeline": "windows", **scores, "expected": [], "rtfx": {"graft": 2.0}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    given = [f"data_list={tmp_path / 'data.json'}", f"report={tmp_path / 'report.json'}", "name=tiny", "rank=2"]
    assert job(export, f"model={home / 'stage2'}", f"out={tmp_path / 'out'}", *given) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for line in [
        "# tiny",
        "| Prompts | 2 | CC BY 4.0 |",
        "| audio_pool | 1 |",
        "    graft build pretrained=tiny out=FOLDER",
    ]:
        assert line in card.splitlines()
    assert "LoRA adapters of rank 2" in card
    assert " 25.0%" in card
    assert str(tmp_path) not in card


def test_stage_2_starts_from_a_trained_projector_only(home, exported, built, tmp_path):
    def told(model: Path, projector: Path | None = None) -> stage2.Stage2Recipe:
        return stage2.Stage2Recipe(
            model=str(model), data=["d"], out=str(tmp_path / "out"), projector=projector and str(projector)
        )

    assert stage2._initial_projector(told(home / "graft", home / "stage1")) == str(home / "stage1")
    assert stage2._initial_projector(told(home / "stage1")) == str(home / "stage1")
    assert stage2._initial_projector(told(built(exported))) is None
    with pytest.raises(ModelError, match="graft is untrained: give projector=, the output folder of stage 1"):
        stage2.run(told(home / "graft"))
    with pytest.raises(
        ModelError, match="stage2 is stage 2's output: give its graft as model= and it as adapters=, or merge it first"
    ):
        stage2.run(told(home / "stage2"))


def test_stage_2_trains_on_with_adapters(home, tmp_path):
    def told(**lora: int) -> stage2.Stage2Recipe:
        settings = {
            "model": str(home / "graft"),
            "data": ["d"],
            "out": str(tmp_path / "out"),
            "adapters": str(home / "stage2"),
            "lora": lora,
        }
        return stage2.Stage2Recipe.model_validate(settings)

    recipe = told(rank=SETTINGS.rank, alpha=SETTINGS.alpha)
    folder = stage2._initial_adapters(recipe)
    assert folder == stage2._initial_projector(recipe) == str(home / "stage2")
    stage = Stage(2, lora=SETTINGS, projector=folder, adapters=folder)
    model, _ = open_for_stage(stage, recipe.model, ComputeSettings(dtype="fp32"))
    assert {name for name, weight in model.named_parameters() if weight.requires_grad and "lora_" in name}
    assert torch.equal(logits(model.eval()), logits(open_graft(home / "stage2")[0]))
    with pytest.raises(ModelError, match=f"have lora.rank={SETTINGS.rank} lora.alpha={SETTINGS.alpha}: give these"):
        stage2.run(told(rank=SETTINGS.rank + 1))


def test_stage_2_refuses_adapters_of_other_bases(home, tmp_path):
    """The projector is one of the graft's own bases, so the adapters alone can tell."""
    shutil.copytree(home / "graft", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["base_digests"]["text"] = "sha256:of another text base"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "stage1").mkdir()
    save_projector(open_graft(tmp_path / "other")[0], tmp_path / "stage1")
    recipe = stage2.Stage2Recipe.model_validate(
        {
            "model": str(tmp_path / "other"),
            "data": ["d"],
            "out": str(tmp_path / "out"),
            "projector": str(tmp_path / "stage1"),
            "adapters": str(home / "stage2"),
            "lora": {"rank": SETTINGS.rank, "alpha": SETTINGS.alpha},
        }
    )
    with pytest.raises(ModelError, match=r"stage2/projector.safetensors was trained with base_digests=.*: train it on"):
        stage2.run(recipe)


def test_an_export_keeps_the_trained_rank_unless_told(home, tmp_path):
    """The rank is above 16, to which exports used to cut it."""
    settings = LoraSettings(rank=20, alpha=40)
    shutil.copytree(home / "stage1", tmp_path / "wide")
    model = adapt(open_graft(home / "graft")[0], settings)
    save_adapters(dict(model.named_parameters()), settings, tmp_path / "wide")
    write_stage(tmp_path / "wide", stage=2, graft=home / "graft", words=WORDS)
    assert job(export, f"model={tmp_path / 'wide'}", f"out={tmp_path / 'kept'}", "dtype=fp32") == 0
    assert job(export, f"model={tmp_path / 'wide'}", f"out={tmp_path / 'cut'}", "rank=8", "dtype=fp32") == 0
    ranks = [
        json.loads((tmp_path / one / "pretrained.json").read_text())["adapters"]["rank"] for one in ("kept", "cut")
    ]
    assert ranks == [20, 8]
    assert "LoRA adapters of rank 20" in (tmp_path / "kept" / "README.md").read_text()
