"""What decodes: an Engine turns each request into a stream of tokens, batched with whatever else is under way."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from graft.features import Features


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One clip to hear, the prompt whose placeholders it fills, and the most tokens to answer with."""

    request_id: str
    features: Features
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Token:
    """A token of an answer and its natural log-probability."""

    id: int
    logprob: float


class Engine(Protocol):
    """Decodes greedily. Streams may be read from any number of event loops and threads at once."""

    def stream(self, request: EngineRequest) -> AsyncGenerator[Token, None]:
        """Yield the answer's tokens as they come, without the one that ends it; `max_new_tokens` of them mean that it was cut.

        Closing or cancelling the generator aborts the request. What goes wrong inside the model is raised here.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Free a request's place and end its stream; an unknown or finished id is ignored."""
        ...

    def close(self) -> None:
        """Stop decoding and release the model; open streams raise RuntimeError."""
        ...
