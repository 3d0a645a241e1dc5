"""`seedling check-data`: everything that can be wrong with shards, as rows of shard, key and reason.

Each shard is read in full by one process: the tar's structure, the index against the tar, the audio decoded, the meta,
the text. What takes a comparison (duplicates, the usual rate, script and speed of a language) is judged afterwards from
a few facts per utterance. A torn shard is reported, and what is whole in it is checked like the rest.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from hashlib import blake2b
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .audio import AudioError, audio_info, read_audio
from .index import MissingIndex, index_rows, local_tars, meta_member, parse_meta, read_index
from .parallel import advance, over_shards
from .tars import AUDIO_EXTENSIONS, Member, UtteranceMembers, group_members, scan_tar
from .text_check import WITH_LATIN, character_problem, expected_scripts, mixed_word, scripts

SECONDS_SLACK = 0.06  # lengths in a meta may be rounded to tenths
FASTEST = 40.0  # characters per second that nobody speaks; quick English has 25 ...
FASTEST_CJK = 15.0  # ... and quick Mandarin 8
SLOWEST = 0.5  # fewer in an utterance of more than SLOW_SECONDS: most of it was not transcribed
SLOW_SECONDS = 5.0
OUTLIER = 6.0  # robust standard deviations of the logarithm of characters per second
LEAST_SPREAD = 0.15  # of that logarithm: synthetic speech is so even that harmless differences would stand out
LEAST_UTTERANCES = 30  # of a language, below which its spread means nothing


class Problem(NamedTuple):
    """One thing wrong; `key` is empty where it concerns the whole shard, `shard` where it concerns the folder."""

    shard: str
    key: str
    reason: str


class Facts(NamedTuple):
    """What is remembered of an utterance for comparisons."""

    shard: str
    key: str
    text: str
    lang: str
    seconds: float
    sample_rate: int
    audio_hash: bytes


class ShardReport(NamedTuple):
    problems: list[Problem]
    keys: list[str]
    facts: list[Facts]


def check_data(folder: str | Path, *, jobs: int = 1) -> list[Problem]:
    """Return all problems of the shards below `folder`, in their order. Raises ValueError where there are no shards."""
    tars = local_tars(folder)
    names = [str(tar.relative_to(folder) if tar.is_relative_to(folder) else tar.name) for tar in tars]
    total = sum(tar.stat().st_size for tar in tars) // 2**20
    reports: dict[int, ShardReport] = dict(
        over_shards(check_shard, list(zip(tars, names)), jobs=jobs, label="check-data", total=total, unit="MiB")
    )
    ordered = [reports[number] for number in range(len(tars))]
    facts = [fact for report in ordered for fact in report.facts]
    problems = [problem for report in ordered for problem in report.problems]
    for check in (_rates, _texts, _speeds, _duplicate_audio):
        problems += check(facts)
    problems += _duplicate_keys(names, ordered)
    position = {name: number for number, name in enumerate(names)}
    problems.sort(key=lambda problem: (position.get(problem.shard, -1), problem.key))
    return _totals(Path(folder), names, ordered) + problems


# --- one shard


def check_shard(task: tuple[Path, str]) -> ShardReport:
    """Check all that one shard, given by path and by the name to report, shows by itself."""
    tar, shard = task
    scan = scan_tar(tar)
    groups = group_members(scan.members)
    problems = [Problem(shard, "", scan.error)] if scan.error else []
    keys, facts = [], []
    read = 0
    with open(tar, "rb") as handle:

        def payload(member: Member) -> bytes:
            handle.seek(member.offset)
            return handle.read(member.size)

        for group in groups:
            key = _printable(group.key)
            keys.append(key)
            fact, reasons = _check_utterance(group, payload)
            problems += [Problem(shard, key, reason) for reason in reasons]
            if fact:
                facts.append(fact._replace(shard=shard, key=key))
            end = max(member.offset + member.size for member in group.members.values()) // 2**20
            advance(end - read)
            read = end
    if not scan.error:
        problems += _check_index(tar, shard, groups)
    return ShardReport(problems, keys, facts)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _check_utterance(group: UtteranceMembers, payload) -> tuple[Facts | None, list[str]]:
    """Return the facts (None without usable audio) and the reasons against an utterance."""
    reasons = []
    if not group.key or group.key.endswith("/") or not group.key.isprintable() or " " in group.key:
        reasons.append("the key is empty or holds spaces or unprintable characters")
    audio = group.audio
    if audio is None:
        return None, [*reasons, f"no audio among {', '.join('.' + e for e in group.members)}"]
    if len(several := [e for e in group.members if e in AUDIO_EXTENSIONS]) > 1:
        reasons.append(f"several audio files ({', '.join(several)}) under one key")
    meta = _check_meta(group, payload, reasons)
    text, lang = (value if isinstance(value := meta.get(name), str) else "" for name in ("text", "lang"))
    content = payload(audio)
    try:
        info = audio_info(content, name="audio")
        waveform = read_audio(content, sample_rate=None, name="audio")
    except AudioError as error:
        return None, [*reasons, str(error)]
    reasons += _check_lengths(meta, len(waveform) / info.sample_rate, info.sample_rate)
    if info.channels != 1:
        reasons.append(f"{info.channels} channels, expected 1")
    if text and not waveform.any():
        reasons.append("the audio is digital silence, and there is a text")
    digest = blake2b(waveform.tobytes(), digest_size=16).digest()
    return Facts("", "", text, lang, len(waveform) / info.sample_rate, info.sample_rate, digest), reasons


def _check_meta(group: UtteranceMembers, payload, reasons: list[str]) -> dict:
    member, _ = meta_member(group, payload)
    if member is None:
        reasons.append("neither .json nor .txt beside the audio")
        return {}
    try:
        meta = parse_meta(payload(member), is_json=member.name.lower().endswith("json"))
    except ValueError as error:
        reasons.append(f"the meta cannot be read ({error})")
        return {}
    text = meta.get("text")
    if text is not None and not isinstance(text, str):
        reasons.append(f"the text is a {type(text).__name__}, not a string")
    elif text and (found := character_problem(text) or mixed_word(text)):
        reasons.append(found)
    return meta


def _check_lengths(meta: dict, seconds: float, sample_rate: int) -> Iterator[str]:
    for name in ("seconds", "duration"):
        said = meta.get(name)
        if isinstance(said, int | float) and abs(said - seconds) > SECONDS_SLACK:
            yield f"the audio lasts {seconds:.2f} s, its meta says {said:.2f} s"
    said = meta.get("sample_rate")
    if said is not None and said != sample_rate:
        yield f"the audio has {sample_rate} Hz, its meta says {said}"


def _check_index(tar: Path, shard: str, groups: list[UtteranceMembers]) -> Iterator[Problem]:
    """Compare the index with what an index written now would hold."""
    try:
        stored = read_index(tar)
    except MissingIndex as error:
        yield Problem(shard, "", str(error).removeprefix(f"{tar}: "))
        return
    fresh = index_rows(tar, groups)
    way_out = f"run `seedling index {tar.parent}`"
    if len(stored) != len(fresh):
        yield Problem(shard, "", f"the index has {len(stored)} utterances, the tar {len(fresh)}; {way_out}")
        return
    names = stored.dtype.names or ()  # of an earlier version they may be fewer
    wrong = np.flatnonzero(~np.logical_and.reduce([stored[name] == fresh[name] for name in names]))
    for row in wrong[:1]:
        fields = ", ".join(
            f"{n} {stored[n][row]} for {fresh[n][row]}" for n in names if stored[n][row] != fresh[n][row]
        )
        reason = f"the index disagrees with the tar in {len(wrong)} rows, first here ({fields}); {way_out}"
        yield Problem(shard, _printable(bytes(fresh["key"][row]).decode("utf-8", "backslashreplace")), reason)


# --- all shards together


def _rates(facts: list[Facts]) -> Iterator[Problem]:
    rates = Counter(fact.sample_rate for fact in facts)
    usual = rates.most_common(1)[0][0] if rates else 0
    for fact in facts:
        if fact.sample_rate != usual:
            yield Problem(fact.shard, fact.key, f"the audio has {fact.sample_rate} Hz, most here has {usual} Hz")


def _texts(facts: list[Facts]) -> Iterator[Problem]:
    """Empty texts in a transcribed corpus (one without any is unlabelled, which is fine), and unexpected scripts."""
    transcribed = sum(bool(fact.text) for fact in facts) > len(facts) / 2
    by_lang: dict[str, list[Facts]] = defaultdict(list)
    for fact in facts:
        if fact.text:
            by_lang[fact.lang].append(fact)
        elif transcribed:
            yield Problem(fact.shard, fact.key, "the text is empty, most here are not")
    for lang, group in by_lang.items():
        counts = [scripts(fact.text) for fact in group]
        expected = expected_scripts(counts)
        for fact, found in zip(group, counts):
            if strange := sorted(set(found) - expected):
                of = f"language {lang}" if lang else "this corpus"
                reason = f"{' and '.join(strange)} letters, unexpected in {of} ({', '.join(sorted(expected))})"
                yield Problem(fact.shard, fact.key, reason)


def _speeds(facts: list[Facts]) -> Iterator[Problem]:
    """Characters per second beyond what anybody speaks, or far from what is usual for the language here."""
    by_lang: dict[str, list[tuple[Facts, float]]] = defaultdict(list)
    for fact in facts:
        characters = sum(not char.isspace() for char in fact.text)
        if characters:
            by_lang[fact.lang].append((fact, characters / fact.seconds))
    for group in by_lang.values():
        usual = statistics.median(log(speed) for _, speed in group)
        deviation = statistics.median(abs(log(speed) - usual) for _, speed in group)
        spread = max(1.4826 * deviation, LEAST_SPREAD)  # 1.4826: equals the standard deviation of a normal distribution
        for fact, speed in group:
            fastest = FASTEST_CJK if set(scripts(fact.text)) & WITH_LATIN else FASTEST
            impossible = speed > fastest or (speed < SLOWEST and fact.seconds > SLOW_SECONDS)
            far = len(group) >= LEAST_UTTERANCES and abs(log(speed) - usual) > OUTLIER * spread
            if impossible or far:
                reason = f"{speed:.2f} characters per second ({fact.seconds:.2f} s), usual here is {np.exp(usual):.1f}"
                yield Problem(fact.shard, fact.key, reason)


def _duplicate_audio(facts: list[Facts]) -> Iterator[Problem]:
    first: dict[bytes, Facts] = {}
    for fact in facts:
        earlier = first.setdefault(fact.audio_hash, fact)
        if earlier is not fact:
            text = "the same text" if earlier.text == fact.text else "another text"
            yield Problem(fact.shard, fact.key, f"the same audio as {earlier.key} in {earlier.shard}, with {text}")


def _duplicate_keys(names: list[str], reports: list[ShardReport]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for name, report in zip(names, reports):
        for key in report.keys:
            if key in first:
                yield Problem(name, key, f"the key was already used in {first[key]}")
            first.setdefault(key, name)


def _totals(folder: Path, names: list[str], reports: list[ShardReport]) -> list[Problem]:
    """Compare with corpus.json, where there is one: a shard lost in copying shows nowhere else."""
    path = folder / "corpus.json"
    if not path.is_file():
        return []
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        listed, utterances, seconds = set(stored["shards"]), stored["utterances"], stored["seconds"]
    except (ValueError, KeyError, TypeError):
        return [Problem("", "", "corpus.json cannot be read; run `seedling prepare` again")]
    found = set(names)
    problems = [Problem(name, "", "listed in corpus.json, but not there") for name in sorted(listed - found)]
    problems += [Problem(name, "", "not listed in corpus.json") for name in sorted(found - listed)]
    held = sum(len(report.keys) for report in reports)
    length = sum(fact.seconds for report in reports for fact in report.facts)
    if held != utterances:
        problems.append(Problem("", "", f"{held} utterances here, corpus.json says {utterances}"))
    elif abs(length - seconds) > SECONDS_SLACK * max(1, held):
        problems.append(Problem("", "", f"{length:.1f} seconds of audio here, corpus.json says {seconds:.1f}"))
    return problems
