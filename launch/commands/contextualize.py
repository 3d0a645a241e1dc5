"""The command contextualize: contexts for every utterance of a corpus, by templates, an endpoint or a local LLM."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...data.contexts.answers import Answer, Request
    from ...data.contexts.config import ContextsConfig, LLMConfig
    from ...data.contexts.contextualize import ContextsSummary
    from ...stages.runtime.config import Loaded


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser."""
    text = "write a context for every utterance of a folder of shards, into a sidecar beside the audio"
    parser = commands.add_parser("contextualize", help=text, description=text)
    parser.add_argument("shards", help="a folder of shards, as `seedling prepare` writes it")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--config", metavar="F", help="a YAML file, or the name of a packaged one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the YAML")
    parser.set_defaults(action=contextualize)


def contextualize(arguments: argparse.Namespace) -> None:
    """Write the sidecar and print what is in it."""
    from ...data.contexts.contextualize import contextualize

    cfg = load_contexts_config(arguments.config, overrides=arguments.overrides).config
    makers: dict[str, Callable[[], Any]] = {"endpoint": lambda: _endpoint(cfg), "llm": lambda: LocalWriter(cfg.llm)}
    summary = contextualize(arguments.shards, arguments.out, cfg, make_writer=makers.get(cfg.writer))
    print(described(summary, arguments.out))


def load_contexts_config(config: str | None, *, overrides: Sequence[str]) -> Loaded[ContextsConfig]:
    """Load the settings from a path or packaged name and from overrides."""
    from ...data.contexts.config import ContextsConfig
    from ...stages.runtime.config import load_config
    from ..stage_lookup import find_config

    file = find_config(config, folder="contextualize") if config else None
    return load_config(ContextsConfig, file, overrides=overrides)


def described(summary: ContextsSummary, out: str) -> str:
    """Return the totals: how many of which kind, and all else that was counted, a line each."""
    from ...data.contexts.config import KINDS

    counts = dict(summary.counts)
    shares = [f"{kind} {100 * counts.pop(kind) / summary.contexts:.1f} %" for kind in KINDS if kind in counts]
    lines = [
        f"{out}: {summary.contexts:,} contexts of {summary.utterances:,} utterances, {summary.shards} shards: "
        f"{', '.join(shares)}"
    ]
    lines += [f"  {name}: {count:,}" for name, count in counts.items() if name not in ("utterances", "contexts")]
    return "\n".join(lines)


def _endpoint(cfg: ContextsConfig):
    from ...data.contexts.endpoint import EndpointWriter

    return EndpointWriter(cfg.endpoint)


class LocalWriter:
    """Writes by a local LLM, a batch at a time."""

    def __init__(self, cfg: LLMConfig):
        from ...model.text_writer import TextWriter
        from ..fingerprint import fingerprint

        self.cfg, self.counts = cfg, Counter()
        self.llm = TextWriter(cfg.path, device=cfg.device, dtype=cfg.dtype)
        parameters = {name: getattr(cfg, name) for name in ("max_new_tokens", "temperature", "top_p")}
        self.identity = {"model": fingerprint(cfg.path), "parameters": parameters}

    def write(self, requests: Sequence[Request], keep: Callable[[int, Answer | None], None]) -> None:
        """Answer all; each batch is kept before the next begins."""
        from ...data.contexts.answers import Answer
        from ...model.text_writer import Question

        for start in range(0, len(requests), self.cfg.batch_size):
            batch = requests[start : start + self.cfg.batch_size]
            texts = self.llm.write(
                [Question(request.system, request.user) for request in batch],
                max_new_tokens=self.cfg.max_new_tokens,
                temperature=self.cfg.temperature,
                top_p=self.cfg.top_p,
                seed=batch[0].seed + start,
            )
            self.counts["requests"] += len(batch)
            for number, text in enumerate(texts):
                keep(start + number, Answer(*text))
