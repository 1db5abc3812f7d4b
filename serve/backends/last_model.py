"""Remember the model that an application's engines opened last, so that an engine that starts anew can open it too.

Ray's control store holds the record. It is reached from every node, and outlives the replicas.
"""

import json

from ray.experimental import internal_kv

from ..logs import LOG

NAMESPACE = "graft"


class LastModel:
    """The record of an application. It counts while the application's argument `model` is `first_model`.

    Calls block. A control store that does not answer is logged, and holds no engine up.
    """

    def __init__(self, application: str, first_model: str) -> None:
        self._key, self._first_model = f"last-model/{application}", first_model

    def read(self) -> str | None:
        """Return the folder or hub id of the model; None where there is no record."""
        try:
            record = json.loads(internal_kv._internal_kv_get(self._key, namespace=NAMESPACE) or b"{}")
        except Exception as error:  # Ray does not say which ones
            LOG.warning("the model that was opened last is not known: %s", type(error).__name__)
            return None
        return record.get("model") if record.get("first_model") == self._first_model else None

    def write(self, model: str) -> None:
        """Record that a model was opened."""
        record = json.dumps({"first_model": self._first_model, "model": model})
        try:
            internal_kv._internal_kv_put(self._key, record, namespace=NAMESPACE)
        except Exception as error:
            LOG.warning("the model that was opened last cannot be recorded: %s", type(error).__name__)
