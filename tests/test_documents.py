"""Every command in the documents is one that graft's recipes, Ray's and Serve's command lines and the Makefile take."""

import importlib
import re
import shlex
from collections.abc import Iterator

import pytest

from jobs import COMMANDS
from tests.support.paths import ROOT

DOCUMENTS = [
    "README.md",
    "cluster/README.md",
    "docs/BENCHMARKS.md",
    "graft/pretrained/small/README.md",
    "CONTRIBUTING.md",
]
PAGES = [*DOCUMENTS, "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md"]
ELSEWHERE = {"docker", "kubectl", "helm", "curl", ".", "export", "apt", "pip"}
"""Commands of other projects; of their arguments, only the files of this repository are checked."""


def commands(document: str) -> Iterator[str]:
    """Commands in fenced shell blocks, with their lines joined, in indented lines, and benchmarks in a sentence."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    graft = f"graft (?:{'|'.join(command for group in COMMANDS.values() for command in group)})"
    indented = re.findall(rf"^    (?:make|{graft}|python -m|ray|serve|kubectl|docker) .+$", text, re.MULTILINE)
    measured = re.findall(r"`((?:python -m jobs\.|graft )bench [^`]+)`", text)
    for line in "\n".join([*blocks, *indented, *measured]).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


ALL = [
    pytest.param(command, id=f"{document}: {command:.60}")
    for document in DOCUMENTS
    for command in dict.fromkeys(commands(document))
]


@pytest.mark.parametrize("command", ALL)
def test_commands_are_understood(command: str) -> None:
    words = [word for word in shlex.split(command) if word]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for name in files_named(words):
        assert (ROOT / name).exists(), f"{name} does not exist"
    check(words)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Each relative link names a file or folder, and each anchor a heading of its page."""
    text = (ROOT / page).read_text()
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)
    for target in targets:
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), f"{page}: {target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {linked.name} has no heading {anchor}"


def files_named(words: list[str]) -> Iterator[str]:
    for word in words:
        for part in re.split(r"[=@]", word):
            if re.fullmatch(r"(?:cluster|jobs/recipes|serve|tests)/[\w./-]+", part):
                yield part


def check(words: list[str]) -> None:
    """Raise what a tool would say of a command."""
    match words:
        case ["python", "-m", "jobs.submit", *arguments] | ["graft", "submit", *arguments]:
            from jobs.submit import _parser

            options = _parser().parse_args(arguments)
            check_job(options.command, options.arguments)
        case ["python", "-m", "jobs"] | ["graft"] | ["graft", "--version"]:
            return
        case ["graft", verb, *arguments]:
            check_job(verb, arguments)
        case ["python", "-m", module, *arguments] if module.startswith("jobs."):
            check_job(module.removeprefix("jobs."), arguments)
        case ["ray", *arguments]:
            check_ray(arguments)
        case ["serve", command, *arguments]:
            check_serve(command, arguments)
        case ["make", *targets]:
            known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            assert set(targets) <= known
        case [tool, *_]:
            assert tool in ELSEWHERE, f"nobody checks {tool}"


def check_job(verb: str, arguments: list[str]) -> None:
    from graft.config import Recipe, read_recipe
    from jobs.common.cli import PlanOptions, _plan_options, _read_arguments, _requiring_model_only, find_recipe

    job = importlib.import_module(f"jobs.{verb}" if verb != "serve" else "serve.command")
    if verb == "bench":
        job._parser().parse_args(arguments)
        return
    if verb == "demo" and not arguments:
        return
    command = job.run
    recipe_class = command.__annotations__["recipe"]
    assert issubclass(recipe_class, Recipe)
    plans = hasattr(job, "plan")
    words = job.main.keywords.get("words") if verb != "serve" else None
    options, overrides = _read_arguments(recipe_class, "", arguments, plans=plans, words=words)
    recipe = options.recipe
    if recipe and not (ROOT / recipe).is_file():
        recipe = find_recipe(recipe, recipe_class, verb)
    if plans and options.plan:
        assert isinstance(_plan_options(options), PlanOptions)
        recipe_class = _requiring_model_only(recipe_class)
    read_recipe(recipe_class, recipe and str(ROOT / recipe), overrides)


def check_ray(arguments: list[str]) -> None:
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


def check_serve(command: str, arguments: list[str]) -> None:
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
