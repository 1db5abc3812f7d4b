"""Test `graft schema`: what it prints is a schema that the packaged recipes fulfil and wrong ones do not."""

import json

import jsonschema
import pytest
import yaml

from jobs.schema import NAMES, main, recipe_class
from tests.jobs.test_recipes import CLASSES, RECIPES


def schema_of(command: str, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main([command]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize("command", NAMES)
def test_a_schema_describes_every_key(command, capsys):
    schema = schema_of(command, capsys)
    assert list(schema["properties"]) == list(recipe_class(command).model_fields)
    assert all(one["description"] for one in schema["properties"].values())
    assert schema["additionalProperties"] is False
    assert "required" not in schema


class Yaml12Loader(yaml.SafeLoader):
    """Reads numbers as editors do, by YAML 1.2: PyYAML takes 1e-3 for a text."""


Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", yaml.resolver.re.compile(r"[-+]?\d+e[-+]?\d+$"), "0123456789"
)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_recipes_fulfil_their_schemas(path, capsys):
    by_class = {recipe_class(command): command for command in NAMES}
    schema = schema_of(by_class[CLASSES[path.stem.rpartition("-")[2]]], capsys)
    jsonschema.validate(yaml.load(path.read_text(), Yaml12Loader), schema)


def test_a_command_without_recipes_is_refused(capsys):
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith("graft: error: no recipes of bench: give one of transcribe, prepare")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("graft: error: no command is named: give one of transcribe, prepare")


@pytest.mark.parametrize(
    "recipe",
    [
        {"epoch": 3},
        {"epochs": 0},
        {"lora": {"rnk": 8}},
        {"quantize": "int3"},
        {"data": [{"weight": 2}]},
        {"augment": {"speed": [9]}},
    ],
)
def test_wrong_recipes_do_not(recipe, capsys):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(recipe, schema_of("stage2", capsys))


def test_a_group_may_be_given_in_part(capsys):
    jsonschema.validate({"lora": {"rank": 8}, "augment": {"noise": {"share": 0.1}}}, schema_of("stage2", capsys))
