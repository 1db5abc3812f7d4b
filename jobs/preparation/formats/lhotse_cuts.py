"""Take the clips out of lhotse's cuts: one for each supervision, by the fields of manifests.

Only files and URLs are read: a source of type `command` is never run. Source: https://lhotse.readthedocs.io/en/latest/cuts.html
"""

from collections.abc import Iterator, Mapping
from typing import Any

from .records import BadRecord, Record

CUT_TYPES = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut", "Cut", "DataCut")
TOLERANCE_S = 0.1
"""Largest time by which a supervision may go beyond its cut, whose times are rounded."""
KEEPS_TIMES = ("Resample", "Volume", "DereverbWPE", "LoudnessNormalization", "AudioLoudnessNormalization")
"""Transforms after which a second of a recording is the same one; they are not applied."""
SHAR = "shar"
"""Type of a recording that lies in a tar file beside its cuts; the field `shar` of its record names the cut."""


class _UnusableError(Exception):
    """A cut that is no clip."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def is_lhotse(values: Mapping[str, Any]) -> bool:
    """Tell whether an object is a cut of lhotse, or one of its recordings or supervisions."""
    if values.get("type") in CUT_TYPES:
        return True
    is_cut = isinstance(values.get("recording"), dict) and isinstance(values.get("supervisions"), list)
    is_recording = isinstance(values.get("sources"), list) and "sampling_rate" in values
    return is_cut or is_recording or {"id", "recording_id", "start", "duration"} <= values.keys()


def read_cut(values: Mapping[str, Any], number: int) -> Iterator[Record | BadRecord]:
    """Yield the clips of a cut: one for each supervision, or for a cut that has none one without text."""
    name = values.get("id") if isinstance(values.get("id"), str) else None
    try:
        cut = _single_cut(values)
        audio = _audio_fields(cut)
        supervisions = cut.get("supervisions") or [{}]
        for supervision in supervisions:
            clip = name if len(supervisions) == 1 else supervision.get("id")
            try:
                times = _times(cut, supervision)
            except _UnusableError as fault:
                yield BadRecord(number, fault.reason, fault.detail, clip)
                continue
            custom = {**_scalars(cut.get("custom")), **_scalars(supervision.get("custom"))}
            fields = {key: supervision.get(key) for key in ("text", "speaker", "language")}
            yield Record(number, {**custom, **fields, "sex": supervision.get("gender"), "id": clip, **audio, **times})
    except _UnusableError as fault:
        yield BadRecord(number, fault.reason, fault.detail, name)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        yield BadRecord(number, "no cut", f"{type(error).__name__}: {error}", id=name)


def _single_cut(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the cut whose audio is that of a file, without what pads it."""
    kind = values.get("type")
    if "tracks" in values:
        tracks = [track["cut"] for track in values["tracks"] if track["cut"].get("type") != "PaddingCut"]
        if len(tracks) != 1 or values.get("transforms"):
            raise _UnusableError(
                "mixed cut", f"it is made of {len(tracks)} cuts: save its audio with lhotse's save_audios"
            )
        return _single_cut(tracks[0])
    if kind == "PaddingCut":
        raise _UnusableError("no audio", "it is a cut of silence")
    if "sources" in values:
        raise _UnusableError("no cut", "it is a recording, which has no text: join it with its supervisions to cuts")
    if "recording_id" in values:
        raise _UnusableError("no cut", "it is a supervision, which has no audio: join it with its recording to a cut")
    return values


def _audio_fields(cut: Mapping[str, Any]) -> dict[str, str]:
    """Return the field that names a cut's audio."""
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise _UnusableError("no audio", "the cut has features, and no recording")
    transforms = [str(one.get("name", one)) for one in recording.get("transforms") or []]
    if changed := [name for name in transforms if name not in KEEPS_TIMES]:
        raise _UnusableError(
            "transformed audio", f"{', '.join(changed)} changes the recording: save the audio with lhotse"
        )
    channel = cut.get("channel", 0)
    wanted = set(channel if isinstance(channel, list) else [channel])
    sources = [source for source in recording["sources"] if wanted & set(source["channels"])]
    if len(sources) != 1 or set(sources[0]["channels"]) != wanted:
        raise _UnusableError(
            "channel of several",
            f"it takes the channels {sorted(wanted)} of {len(recording['sources'])} files with the channels "
            f"{[source['channels'] for source in recording['sources']]}: write each channel to a file",
        )
    (source,) = sources
    if source["type"] == SHAR:
        return {SHAR: str(cut["id"])}
    if source["type"] not in ("file", "url"):
        raise _UnusableError("no audio file", f"its source is of type {source['type']}, wants file or url")
    return {"audio": str(source["source"])}


def _times(cut: Mapping[str, Any], supervision: Mapping[str, Any]) -> dict[str, float]:
    """Return the start and length of a clip in its file; none for all of the file."""
    cut_start, cut_s = float(cut.get("start", 0)), float(cut["duration"])
    start, length_s = float(supervision.get("start", 0)), float(supervision.get("duration", cut_s))
    if start < -TOLERANCE_S or start + length_s > cut_s + TOLERANCE_S:
        raise _UnusableError(
            "cut off text",
            f"it is said from {start:g} to {start + length_s:g} s, and the cut goes from 0 to {cut_s:g} s",
        )
    start, end = max(0.0, start), min(cut_s, start + length_s)
    recording_s = float(cut["recording"].get("duration", cut_start + cut_s))
    if cut_start + start < 1e-6 and abs(recording_s - end) <= TOLERANCE_S:
        return {}
    return {"offset": round(cut_start + start, 6), "duration": round(end - start, 6)}


def _scalars(custom: Any) -> dict[str, Any]:
    return {key: value for key, value in custom.items() if not isinstance(value, dict | list)} if custom else {}
