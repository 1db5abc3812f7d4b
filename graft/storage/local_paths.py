"""Tell local paths from other locations, and write paths that are not UTF-8 as file:// URIs.

Names of files are bytes. In a str, Python keeps bytes that are not UTF-8 as lone surrogates, which neither Arrow, YAML
nor a terminal takes.
"""

import os
from urllib.parse import quote_from_bytes, unquote_to_bytes

_SCHEME = "file://"


def local_path(location: str) -> str | None:
    """Return the path of a path or file:// URI, as Python's functions of files take it; None for other locations."""
    if location.startswith(_SCHEME):
        rest = location.removeprefix(_SCHEME).partition("?")[0]
        return os.fsdecode(unquote_to_bytes(rest[rest.find("/") :]))
    return None if "://" in location else location


def utf8_location(path: str) -> str:
    """Return a path as it is, or the file:// URI of its absolute path where that is not UTF-8."""
    return path if is_utf8(path) else f"{_SCHEME}{quote_from_bytes(os.fsencode(os.path.abspath(path)))}"


def utf8_name(name: str) -> str:
    """Return a name as it is, or all of it percent-encoded, as in URIs, where it is not UTF-8."""
    return name if is_utf8(name) else quote_from_bytes(os.fsencode(name))


def is_utf8(text: str) -> bool:
    """Tell whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
