"""The encoded audio of a corpus as it lies in the shards, by key: for players in reports."""

from .index import Corpus
from .loader import utterance_key
from .payload import PayloadReader
from .remote import RemoteConfig

MIME_TYPES = {b"fLaC": "audio/flac", b"RIFF": "audio/wav", b"OggS": "audio/ogg"}


class AudioClips:
    """Call it with a key for (encoded audio, MIME type); None where the corpus has no such utterance."""

    def __init__(self, folder: str, *, remote: RemoteConfig | None = None):
        corpus, self.reader = Corpus.open(folder, remote=remote), PayloadReader()
        self.places = {
            utterance_key(at): (path, at) for shard, path in enumerate(corpus.shards) for at in corpus.index(shard)
        }

    def __call__(self, key: str) -> tuple[bytes, str] | None:
        if key not in self.places:
            return None
        path, at = self.places[key]
        clip = self.reader.read(path, offset=int(at["audio_offset"]), size=int(at["audio_size"]))
        return clip, next((mime for magic, mime in MIME_TYPES.items() if clip.startswith(magic)), "audio/mpeg")
