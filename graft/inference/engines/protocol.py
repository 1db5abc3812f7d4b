"""What decodes: an Engine turns each request into a stream of tokens, batched with whatever else is under way."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch takes seconds to come, and whoever only counts or sends requests on does without
    from graft.audio.features import Features


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One clip to hear, the prompt whose placeholders it fills, and the most tokens to answer with.

    With `no_repeat_ngram` over 0 no so many tokens in a row come twice in the answer: the likeliest token that keeps to it is chosen.
    """

    request_id: str
    features: "Features"
    prompt_ids: list[int]
    max_new_tokens: int
    no_repeat_ngram: int = 0


@dataclass(frozen=True)
class Token:
    """A token of an answer and its natural log-probability, of which blocking n-grams takes nothing."""

    id: int
    logprob: float


@dataclass(frozen=True)
class EngineCounts:
    """The rows that an engine decodes and those that wait now, and what it has done since it was made.

    A prefill encodes clips and reads their prompts together; a step gives each running row a token; `busy_s` are the seconds of both.
    """

    running: int
    waiting: int
    prefills: int
    steps: int
    tokens: int
    busy_s: float


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

    def counts(self) -> EngineCounts:
        """How it stands, for benchmarks and metrics; from any thread."""
        ...

    def close(self) -> None:
        """Stop decoding and release the model; open streams raise RuntimeError."""
        ...
