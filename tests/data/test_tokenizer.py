"""The BPE tokenizer: any text comes back as it was, and a word has one spelling in tokens."""

import pytest
from transformers import AutoTokenizer

from seedling.data.tokenizer import BOS, EOS, PAD, train_bpe

SENTENCES = ["call Kaitlyn now", "turn the kitchen light off", "Kaitlyn called the kitchen", "now call Marc"] * 5
TEXTS = [
    "call Kaitlyn now",
    "Ein Fuß, ça va; naïve café!",
    "打开厨房的灯",
    "emoji 🎉 and tabs\tinside",
    "two  blanks",
    "don't stop .",
    "\u202eright to left עברית",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(SENTENCES, vocab_size=330)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids).strip() == text
    assert tokenizer.unk_token_id is None and tokenizer.eos_token_id not in ids and tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("word", ["Kaitlyn", "kitchen", "call", "unheard-of"])
def test_a_word_has_one_spelling_wherever_it_stands(tokenizer, word):
    alone = tokenizer(word).input_ids
    for before, after in (("", " now"), ("turn", ""), ("turn", " off"), ("turn off", " now")):
        ids = tokenizer(f"{before} {word}{after}".strip()).input_ids
        head = tokenizer(before).input_ids if before else []
        assert ids[len(head) : len(head) + len(alone)] == alone, (before, word, after)


def test_frequent_words_become_one_token(tokenizer):
    assert [len(tokenizer(word).input_ids) for word in ("Kaitlyn", "kitchen", "call")] == [1, 1, 1]


def test_a_character_without_spaces_is_one_token_with_one_spelling_wherever_it_stands():
    tokenizer = train_bpe([*SENTENCES, *["打开厨房的灯", "关上厨房的灯", "开灯", "play 音乐 now"] * 5], vocab_size=400)
    alone = {character: tokenizer(character).input_ids for character in "打开厨房的灯关上音乐"}
    assert {len(ids) for ids in alone.values()} == {1}
    text = "关上厨房灯打开的"
    assert tokenizer(text).input_ids == [token for character in text for token in alone[character]]
    assert alone["音"][0] in tokenizer("call 音乐").input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_no_token_joins_parts_of_two_characters():
    sentences = ["今天天气怎么样", "明天天气好", "今天好"]
    tokenizer = train_bpe(sentences * 50, vocab_size=1000)
    assert len(tokenizer) < 300  # where characters were joined, whole sentences would be tokens by now
    for text in [*sentences, "张天气今好明"]:
        by_character = [token for character in text for token in tokenizer(character).input_ids]
        assert tokenizer(text).input_ids == by_character


def test_special_tokens_come_first_and_are_never_part_of_a_text(tokenizer):
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [PAD, BOS, EOS]
    assert tokenizer.decode([1, *tokenizer("call").input_ids, 2], skip_special_tokens=True).strip() == "call"


def test_the_vocabulary_has_at_most_the_size_asked_for(tokenizer):
    assert 280 < len(tokenizer) <= 330
    assert len(train_bpe(SENTENCES, vocab_size=280)) == 280
    assert len(train_bpe(["a"], vocab_size=5000)) == 260  # one merge: the blank and the letter
    assert len(train_bpe([], vocab_size=259)) == 259


def test_the_same_text_gives_the_same_tokenizer(tokenizer):
    assert train_bpe(iter(SENTENCES), vocab_size=330).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_without_room_for_the_bytes_is_refused_with_the_smallest_that_has():
    with pytest.raises(ValueError, match=r"vocab_size \(258\) must be at least 259"):
        train_bpe(SENTENCES, vocab_size=258)


def test_it_is_saved_in_hugging_face_form(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert [loaded.decode(loaded(text).input_ids) for text in TEXTS] == [
        tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS
    ]
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == (PAD, BOS, EOS)
