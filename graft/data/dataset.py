"""Read and write speech corpora: parquet files of whole, undecoded audio files with their transcripts.

Planning reads the metadata columns of all files (RowTable); training and evaluation fetch the audio of single rows
(RowReader). Files are read where they are stored, by default in SpeechBrain's LargeScaleASR schema, in which they are
also written. Source: https://huggingface.co/datasets/speechbrain/LoquaciousSet
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from graft.audio.clip import AudioClip, encode_flac
from graft.data.columns import cached_metadata, read_audio_column, read_metadata, read_texts
from graft.data.settings import Columns, Source, Sources
from graft.errors import DataError
from graft.storage.atomic import atomic_file
from graft.storage.locations import StoredFile, list_parquet_files, open_parquet, redact_uri, retry_read
from graft.storage.mapped_strings import MappedStrings
from graft.text.languages import language_code

T = TypeVar("T")

SCHEMA = pa.schema(
    [
        ("ID", pa.string()),
        ("duration", pa.float32()),  # seconds
        ("wav", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("spk_id", pa.string()),
        ("sex", pa.string()),
        ("text", pa.string()),
    ]
)
PLANNING_THREADS = 32  # The threads mostly wait for a network.
TAKEN_TOGETHER = 2**18
_NUMBERS = ("duration_s", "language", "source", "file", "row_group", "row", "group_bytes")


@dataclass(frozen=True)
class CorpusFile:
    """A parquet file, and the column of its audio."""

    uri: str
    audio: str = "wav"


@dataclass(frozen=True, eq=False)
class RowTable:
    """The rows of a corpus without their audio, in the order of the sources and of their files: columns (rows,).

    No row has a Python object of its own, and the strings of a large corpus lie in a mapped file. Pickled with protocol
    5, the table is read from shared memory without a copy.
    """

    ids: pa.LargeStringArray
    texts: pa.LargeStringArray  # "" where the corpus has none
    duration_s: np.ndarray  # float64; NaN where it is not known
    language: np.ndarray  # int16, index into languages
    source: np.ndarray  # int16, index into weights
    file: np.ndarray  # int32, index into files
    row_group: np.ndarray  # int32, within the file
    row: np.ndarray  # int32, within the row group
    group_bytes: np.ndarray  # float32, stored bytes of the audio of the row's whole row group
    files: list[CorpusFile]
    weights: list[float]  # of each source
    languages: list[str]  # codes (ISO 639-1), and "" where the language is not known

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, row: int) -> str:
        """Return the name of a row."""
        return str(self.ids[int(row)])

    def text(self, row: int) -> str:
        """Return the transcript of a row, "" where it has none."""
        return str(self.texts[int(row)])

    def language_of(self, row: int) -> str | None:
        """Return the language of a row, None where it is not known."""
        return self.languages[int(self.language[int(row)])] or None

    def without_languages(self) -> "RowTable":
        """Return the rows as if their languages were not known."""
        return replace(self, language=np.zeros(len(self), np.int16), languages=[""])

    def select(self, rows: np.ndarray) -> "RowTable":
        """Take the rows at these indices, in their order, or those where a mask is true."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        strings = {name: _taken(getattr(self, name), rows) for name in ("ids", "texts")}
        return replace(self, **strings, **{name: getattr(self, name)[rows] for name in _NUMBERS})


def read_rows(
    sources: Sources, *, cache: str | os.PathLike[str] | None = None, language: str | None = None
) -> RowTable:
    """Read the metadata columns of a corpus; plain paths among the sources make up one source together.

    The files of a source are sorted by URI. In the folder `cache`, the metadata of a file is kept for as long as the
    file stays the same. `language` is that of the rows of which the data names none. Raises DataError when nothing is
    found, a file is not parquet, lacks a column or stands in two sources, all files are empty, a language is unknown,
    or a row has no ID. A row without text or with an odd duration is kept.
    """
    kinds = _long_form(sources)
    files = [[one.files] if isinstance(one.files, str) else one.files for one in kinds]
    listed = [(index, file) for index, locations in enumerate(files) for file in list_parquet_files(locations)]
    if twice := [uri for uri, count in Counter(file.uri for _, file in listed).items() if count > 1]:
        raise DataError(
            f"corpus {redact_uri(twice[0])}: stands in two sources: give it once, with the weight that it should have"
        )
    folder = Path(cache) if cache else None
    strings = {"id": MappedStrings(), "text": MappedStrings()}
    parts = []
    with ThreadPoolExecutor(PLANNING_THREADS) as pool:
        for part in pool.map(lambda entry: _read_metadata(entry[1], kinds[entry[0]].columns, folder), listed):
            for name, column in strings.items():
                column.add(part[name])
            parts.append(part.drop_columns(list(strings)))
            del part
    sizes = [len(part) for part in parts]
    if not any(sizes):
        raise DataError(f"corpus {redact_uri(listed[0][1].uri)}: no rows in {len(listed)} files")
    source = np.repeat([index for index, _ in listed], sizes).astype(np.int16)
    table = pa.concat_tables(parts)
    ids, texts = strings["id"].array(), strings["text"].array()
    for index, kind in enumerate(kinds):
        if kind.texts is not None:
            texts = _replace_texts(texts, ids, source == index, kind.texts)
    defaults = [language_code(code) if (code := kind.language or language) else "" for kind in kinds]
    languages, codes = _language_indices(table["language"], source, defaults)
    return RowTable(
        ids=ids,
        texts=texts,
        duration_s=table["duration_s"].to_numpy(),
        language=codes,
        languages=languages,
        source=source,
        file=np.repeat(np.arange(len(parts), dtype=np.int32), sizes),
        row_group=table["row_group"].to_numpy(),
        row=table["row"].to_numpy(),
        group_bytes=table["group_bytes"].to_numpy(),
        files=[CorpusFile(file.uri, kinds[index].columns.audio) for index, file in listed],
        weights=[kind.weight for kind in kinds],
    )


class FooterCache:
    """Keeps the footers of the files that were asked for last."""

    def __init__(self, files: Sequence[CorpusFile], *, most: int) -> None:
        self.files = files
        self.get = functools.lru_cache(maxsize=most)(self._read)

    def _read(self, file: int) -> pq.FileMetaData:
        return read_parquet(self.files[file].uri, lambda parquet: parquet.metadata)


class RowReader:
    """Fetches the audio of single rows by RowTable's (file, row_group, row); keeps the row groups read last.

    Use one for each process.
    """

    def __init__(self, files: Sequence[CorpusFile], cache_row_groups: int = 4) -> None:
        self.files = list(files)
        self._audio = functools.lru_cache(maxsize=cache_row_groups)(self._read_audio)
        self._footers = FooterCache(self.files, most=4 * cache_row_groups)

    def wav(self, file: int, row_group: int, row: int) -> tuple[bytes, str]:
        """Return the bytes of an audio file, and its name.

        Raises DataError when the file is gone or the row holds no audio.
        """
        return audio_file(self._audio(int(file), int(row_group)), int(row), self.files[file], int(row_group))

    def _read_audio(self, file: int, row_group: int) -> pa.Table:
        opened, footer = self.files[file], self._footers.get(file)
        return read_parquet(
            opened.uri, lambda parquet: read_audio_column(parquet, opened.audio, [row_group])[0], footer=footer
        )


def audio_file(audio: pa.Table, row: int, file: CorpusFile, row_group: int, *, first: int = 0) -> tuple[bytes, str]:
    """Return the bytes and the name of an audio file of a row group, whose rows from `first` on were read.

    Raises DataError where the row holds no audio.
    """
    content = audio["content"][row - first].as_py()
    if content is None:
        raise DataError(f"corpus {redact_uri(file.uri)}: row {row} of row group {row_group} holds no audio bytes")
    name = audio["name"][row - first].as_buffer() if "name" in audio.column_names else None
    return content, name.to_pybytes().decode(errors="replace") if name else ""


def read_parquet(uri: str, read: Callable[[pq.ParquetFile], T], *, footer: pq.FileMetaData | None = None) -> T:
    """Open a parquet file and read from it; faults that may pass are retried. Raises DataError."""

    def attempt() -> T:
        with open_parquet(uri, footer) as parquet:
            return read(parquet)

    return retry_read(uri, attempt)


def write_corpus(
    rows: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    rows_per_group: int = 100,
    has_languages: bool = False,
) -> int:
    """Write rows (dicts with exactly SCHEMA's keys) as one whole local parquet file; returns their number.

    With `has_languages` they have the key `language`, too, which may be None. Equal rows give equal bytes. Raises
    DataError for no rows, other keys or values of another type.
    """
    count, waiting = 0, iter(rows)
    schema = SCHEMA.append(pa.field("language", pa.string())) if has_languages else SCHEMA
    with atomic_file(path) as temporary:
        # Audio is compressed already and never repeats, so it gets no dictionary.
        repeated = [name for name in ("spk_id", "sex", "language") if name in schema.names]
        with pq.ParquetWriter(temporary, schema, use_dictionary=repeated, write_statistics=["duration"]) as writer:
            while group := list(itertools.islice(waiting, rows_per_group)):
                writer.write_table(_group_table(group, schema), row_group_size=rows_per_group)
                count += len(group)
        if not count:
            raise DataError(f"corpus {path}: no rows to write")
    return count


def clip_row(name: str, clip: AudioClip, text: str) -> dict[str, Any]:
    """Make a row for write_corpus of a clip that was not read from a file."""
    wav = {"bytes": encode_flac(clip), "path": f"{name}.flac"}
    return {"ID": name, "duration": clip.duration_s, "wav": wav, "spk_id": "", "sex": "", "text": text}


def _group_table(group: list[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    for row in group:
        if row.keys() != set(schema.names):
            raise DataError(f"corpus row {row.get('ID')!r} has keys {sorted(row)}, wants {sorted(schema.names)}")
    try:
        return pa.Table.from_pylist(group, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"corpus rows {group[0]['ID']!r} to {group[-1]['ID']!r}: {error}") from error


def _taken(strings: Any, rows: np.ndarray) -> pa.LargeStringArray:
    """Take the strings of rows (rows,), in a mapped file where they are many."""
    taken = MappedStrings()
    for start in range(0, len(rows), TAKEN_TOGETHER):
        taken.add(strings.take(pa.array(rows[start : start + TAKEN_TOGETHER])))
    return taken.array()


def _language_indices(
    written: pa.ChunkedArray, source: np.ndarray, defaults: list[str]
) -> tuple[list[str], np.ndarray]:
    """Return codes of languages, and the index of each row's among them; `defaults` are those of the sources."""
    encoded: Any = pa.concat_arrays(written.unify_dictionaries().chunks)
    named = [language_code(name) if name.strip() else "" for name in encoded.dictionary.to_pylist()]
    languages = list(dict.fromkeys(["", *defaults, *named]))
    of_source = np.array([languages.index(code) for code in defaults], np.int16)[source]
    of_name = np.array([languages.index(code) for code in [*named, ""]], np.int16)
    indices = of_name[encoded.indices.fill_null(len(named)).to_numpy(zero_copy_only=False)]
    return languages, np.where(indices == 0, of_source, indices).astype(np.int16)


def _long_form(sources: Sources) -> list[Source]:
    """Write every source in the long form; the plain paths become one source, at the position of the first of them."""
    given = [sources] if isinstance(sources, str | Source) else list(sources)
    paths = [source for source in given if isinstance(source, str)]
    if not given:
        raise DataError("corpus: no source is given: name parquet files, folders or globs")
    found: dict[int | None, Source] = {}  # by index; all paths share the key None
    for index, source in enumerate(given):
        found |= {index: source} if isinstance(source, Source) else {None: Source(files=paths)}
    return list(found.values())


def _read_metadata(file: StoredFile, columns: Columns, cache: Path | None) -> pa.Table:
    def read() -> pa.Table:
        return read_parquet(file.uri, lambda parquet: read_metadata(parquet, columns, name=redact_uri(file.uri)))

    key = f"{file.uri} {file.version} {columns.model_dump_json()}"
    return cached_metadata(cache, key, read) if cache and file.version else read()


def _replace_texts(texts: pa.Array, ids: pa.Array, rows: np.ndarray, location: str) -> pa.LargeStringArray:
    """Replace the texts of rows, given as a mask, by a parquet file's texts of their ids, "" where it has none."""

    def read(file: StoredFile) -> pa.Table:
        return read_parquet(file.uri, lambda parquet: read_texts(parquet, name=redact_uri(file.uri)))

    with ThreadPoolExecutor(PLANNING_THREADS) as pool:
        parts = list(pool.map(read, list_parquet_files([location])))
    given, mask = pa.concat_tables(parts), pa.array(rows)
    found = pc.if_else(mask, pc.index_in(ids, given["ID"]), None)
    if found.null_count == len(ids):
        raise DataError(f"texts {redact_uri(location)}: holds none of the corpus's IDs")
    return pc.if_else(mask, given["text"].combine_chunks().take(found).fill_null(""), texts)
