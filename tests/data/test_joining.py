"""Joined texts, audio and metas."""

import numpy as np
import pytest

from seedling.data.joining import join_metas, join_texts, join_waveforms


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["one two", "three"], "one two three"),
        (["打开", "客厅的灯"], "打开客厅的灯"),
        (["打开", "wifi", "客厅"], "打开 wifi 客厅"),
        (["そうです。", "はい"], "そうです。はい"),
        (["네 알겠습니다", "감사합니다"], "네 알겠습니다 감사합니다"),
        (["", " a ", "", "b"], "a b"),
        (["𠮷野", "家"], "𠮷野家"),
        ([], ""),
    ],
)
def test_words_are_kept_apart_where_the_script_does_so(texts, joined):
    assert join_texts(texts) == joined


def test_the_gap_is_as_quiet_as_the_quietest_place_beside_it_and_always_the_same():
    draws = np.random.default_rng(0)
    loud, soft = (level * draws.standard_normal(16000).astype(np.float32) for level in (0.1, 0.01))
    joined = join_waveforms([loud, soft, np.zeros(800, np.float32)], gap=8000, sample_rate=16000)
    assert joined.dtype == np.float32 and len(joined) == 16000 + 8000 + 16000 + 8000 + 800
    assert np.array_equal(joined[:16000], loud) and np.array_equal(joined[24000:40000], soft)
    assert joined[16000:24000].std() == pytest.approx(0.01, rel=0.2)
    assert joined[40000:48000].std() == pytest.approx(1e-4, rel=0.1)  # beside digital silence it is not silent
    assert np.array_equal(joined, join_waveforms([loud, soft, np.zeros(800, np.float32)], gap=8000, sample_rate=16000))
    assert len(join_waveforms([loud, soft], gap=0, sample_rate=16000)) == 32000


def test_a_joined_meta_keeps_what_is_common_and_all_keywords():
    metas = [
        {"text": "call anna", "speaker": "s1", "lang": "en", "id": "a", "keywords": ["anna"]},
        {"text": "call bob and anna", "speaker": "s1", "lang": "en", "id": "b", "keywords": ["bob", "anna"]},
    ]
    assert join_metas(metas, keys=["a", "b"]) == {
        "text": "call anna call bob and anna",
        "speaker": "s1",
        "lang": "en",
        "keywords": ["anna", "bob"],
        "members": ["a", "b"],
    }
