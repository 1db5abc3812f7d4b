"""Define an Engine: it turns each request into a stream of tokens, batched with the other requests under way."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # torch takes seconds to import, and callers that only read counts or pass requests on do not need it
    from graft.audio.features import Features


@dataclass(frozen=True, eq=False)
class EngineRequest:
    """One clip to transcribe: its features, the prompt whose placeholders they fill, and the most tokens of the answer.

    With a positive `no_repeat_ngram`, no sequence of that many tokens occurs twice in the answer: at each step the
    likeliest token that repeats none is chosen. Where there are `first_ids`, the answer begins with one of them, as a
    Whisper's begins with the language that it hears; vLLM, which runs no Whisper, does not read them. The answer goes
    on after `prefix_ids`, which are read together with the prompt: they are not yielded, but count among its tokens,
    and must be fewer than it may have.
    """

    request_id: str
    features: "Features"
    prompt_ids: list[int]
    max_new_tokens: int
    no_repeat_ngram: int = 0
    first_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Token:
    """A token of an answer and its natural log-probability, which blocked n-grams do not change."""

    id: int
    logprob: float


@dataclass(frozen=True)
class EngineCounts:
    """The rows that an engine decodes now, the rows that wait, and the work it has done since it was made.

    A prefill encodes clips and reads their prompts together; a decode step gives each running row one token; `busy_s`
    is the time spent on both, in seconds.
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
        """Yield the tokens of the answer as they are decoded, without the token that ends it.

        An answer of `max_new_tokens` tokens, its prefix included, was cut. Closing or cancelling the generator aborts
        the request. Errors of the model are raised here.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Release the slot of a request and end its stream; an unknown or finished id is ignored."""
        ...

    def counts(self) -> EngineCounts:
        """Return the engine's state and totals, for benchmarks and metrics; any thread may call it."""
        ...

    def close(self) -> None:
        """Stop decoding and release the model; open streams raise RuntimeError."""
        ...
