"""Which utterances of a source go into which shard, and under which key: decided before anything is decoded.

It depends on the source and the wanted length alone, so any number of processes writes the same shards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from hashlib import sha1

from .audio import AudioError, audio_info
from .sources import Source, SourceUtterance

MAX_KEY = 80  # bytes; a tar name holds 100
PROBE_FILES = 64  # headers read to estimate lengths where the source does not say them


def cut_into_shards(listing: Source, shard_seconds: float) -> Iterator[tuple[list[str], list[SourceUtterance]]]:
    """Yield (keys, utterances) of equally long shards of about `shard_seconds` at most, in the order of the source."""
    seconds = estimate_seconds(listing)
    keys = assign_keys([utterance.id for utterance in listing.utterances])
    number = max(1, -(-sum(seconds) // shard_seconds))
    target = sum(seconds) / number
    start, until, passed = 0, target, 0.0
    for i, length in enumerate(seconds):
        if passed + length / 2 > until and i > start:  # an utterance belongs to the shard that holds its middle
            yield keys[start:i], listing.utterances[start:i]
            start = i
            while passed + length / 2 > until:
                until += target
        passed += length
    yield keys[start:], listing.utterances[start:]


def estimate_seconds(listing: Source) -> list[float]:
    """Return lengths for cutting shards: what the source says, else by file size at the rate of a few probed files."""
    unknown = [u for u in listing.utterances if u.duration_s is None and not u.problem]
    probed_seconds = probed_weight = 0.0
    for utterance in unknown[:: max(1, len(unknown) // PROBE_FILES)]:
        try:
            probed_seconds += audio_info(listing.reader(utterance)).seconds
            probed_weight += utterance.size or 1
        except AudioError:
            continue
    rate = probed_seconds / probed_weight if probed_weight else 1.0
    return [(u.size or 1) * rate if u.duration_s is None else u.duration_s for u in listing.utterances]


def assign_keys(ids: list[str]) -> list[str]:
    """Return unique keys that are safe in a tar: the last part of an id where that is unique, else all of it.

    Only A-Z a-z 0-9 _ and - remain (webdataset ends a key at its first dot); what is changed or cut short gets a hash
    of the id.
    """
    last = Counter(_last_part(identity) for identity in ids)
    copies: Counter[str] = Counter()
    keys: dict[str, None] = {}  # a set that keeps its order
    for identity in ids:
        name = _last_part(identity) if last[_last_part(identity)] == 1 else identity
        key = wanted = _safe(name, identity)
        while key in keys:
            copies[wanted] += 1
            key = f"{wanted}-{copies[wanted] + 1}"
        keys[key] = None
    return list(keys)


def _last_part(identity: str) -> str:
    return identity.rstrip("/").rpartition("/")[2]


def _safe(name: str, identity: str) -> str:
    plain = re.sub(r"[/. ]+", "-", name.strip("/"))
    key = re.sub(r"[^A-Za-z0-9_-]", "_", plain)
    if key == plain and len(key) <= MAX_KEY and key:
        return key
    return f"{key[-(MAX_KEY - 9) :]}-{sha1(identity.encode()).hexdigest()[:8]}"
