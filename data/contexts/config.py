"""What `seedling contextualize` can be told. The defaults write the contexts of a training corpus from templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..remote import RemoteConfig
from .templates import FORMS

KINDS = ("relevant", "irrelevant", "conflict", "history", "empty")
# Of the triples that context SFT trains on; empty contexts are its own business (context dropout).
DEFAULT_SHARES = {"relevant": 0.6, "irrelevant": 0.2, "conflict": 0.1, "history": 0.1}
DEFAULT_FORMS = {"list": 4.0, **{form: 1.0 for form in FORMS if form != "list"}}


@dataclass
class EndpointConfig:
    """An OpenAI-compatible endpoint: `base_url` is what comes before /chat/completions, such as http://host:8000/v1.

    The key is read from the environment variable that `api_key_env` names; it is never written anywhere. `parameters`
    are added to each request's body; null takes one out.
    """

    base_url: str = ""
    model: str = ""
    api_key_env: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    requests_per_minute: float = 0.0  # 0: no limit
    timeout_s: float = 60.0
    retries: int = 5
    backoff_s: float = 1.0  # before the first retry, doubled each time

    def __post_init__(self):
        at_least = {"concurrency": 1, "requests_per_minute": 0, "timeout_s": 0.001, "retries": 0, "backoff_s": 0}
        _check_range("endpoint.", vars(self), at_least)
        host = self.base_url.partition("://")[2].partition("/")[0]
        if "@" in host or "?" in self.base_url:
            raise ValueError(
                "endpoint.base_url must hold no user, password or query, as it is stored with the contexts; put a key "
                "into the environment and name its variable in endpoint.api_key_env"
            )


@dataclass
class LLMConfig:
    """A causal LM in a local folder, in Hugging Face form, that writes the contexts."""

    path: str = ""
    batch_size: int = 16
    max_new_tokens: int = 120
    temperature: float = 0.8
    top_p: float = 0.95
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self):
        _check_range("llm.", vars(self), {"batch_size": 1, "max_new_tokens": 1, "temperature": 0, "top_p": 0.0})


@dataclass
class ContextsConfig:
    """The whole of it. `shares` and `forms` are weights; left out, they are DEFAULT_SHARES and DEFAULT_FORMS."""

    seed: int = 1
    variants: int = 1  # contexts per utterance, each of a kind and form of its own
    shares: dict[str, float] = field(default_factory=dict)  # kind -> weight
    forms: dict[str, float] = field(default_factory=dict)  # form -> weight
    keywords: str = "auto"  # given (in the shards), rare (rare words of the transcripts), auto: given if there are any
    rare_share: float = 0.1  # the rarest words that make up so much of the running text are keywords
    word_counts: str = ""  # text file in which words are counted, instead of the corpus itself
    max_keywords: int = 50  # of one context; drawn, where an utterance has more
    distractors: str = ""  # file with a name or phrase a line, instead of the corpus' own keywords
    list_size: Any = field(default_factory=lambda: [2, 10])  # distractors: a number, or [least, most]
    close_share: float = 0.3  # of the distractors: those that sound closest to the keywords
    sound_alikes: str = ""  # JSON file, lists of words that sound alike; the demo corpus writes homophones.json
    leak_share: float = 0.6  # a context with such a share of the transcript in one run is refused
    lang: str = "en"  # of utterances that name none
    writer: str = "templates"  # or endpoint, llm: they write the sentences, lists come from templates always
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    cache: str = ""  # file that keeps every answer of a writer; default OUT/answers.jsonl
    remote: RemoteConfig = field(default_factory=RemoteConfig)  # of shards on http(s):// and s3://
    jobs: int = 0  # processes; 0: as many as cores for templates, 1 for the other writers

    def __post_init__(self):
        self.shares = _weights("shares", self.shares, KINDS, DEFAULT_SHARES)
        self.forms = _weights("forms", self.forms, tuple(FORMS), DEFAULT_FORMS)
        _choice("keywords", self.keywords, ("auto", "given", "rare"))
        _choice("writer", self.writer, ("templates", "endpoint", "llm"))
        _check_range("", vars(self), {"variants": 1, "max_keywords": 1, "jobs": 0})
        for name in ("rare_share", "close_share", "leak_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (name == "leak_share" and not value):
                raise ValueError(f"{name} ({value}) must lie between 0 and 1")
        self.list_size = _list_size(self.list_size)
        if self.writer == "endpoint" and not (self.endpoint.base_url and self.endpoint.model):
            raise ValueError("writer is endpoint: set endpoint.base_url and endpoint.model")
        if self.writer == "llm" and not self.llm.path:
            raise ValueError("writer is llm: set llm.path to the folder of a Hugging Face causal LM")
        if self.writer != "templates" and self.jobs > 1:
            raise ValueError(
                f"jobs ({self.jobs}) is for templates; use endpoint.concurrency or llm.batch_size with {self.writer}"
            )


def _weights(name: str, given: dict[str, float], known: tuple[str, ...], default: dict[str, float]) -> dict[str, float]:
    """Return shares that add up to one."""
    for key, weight in given.items():
        if key not in known:
            raise ValueError(f"{name}.{key}: choose among {', '.join(known)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name}.{key} ({weight}) must be a number that is not negative")
    chosen = given or default
    total = sum(chosen.values())
    if not total:
        raise ValueError(f"{name}: all are 0; give at least one of them a weight")
    return {key: chosen[key] / total for key in known if chosen.get(key)}


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value}: choose one of {', '.join(known)}")


def _check_range(prefix: str, values: dict[str, Any], at_least: dict[str, float]) -> None:
    for name, least in at_least.items():
        if not values[name] >= least:
            raise ValueError(f"{prefix}{name} ({values[name]}) must be at least {least:g}")


def _list_size(value: Any) -> list[int]:
    sizes = [value, value] if isinstance(value, int) else value
    right = isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int for size in sizes)
    if not right or not 0 <= sizes[0] <= sizes[1]:
        raise ValueError(f"list_size ({value}): give a number of distractors, or [least, most]")
    return sizes
