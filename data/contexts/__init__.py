"""Contexts: what an utterance may be transcribed with, written from its transcript and kept beside the audio."""
