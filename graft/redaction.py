"""Remove the secrets from URIs that are kept or shown. The module imports nothing heavy."""

import re
from typing import Any

_SECRET_OPTION = re.compile("key|secret|token|sig|credential|password|policy|auth", re.IGNORECASE)


def without_secrets(value: Any) -> Any:
    """Remove user, password and secret options from the URIs among texts, lists and mappings; the rest stays.

    Two URIs that differ by their secrets alone become equal.
    """
    if isinstance(value, dict):
        return {name: without_secrets(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one) for one in value]
    if not isinstance(value, str) or value.startswith("hf://") or "://" not in value:
        return value  # an @ in hf:// stands before a revision
    place, mark, query = value.partition("?")
    scheme, _, rest = place.partition("://")
    host, slash, path = rest.partition("/")
    kept = [option for option in query.split("&") if not _SECRET_OPTION.search(option.partition("=")[0])]
    options = mark + "&".join(kept) if mark and kept else ""
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}{options}"
