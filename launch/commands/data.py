"""Commands about data: demo-corpus, prepare, index, check-data."""

import argparse
import os
import sys
from pathlib import Path


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of this family."""
    cores = len(os.sched_getaffinity(0))
    corpus = commands.add_parser("demo-corpus", help="synthesise the demo's spoken corpus with espeak-ng")
    corpus.add_argument("--out", required=True, metavar="DIR")
    corpus.add_argument("--hours", type=float, default=2.0, help="hours of training audio (default 2)")
    corpus.add_argument("--mandarin-hours", type=float, default=0.5, help="and of Mandarin (0.5); 0 leaves it out")
    corpus.add_argument("--rl-hours", type=float, default=0.0, help="more, kept apart for reinforcement learning (0)")
    corpus.add_argument(
        "--heldout-utterances", type=int, default=300, help="in dev and in test (300), of Mandarin a third"
    )
    corpus.add_argument("--lm-sentences", type=int, default=60_000, help="sentences of text for lm_pretrain (60000)")
    corpus.add_argument("--seed", type=int, default=0)
    corpus.add_argument("--jobs", type=int, default=cores)
    corpus.set_defaults(action=demo_corpus)

    prepare_ = commands.add_parser("prepare", help="turn a source of audio and text into shards with an index")
    prepare_.add_argument(
        "source", help="JSONL manifest, LibriSpeech or AISHELL-1 tree, Hugging Face set (name or folder)"
    )
    prepare_.add_argument("--out", required=True, metavar="DIR")
    prepare_.add_argument("--sample-rate", type=int, default=16000)
    prepare_.add_argument(
        "--shard-seconds", type=float, default=3600.0, help="audio per shard (default an hour, 60 MB)"
    )
    prepare_.add_argument("--split", help="split or subset of the source")
    prepare_.add_argument("--lang", help="language of utterances that do not say theirs")
    prepare_.add_argument("--limit", type=int, help="take the first N utterances only")
    prepare_.add_argument("--max-bad-fraction", type=float, default=0.01, help="fail above this share of unusable ones")
    prepare_.add_argument("--jobs", type=int, default=cores)
    prepare_.set_defaults(action=prepare)

    index_ = commands.add_parser("index", help="write the index of foreign WebDataset shards, and their list")
    index_.add_argument("dir")
    index_.add_argument("--jobs", type=int, default=cores)
    index_.add_argument(
        "--list-only",
        action="store_true",
        help="write only shards.npy, the list, from the indexes as they are",
    )
    index_.set_defaults(action=index)

    check = commands.add_parser("check-data", help="verify every utterance of a folder of shards; exit 1 names the bad")
    check.add_argument("dir")
    check.add_argument("--jobs", type=int, default=cores)
    check.set_defaults(action=check_data)


def demo_corpus(arguments: argparse.Namespace) -> None:
    """Generate the demo's corpus and print what is in it."""
    from ...data.demo_corpus import MANIFESTS, generate, statistics

    out = generate(
        Path(arguments.out),
        hours=arguments.hours,
        mandarin_hours=arguments.mandarin_hours,
        rl_hours=arguments.rl_hours,
        heldout_utterances=arguments.heldout_utterances,
        lm_sentences=arguments.lm_sentences,
        seed=arguments.seed,
        jobs=arguments.jobs,
    )
    for manifest in (out / name for name in MANIFESTS if (out / name).exists()):
        for lang, found in statistics(manifest).items():
            print(
                f"{manifest}: {lang}, {found.utterances:,} utterances, {found.hours:.2f} h, "
                f"{found.mean_seconds:.1f} s each, {found.words_per_second:.1f} words a second, "
                f"vocabulary {found.vocabulary}, {found.voices} voices"
            )


def prepare(arguments: argparse.Namespace) -> None:
    """Write shards and print their totals."""
    from ...data.prepare import prepare

    summary = prepare(
        arguments.source,
        Path(arguments.out),
        sample_rate=arguments.sample_rate,
        shard_seconds=arguments.shard_seconds,
        split=arguments.split,
        lang=arguments.lang,
        limit=arguments.limit,
        max_bad_fraction=arguments.max_bad_fraction,
        jobs=arguments.jobs,
    )
    rejected = f", {summary.rejected} rejected (named in rejected.jsonl)" if summary.rejected else ""
    print(
        f"{arguments.out}: {summary.utterances:,} utterances, {summary.seconds / 3600:.2f} h, "
        f"{len(summary.shards)} shards{rejected}"
    )


def index(arguments: argparse.Namespace) -> None:
    """Index a folder of shards and print its totals."""
    from ...data.index import index_folder

    found = index_folder(arguments.dir, jobs=arguments.jobs, list_only=arguments.list_only)
    unreadable = f", {found.unreadable} unreadable (see `seedling check-data`)" if found.unreadable else ""
    hours = found.seconds / 3600
    print(f"{arguments.dir}: {found.shards} shards, {found.utterances:,} utterances, {hours:.2f} h{unreadable}")


def check_data(arguments: argparse.Namespace) -> int:
    """Print shard, key and reason of everything wrong in a folder of shards; 1 if there is anything."""
    from ...data.check import check_data

    problems = check_data(Path(arguments.dir), jobs=arguments.jobs)
    for problem in problems:
        print(f"{problem.shard or arguments.dir}\t{problem.key or '-'}\t{problem.reason}")
    if problems:
        print(f"seedling: {arguments.dir}: {len(problems)} problems", file=sys.stderr)
        return 1
    print(f"{arguments.dir}: no problems")
    return 0
