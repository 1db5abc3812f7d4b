"""Write an evaluation as STM, SegLST and a NeMo manifest, which other tools open.

reference.stm, SYSTEM.stm                   NIST's segments: sclite, meeteval and meeteval-viz
reference.seglst.json, SYSTEM.seglst.json   SegLST of CHiME: meeteval
manifest.jsonl                              NeMo: `nemo` Speech Data Explorer, with pred_text of the first system
                                            and pred_text_SYSTEM of each
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.storage.atomic import write_atomic

from .clips import ClipRow

UNKNOWN_SPEAKER = "unknown"
REFERENCE = "reference"


def write_exports(
    rows: Sequence[ClipRow], systems: Sequence[str], folder: Path, audio: Mapping[Any, str]
) -> list[Path]:
    """Write all files; `audio` names the files of clips by (set, id), where there are any. Returns their paths."""
    ids = {row.key: _session(row, rows) for row in rows}
    names = _file_names(systems)
    texts: dict[str, list[tuple[ClipRow, str]]] = {REFERENCE: [(row, row.known.reference or "") for row in rows]}
    texts |= {
        names[system]: [(row, row.answers[system].text or "") for row in rows if system in row.answers]
        for system in systems
    }
    written = {f"{name}.stm": _stm(lines, ids) for name, lines in texts.items()}
    written |= {f"{name}.seglst.json": _seglst(lines, ids) for name, lines in texts.items()}
    written["manifest.jsonl"] = _manifest(rows, systems, ids, audio)
    for name, content in written.items():
        write_atomic(folder / name, content)
    return [folder / name for name in written]


def _session(row: ClipRow, rows: Sequence[ClipRow]) -> str:
    """Name a clip: by its id, with its set where there are several."""
    is_one_set = row.set_name == rows[0].set_name == rows[-1].set_name
    return row.known.id if is_one_set else f"{row.set_name}/{row.known.id}"


def _file_names(systems: Sequence[str]) -> dict[str, str]:
    """Name a system's files after it, by letters that any file system takes; equal names are numbered."""
    names: dict[str, str] = {}
    for system in systems:
        stem = re.sub(r"[^\w.+-]+", "-", system).strip(".-") or "system"
        taken = {REFERENCE, *names.values()}
        name = next(
            one for number in range(len(systems) + 2) if (one := f"{stem}-{number}" if number else stem) not in taken
        )
        names[system] = name
    return names


def _stm(lines: Sequence[tuple[ClipRow, str]], ids: Mapping[Any, str]) -> str:
    written = []
    for row, text in lines:
        recording, speaker = _word(ids[row.key]), _word(row.known.speaker or UNKNOWN_SPEAKER)
        segment = f"{recording} 1 {speaker} 0.00 {row.known.duration_s or 0:.2f} {' '.join(text.split())}"
        written.append(segment.rstrip() + "\n")
    return "".join(written)


def _word(text: str) -> str:
    """Write a name without spaces, which end a field of STM; a leading ; would begin a comment."""
    return re.sub(r"\s+", "_", text.strip()).replace(";", "_") or "_"


def _seglst(lines: Sequence[tuple[ClipRow, str]], ids: Mapping[Any, str]) -> str:
    segments = [
        {
            "session_id": ids[row.key],
            "start_time": 0.0,
            "end_time": row.known.duration_s or 0.0,
            "speaker": row.known.speaker or UNKNOWN_SPEAKER,
            "words": " ".join(text.split()),
        }
        for row, text in lines
    ]
    return json.dumps(segments, indent=1, ensure_ascii=False) + "\n"


def _manifest(rows: Sequence[ClipRow], systems: Sequence[str], ids: Mapping[Any, str], audio: Mapping[Any, str]) -> str:
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            "audio_filepath": audio.get(row.key, ids[row.key]),
            "duration": row.known.duration_s or 0.0,
            "text": row.known.reference or "",
        }
        texts = {system: row.answers[system].text or "" for system in systems if system in row.answers}
        line |= {"pred_text": texts.get(systems[0], "")} if systems else {}
        line |= {f"pred_text_{system}": text for system, text in texts.items()}
        known = {"id": row.known.id, "set": row.set_name, "speaker": row.known.speaker, "lang": row.known.language}
        lines.append(line | {key: value for key, value in known.items() if value})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
