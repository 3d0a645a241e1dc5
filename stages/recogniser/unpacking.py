"""A packed recogniser made ready to run: which of its weights are kept dense in memory, and which as codes alone."""

import logging
import math

import psutil

from ...model.audio_llm import AudioLLM
from ...quant.unpacked import unpack

FREE_SHARE = 0.5  # of the memory that is free, which dense weights may take where nothing is said

log = logging.getLogger(__name__)


def require_unpack_gb(gb: float | None) -> None:
    """Raise ValueError where this is no amount of memory; None leaves it to the machine, 0 is none, inf is any."""
    if gb is not None and not gb >= 0:
        raise ValueError(f"unpack_gb is {gb:g}; give the GB (1e9 bytes) that dense weights may take, 0 for none")


def unpack_recogniser(model: AudioLLM, *, gb: float | None, processes: int = 1) -> None:
    """Let dense weights take `gb` (1e9 bytes) beside the packed ones, in place: the LLM's before the encoder's.

    The LLM runs once a token, the rest once an utterance. None: on a CPU half of the memory that is free, shared by the
    `processes` of this machine; on a GPU, whose kernels read codes, nothing. A model without packed weights is left as
    it is, with a ValueError where `gb` is given for it.
    """
    require_unpack_gb(gb)
    parts = [model.llm, model.encoder, model.converter, *([] if model.ctc_head is None else [model.ctc_head])]
    allowed = 1e9 * gb if gb is not None else 0.0
    if gb is None and model.device.type == "cpu":
        allowed = FREE_SHARE * psutil.virtual_memory().available / processes
    unpacked = unpack(parts, most_bytes=allowed)
    if gb is not None and not unpacked.of:
        raise ValueError(f"unpack_gb is {gb:g} and the recogniser has no packed weights; leave it out")
    if unpacked.of:
        left = unpacked.of - unpacked.modules
        slow = " (slow here; raise unpack_gb)" if left and model.device.type == "cpu" else ""
        log.info(
            "%d of %d packed modules have dense weights too, %.3f GB; %d are read as codes%s",
            *(unpacked.modules, unpacked.of, math.ceil(unpacked.nbytes / 1e6) / 1e3, left, slow),
        )
