"""A small byte-level BPE tokenizer, trained on the text at hand and saved in Hugging Face form.

Byte-level: any string of any language encodes without an unknown token. A prefix space makes the first word of a
sentence the same token as anywhere else, so a word has one spelling in tokens wherever it stands. So has a character of
a script without spaces: it is a word of its own and gets no prefix space. Else a sentence would be one word, and merges
would join the end of one character with the beginning of the next: on the demo's text half of the characters were torn.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .scoring.normalize import CJK

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def train_bpe(sentences: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most `vocab_size` tokens: 3 special ones, 256 bytes, and merges learnt on `sentences`.

    Raises ValueError where the vocabulary has no room for the bytes.
    """
    smallest = 3 + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least {smallest}: 3 special tokens and 256 bytes")
    tokenizer = Tokenizer(models.BPE())
    # A space before everything, less the one that is not wanted: a byte-level prefix would come before every character.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(" "), normalizers.Replace(Regex(rf"\A (?=[ {CJK}])"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(f"[{CJK}]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
