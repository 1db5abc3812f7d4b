"""What the pages say exists: links, commands, files, keys, status codes, metrics, fields and columns."""

import importlib
import inspect
import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tests.support.documents import PAGES, Page, codes, shown_recipe
from tests.support.paths import ROOT

ELSEWHERE = {"eval", "docker", "kubectl", "helm", "curl", ".", "cd", "git", "export", "apt", "pip", "ssh"}
"""Commands of other projects; of their arguments, only the files of this repository are checked."""
SERVICE, ARCHIVES = Page("serve/README.md"), Page("jobs/ARCHIVES.md")
COMMANDS = [pytest.param(command, id=f"{page.name}: {command:.60}") for page in PAGES for command in page.commands()]
ENGLISH = re.compile(r"\b[A-Za-z]+(?:_[A-Za-z0-9]+)+\b")
"""A name of code: a word with an underscore."""
OF_OTHERS = re.compile(r"(?:AWS|CUDA|HF|NCCL|PIP|RAY)_\w+|api_base|api_key|base_url|session_latest|vad_filter")
"""Names of other projects."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links():
        path, _, anchor = link.partition("#")
        target = (ROOT / page.name).parent / path if path else ROOT / page.name
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            found = Page(target.resolve().relative_to(ROOT).as_posix())
            assert anchor in found.anchors, f"{link}: {found.name} has {', '.join(sorted(found.anchors))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_are_whole(page: Page) -> None:
    assert "```" not in page.prose
    assert "<!--" not in page.prose
    for text in page.blocks("yaml"):
        yaml.safe_load(inspect.cleandoc(text))
    for text in page.blocks("python"):
        compile(text, page.name, "exec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes that commands name: those of the repository, and one that a page shows."""
    home = tmp_path_factory.mktemp("commands")
    for name in ("cluster", "jobs", "serve"):
        (home / name).symlink_to(ROOT / name)
    (home / "my-data.yaml").write_text(shown_recipe())
    return home


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # The files that a command reads exist where it is executed: see test_documents_run.py.
    monkeypatch.setattr("jobs.common.cli.check_inputs", lambda recipe: None)
    words = [word for word in shlex.split(command) if word]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for name in files_named(words):
        assert (ROOT / name).exists(), f"{name} does not exist"
    check(words)


def files_named(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        for part in re.split(r"[=@]", word):
            if re.fullmatch(r"(?:cluster|jobs/recipes|serve|tests|docs)/[\w./-]+", part):
                yield part


def check(words: list[str]) -> None:
    """Raise what a tool would say of a command."""
    match words:
        case ["graft" | "python", *_] if (command := graft_command(words)) is not None:
            check_graft(command)
        case ["ray", *arguments]:
            check_ray(arguments)
        case ["serve", command, *arguments]:
            check_serve(command, arguments)
        case ["make", *targets]:
            known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert {target for target in targets if "=" not in target} <= known
        case [tool, *_]:
            assert tool in ELSEWHERE, f"nobody checks {tool}"


def graft_command(words: list[str]) -> list[str] | None:
    """Return the arguments of the command `graft`, however it is called; None for another command."""
    match words:
        case ["graft", *arguments]:
            return arguments
        case ["python", "-m", "jobs", *arguments]:
            return arguments
        case ["python", "-m", module, *arguments] if module.startswith("jobs."):
            return [module.removeprefix("jobs."), *arguments]
    return None


def check_graft(words: list[str]) -> None:
    if not words or words[0] == "--version" or words[-1] == "--help":
        return
    verb, *arguments = words
    if verb == "submit":
        options = importlib.import_module("jobs.submit")._parser().parse_args(arguments)
        check_graft([options.command, *options.arguments])
    elif verb in ("bench", "schema"):
        importlib.import_module(f"jobs.{verb}")._parser().parse_args(arguments)
    else:
        assert parsed(verb, arguments) == 0


def parsed(verb: str, arguments: Sequence[str]) -> int:
    """Run a command that does nothing but read its arguments; returns its exit code."""
    from jobs.common.cli import run_job

    if verb == "serve":
        from serve.command import ServeRecipe

        return run_job(ServeRecipe, lambda recipe: None, summary=None, argv=arguments, command=verb)
    command = importlib.import_module(f"jobs.{verb}").main
    known = {**command.keywords, "argv": arguments, "command": verb}
    if "plan" in known:
        known["plan"] = lambda recipe, options: None
    return run_job(command.args[0], lambda recipe: None, **known)


def check_ray(arguments: Sequence[str]) -> None:
    from ray.scripts.scripts import cli

    group = cli
    while arguments[0] in getattr(group, "commands", {}):
        group, arguments = group.commands[arguments[0]], arguments[1:]
        if not hasattr(group, "commands"):
            break
    assert not hasattr(group, "commands"), f"ray has no {arguments}"
    context = group.make_context("ray", list(arguments))  # parses, and raises what it does not know
    if entrypoint := context.params.get("entrypoint"):
        check(list(entrypoint))


def check_serve(command: str, arguments: Sequence[str]) -> None:
    from ray.serve.scripts import cli

    from serve.config import ServeArgs

    context = cli.commands[command].make_context(command, list(arguments))
    target = context.params.get("config_or_import_path") or context.params["config_file_name"]
    if target.endswith(".yaml"):
        assert (ROOT / target).is_file()
        return
    module, _, builder = target.partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    ServeArgs.model_validate(dict(word.split("=", 1) for word in context.params["arguments"]))


# Names


@pytest.fixture(scope="module")
def names() -> set[str]:
    """All words with an underscore in the code, its recipes and manifests."""
    folders = ("graft", "jobs", "serve", "cluster")
    kinds = {".py", ".yaml", ".json"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    files += [ROOT / name for name in ("pyproject.toml", "Makefile", "compose.yaml", "cluster/Dockerfile")]
    found = {name for path in files for name in ENGLISH.findall(path.read_text(encoding="utf-8"))}
    return found | {path.stem for path in (ROOT / "tests").rglob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_are_those_of_the_code(page: Page, names: set[str]) -> None:
    mentioned = {name for code in page.code() if not (ROOT / code).exists() for name in ENGLISH.findall(code)}
    assert not {name for name in mentioned - names if not OF_OTHERS.fullmatch(name)}


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """The keys of all recipes and of the service, those of groups with dots."""
    from jobs import COMMANDS
    from jobs.common.cli import PlanOptions
    from serve.command import ServeRecipe
    from serve.http.schema import LISTS, TranscriptionRequest

    verbs = [verb for group in COMMANDS.values() for verb in group]
    mains = [getattr(importlib.import_module(f"jobs.{verb}"), "main", None) for verb in verbs if verb != "serve"]
    recipes = [main.args[0] for main in mains if getattr(main, "args", None)]
    found = {key for recipe in (*recipes, PlanOptions, ServeRecipe, TranscriptionRequest) for key in keys_of(recipe)}
    return found | {f"{name}[]" for name in LISTS}  # as they are called in forms


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for inner in models_in(field.annotation):
            yield from keys_of(inner)  # also as a key of its own: in YAML it stands below its group
            yield from (f"{name}.{key}" for key in keys_of(inner))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name.startswith(("jobs/", "serve/"))], ids=lambda page: page.name
)
def test_keys_are_those_of_the_commands(page: Page, keys: set[str]) -> None:
    given = {key for code in page.code() for key in re.findall(r"(?:^|\s)([a-z][\w.]*(?:\[\])?)=", code)}
    assert given - {"key", "group.key"} <= keys
    dotted = {code for code in page.code() if re.fullmatch(r"[a-z_]+\.[a-z_]+", code) and not (ROOT / code).exists()}
    files = re.compile(r".+\.(?:json|jsonl|yaml|txt|png|parquet|safetensors|md|mp3|html|errors)")
    assert {code for code in dotted if not files.fullmatch(code)} - {"audio.bytes"} <= keys


def test_every_recipe_has_its_line() -> None:
    rows = Page("jobs/README.md").table("## Recipes", column="recipes")
    told = [name for row in rows for name in codes(row["recipes"])]
    assert sorted(told) == sorted(path.stem for path in (ROOT / "jobs" / "recipes").iterdir())


@pytest.mark.slow
def test_recipes_take_the_memory_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for row in Page("jobs/README.md").table("## Recipes", column="recipes"):
        if row["GB"]:
            build, *stages = codes(row["recipes"])
            for stage in stages:
                command = importlib.import_module(f"jobs.{stage.rpartition('-')[2]}")
                arguments = ["--recipe", stage, f"model={build.removesuffix('-build')}", "workers=8", "--plan"]
                assert command.main(argv=arguments) == 0
            found = re.findall(r"([\d.]+)  <- this recipe$", capsys.readouterr().out, re.MULTILINE)
            assert round(max(map(float, found))) == int(row["GB"])


# The service


def test_the_table_of_status_codes_is_complete() -> None:
    from serve.http.errors import ERROR_RESPONSES
    from serve.http.middleware import CLIENT_CLOSED_REQUEST
    from serve.http.proxy_middleware import CUT_OFF, ERRORS_BY_STATUS

    rows = SERVICE.table("## Status codes", column="status")
    of_starlette = {405}
    assert {int(row["status"]) for row in rows} == {
        *map(int, ERROR_RESPONSES),
        *ERRORS_BY_STATUS,
        CLIENT_CLOSED_REQUEST,
        *of_starlette,
    }
    sources = [path.read_text() for path in (ROOT / "serve" / "http").glob("*.py")]
    in_code = {code for source in sources for code in re.findall(r"\bcode=\"(\w+)\"", source)}
    in_code |= {"unsupported_parameter", "unsupported_value", "missing_required_parameter"}  # chosen by variables
    assert {code for row in rows for code in codes(row["`code`"])} == in_code >= {CUT_OFF.code}


def test_the_table_of_metrics_is_complete() -> None:
    from ray.serve.metrics import Counter, Gauge, Histogram

    from serve import metrics

    source = inspect.getsource(metrics)
    kinds = {kind.__name__: kind.__name__.lower() for kind in (Counter, Gauge, Histogram)}
    defined = re.findall(rf"\b({'|'.join(kinds)})\(\s*\"(graft_\w+)\"", source)
    rows = SERVICE.table("## Metrics", column="kind")
    assert {(codes(row["name"])[0], row["kind"]) for row in rows} == {(name, kinds[kind]) for kind, name in defined}
    for row in rows:
        definition = source.partition(f'"{codes(row["name"])[0]}"')[2].partition("self._")[0]
        assert all(f'"{label}"' in definition for label in codes(row["labels"]))


def test_the_table_of_form_fields_is_complete() -> None:
    from serve.http.schema import request_body_schema

    fields = request_body_schema()["content"]["multipart/form-data"]["schema"]["properties"]
    assert sorted(codes(row["field"])[0] for row in SERVICE.table("## Ask it", column="field")) == sorted(fields)


def test_the_table_of_limits_names_the_defaults() -> None:
    from serve.config import ServeArgs
    from serve.http.api import MAX_UPLOAD_S
    from serve.http.uploads import PATIENCE_S

    rows = {row["argument"].strip("`"): row for row in SERVICE.table("## Limits", column="argument")}
    args = ServeArgs(model="small")
    assert rows["max_upload_bytes"]["default"] == f"{args.max_upload_bytes // 10**6} MB"
    assert (rows["decode.max_duration_s"]["default"], args.decode.max_duration_s) == ("one hour", 3600)
    assert (rows["max_queued_s"]["default"], args.max_queued_s) == ("two hours", 7200)
    assert rows["decode.memory_bytes"]["default"] == f"{args.decode.memory_bytes // 2**30} GiB"
    assert rows["decode.timeout_s"]["default"] == f"{args.decode.timeout_s:g} s"
    assert rows["max_ongoing_requests"]["default"] == str(args.max_ongoing_requests)
    assert rows["fixed"]["default"] == f"{MAX_UPLOAD_S:g} s"
    assert rows["min_upload_bytes_per_s"]["default"] == f"{args.min_upload_bytes_per_s:,.0f} bytes a second"
    assert f"pauses of up to {PATIENCE_S:g} s" in rows["min_upload_bytes_per_s"]["limit"]
    config = yaml.safe_load((ROOT / "serve" / "serve.yaml").read_text())
    (timeout,) = (row for argument, row in rows.items() if argument.startswith("request_timeout_s"))
    assert timeout["default"] == f"{args.request_timeout_s:g} s"
    assert config["http_options"]["request_timeout_s"] > args.request_timeout_s  # the API answers, not the proxy


# The archive


def test_the_table_of_columns_is_complete() -> None:
    from jobs.transcription.assembly import TRANSCRIPTS

    rows = ARCHIVES.table("## What the folder holds", column="column")
    assert [codes(row["column"])[0] for row in rows] == TRANSCRIPTS.names


def test_the_table_of_flags_is_complete() -> None:
    from graft.inference import hallucination as checks

    flags = {checks.REPETITION, checks.NO_SPEECH, checks.LOW_CONFIDENCE, checks.TRUNCATED}
    assert {codes(row["flag"])[0] for row in ARCHIVES.table("### Suspicious text", column="flag")} == flags


def test_the_table_of_formats_is_complete() -> None:
    from graft.inference.subtitles import FORMATS

    rows = ARCHIVES.table("### Formats", column="format")
    assert sorted(code for row in rows for code in codes(row["format"])) == sorted(FORMATS)


def test_the_errors_are_those_of_the_library() -> None:
    from graft import errors

    rows = Page("graft/README.md").table("## Errors", column="raised for")
    told = {code for row in rows for code in codes(row["class, in `graft.errors`"])}
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert told == classes - {"GraftError"}


def test_the_fields_of_a_manifest_are_those_that_are_read() -> None:
    from jobs.preparation.manifests import FIELD_NAMES

    rows = Page("jobs/README.md").table("### Manifests", column="field")
    told = {name: {name, *codes(row["also called"])} for row in rows for name in codes(row["field"])}
    for name, others in FIELD_NAMES.items():
        assert set(others) <= told.pop(name)
    assert not told


def test_readme_comes_to_the_point() -> None:
    """It has at most 150 lines, and the first command stands in its first 200 words."""
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    assert len(text[: text.index("graft transcribe")].split()) <= 200


def test_page_of_the_repository_is_in_the_list() -> None:
    names = {page.name for page in PAGES}
    assert {"README.md", "jobs/README.md", "jobs/ARCHIVES.md", "serve/README.md", "graft/README.md"} <= names
    assert all(Path(ROOT, name).is_file() for name in names)
