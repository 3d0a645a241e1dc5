"""An evaluation against an earlier one: closed forms, intervals recomputed by plain numpy, refusals, limits, files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from seedling.data.scoring import (
    Baseline,
    ScoredUtterance,
    comparison_text,
    score,
    score_conditions,
    write_comparison,
    write_conditions,
    write_report,
)

NAMES = ("Caitlin", "Stockholm", "Marc", "Neal")
# Before, none of the four names is heard without context, and the right one gives two of them.
BEFORE = {"none": ("x", "x", "x", "x"), "right": ("Caitlin", "Stockholm", "x", "x")}
# After, those two are heard without any: the same words are right in the end.
LEARNT = {"none": ("Caitlin", "Stockholm", "x", "x"), "right": ("Caitlin", "Stockholm", "x", "x")}
LOST = {"none": ("x", "x", "x", "x"), "right": ("Caitlin", "x", "x", "x")}


def records_of(heard: dict) -> dict[str, list[ScoredUtterance]]:
    """`call NAME now` four times, a name or another word heard in each, with every name as context."""
    return {
        condition: [
            ScoredUtterance(
                f"u{i}",
                f"call {name} now",
                f"call {words[i]} now",
                keywords=(name,),
                phrases=NAMES if condition != "none" else (),
                context=", ".join(NAMES) if condition != "none" else "",
            )
            for i, name in enumerate(NAMES)
        ]
        for condition, words in heard.items()
    }


def scores_of(heard: dict, **settings):
    return score_conditions(records_of(heard), **settings)


@pytest.fixture
def baseline(tmp_path):
    write_conditions(scores_of(BEFORE), tmp_path / "before" / "artifact")
    return Baseline.read(tmp_path / "before" / "artifact")


def made_up(seed: int, *, heard_share: float) -> dict[str, list[ScoredUtterance]]:
    """Sixty utterances of one to three names, each heard or replaced by chance, and more of them in context."""
    draws, found = np.random.default_rng(3), {"none": [], "right": []}
    chance = np.random.default_rng(seed)
    for i in range(60):
        said = [*draws.choice(["anna", "bela", "cora", "dora"], size=draws.integers(1, 4), replace=False)]
        for condition, share in (("none", heard_share), ("right", heard_share + 0.2)):
            heard = [name if chance.random() < share else "x" for name in said]
            utterance = ScoredUtterance(f"u{i:02d}", " ".join(said), " ".join(heard), keywords=tuple(said))
            found[condition].append(replace(utterance, phrases=tuple(said) if condition == "right" else ()))
    return found


def resampled(columns_NC: np.ndarray, statistic, *, seed: int) -> list[float]:
    """The percentile interval of 1000 resamples of rows, each a multinomial draw over the distinct ones."""
    rows_KC, counts_K = np.unique(columns_NC, axis=0, return_counts=True)
    draws_RK = np.random.default_rng(seed).multinomial(len(columns_NC), counts_K / len(columns_NC), size=1000)
    return np.quantile(np.array([statistic(*(draw_K @ rows_KC)) for draw_K in draws_RK]), [0.025, 0.975]).tolist()


def test_rates_stand_before_and_after_under_every_condition_of_both(baseline):
    comparison = baseline.compare(scores_of(LEARNT | {"wrong": ("x", "x", "x", "x")}))
    assert (comparison.name, comparison.metric, list(comparison.changes)) == ("before", "wer", ["none", "right"])
    none, right = comparison.changes["none"], comparison.changes["right"]
    assert (none["wer"].before, none["wer"].after) == (4 / 12, 2 / 12)
    assert none["wer"].difference == pytest.approx(-2 / 12)
    assert (none["recall"].before, none["recall"].after) == (0, 2 / 4)
    assert set(none) == {"wer", "recall", "f1"}, "of strict recall and echoes there is nothing to say without context"
    assert (right["wer"].difference, right["recall"].difference, right["f1"].difference) == (0, 0, 0)


def test_who_hears_the_easy_half_by_itself_loses_strict_recall_by_its_own_measure_alone(baseline):
    right = baseline.compare(scores_of(LEARNT)).changes["right"]
    assert (right["strict_recall"].before, right["strict_recall"].after) == (2 / 4, 0 / 2)
    assert (right["strict_recall_fixed"].before, right["strict_recall_fixed"].after) == (2 / 4, 2 / 4)


def test_a_name_that_is_lost_with_context_is_lost_by_either_measure(baseline):
    right = baseline.compare(scores_of(LOST)).changes["right"]
    assert right["strict_recall"].difference == right["strict_recall_fixed"].difference == -1 / 4


def test_intervals_are_those_of_drawing_the_same_utterances_for_both(tmp_path):
    before, after = made_up(1, heard_share=0.5), made_up(2, heard_share=0.6)
    write_conditions(score_conditions(before), tmp_path / "before")
    comparison = Baseline.read(tmp_path / "before", seed=5).compare(score_conditions(after), seed=5)

    def wrong(records) -> list[int]:
        return [sum(a != b for a, b in zip(one.reference.split(), one.hypothesis.split())) for one in records]

    def missed_and_regained(plain, context) -> np.ndarray:
        """Counted name by name: no name is said twice in an utterance."""
        rows = []
        for free, told in zip(plain, context):
            missed = [name for name in free.keywords if name not in free.hypothesis.split()]
            rows.append((sum(name in told.hypothesis.split() for name in missed), len(missed)))
        return np.array(rows)

    words_N = [len(one.reference.split()) for one in before["none"]]
    for condition in ("none", "right"):
        columns_NC = np.stack([wrong(before[condition]), wrong(after[condition]), words_N], axis=1)
        expected = resampled(columns_NC, lambda first, second, words: (second - first) / words, seed=5)
        change = comparison.changes[condition]["wer"]
        assert list(change.interval[:2]) == pytest.approx(expected, abs=1e-12)
        assert expected[0] <= change.difference <= expected[1] and expected[0] < expected[1]
    first_N2 = missed_and_regained(before["none"], before["right"])
    for rate, plain in (("strict_recall_fixed", before["none"]), ("strict_recall", after["none"])):
        second_N2 = missed_and_regained(plain, after["right"])
        expected = resampled(np.hstack([first_N2, second_N2]), lambda a, b, c, d: c / d - a / b, seed=5)
        change = comparison.changes["right"][rate]
        (a, b), (c, d) = first_N2.sum(axis=0), second_N2.sum(axis=0)
        assert (change.before, change.after) == (a / b, c / d)
        assert list(change.interval[:2]) == pytest.approx(expected, abs=1e-12)
    fixed, own = (comparison.changes["right"][rate].after for rate in ("strict_recall_fixed", "strict_recall"))
    assert fixed != own


def test_nothing_changes_against_itself_in_any_order_of_utterances(tmp_path):
    records = made_up(1, heard_share=0.5)
    write_conditions(score_conditions(records), tmp_path)
    again = Baseline.read(tmp_path).compare(score_conditions({name: side[::-1] for name, side in records.items()}))
    for condition, changes in again.changes.items():
        assert all((change.difference, *change.interval[:2]) == (0, 0, 0) for change in changes.values()), condition
    assert again.improved == {"none": 0, "right": 0}
    assert again.over_limits(max_rise={"none": 0, "right": 0}, max_recall_fall={"right": 0}) == []


def test_a_limit_holds_up_to_its_value_and_no_further(baseline):
    lost = baseline.compare(scores_of(LOST))  # one word of twelve, one name of four
    assert lost.over_limits(max_rise={"none": 0, "right": 1 / 12}, max_recall_fall={"right": 0.25}) == []
    (rise,) = lost.over_limits(max_rise={"none": 0, "right": 0.08}, max_recall_fall={})
    assert "'right' has a wer of 25.00% and 16.67% in before: +8.33 [" in rise and "max_rise.right of 8.00" in rise
    (fall,) = lost.over_limits(max_rise={}, max_recall_fall={"right": 0.24})
    assert "strict_recall_fixed of 25.00% and 50.00%" in fall and "max_recall_fall.right of 24.00" in fall
    learnt = baseline.compare(scores_of(LEARNT))
    assert learnt.over_limits(max_rise={"none": 0, "right": 0}, max_recall_fall={"right": 0}) == []


def test_a_limit_on_what_was_not_compared_is_a_problem(baseline):
    (problem,) = baseline.compare(scores_of(LEARNT)).over_limits(max_rise={"wrong": 0.1}, max_recall_fall={})
    assert "max_rise.wrong is 0.1" in problem and "no wer to compare" in problem


def test_limits_that_the_baseline_does_not_allow_are_named_beforehand(baseline, tmp_path):
    baseline.require_limits(max_rise={"none": 0, "right": 0}, max_recall_fall={"right": 0.01})
    with pytest.raises(
        ValueError, match=r"max_rise\.wrong: baseline .*before.* has no condition 'wrong', only none, r"
    ):
        baseline.require_limits(max_rise={"wrong": 0}, max_recall_fall={})
    with pytest.raises(ValueError, match=r"max_recall_fall\.wrong: .* has no condition 'wrong'"):
        baseline.require_limits(max_rise={}, max_recall_fall={"wrong": 0})
    write_conditions(scores_of({"none": NAMES, "right": NAMES}), tmp_path / "perfect")
    with pytest.raises(ValueError, match=r"max_recall_fall\.right: baseline .*perfect misses no keyword"):
        Baseline.read(tmp_path / "perfect").require_limits(max_rise={"none": 0}, max_recall_fall={"right": 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "v0"}, r"different utterances \(4 and 4; 'u0' is in one of them only\)"),
        ({"reference": "ring Caitlin now"}, r"'u0' has two different references"),
        ({"keywords": ("Caitlin", "Adams")}, r"'u0' had other keywords there under condition 'none'"),
        ({"phrases": ("Caitlin",)}, r"'u0' had other phrases there under condition 'none'"),
        ({"context": "Caitlin"}, r"'u0' had other context there under condition 'none'"),
    ],
)
def test_another_corpus_or_other_contexts_are_refused_whatever_was_heard(baseline, change, message):
    records = {name: [replace(one, hypothesis="") for one in side] for name, side in records_of(BEFORE).items()}
    baseline.require_comparable({name: score(side) for name, side in records.items()})
    changed = {name: [replace(side[0], **change), *side[1:]] for name, side in records.items()}
    with pytest.raises(ValueError, match=rf"baseline .*before.*: .*{message}"):
        baseline.require_comparable({name: score(side) for name, side in changed.items()})


def test_another_normaliser_or_unit_is_refused(baseline):
    for settings in ({"normalizer": "whisper-english"}, {"unit": "char"}):
        with pytest.raises(ValueError, match=r"baseline .*before.*: reports are not comparable"):
            baseline.compare(scores_of(LEARNT, **settings))


def test_one_utterance_is_too_few(tmp_path):
    records = {"none": records_of(BEFORE)["none"][:1]}
    write_conditions(score_conditions(records), tmp_path)
    with pytest.raises(ValueError, match="needs two utterances or more"):
        Baseline.read(tmp_path).compare(score_conditions(records))


def test_a_folder_that_holds_no_evaluation_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"baseline .*: no hyp\.jsonl and summary\.json here"):
        Baseline.read(tmp_path)


def test_a_baseline_is_called_as_its_run_or_as_its_folder(tmp_path):
    for folder, name in (("run/artifact", "run"), ("rescored", "rescored")):
        write_conditions(scores_of(BEFORE), tmp_path / folder)
        assert Baseline.read(tmp_path / folder).name == name


def test_without_keywords_and_contexts_error_rates_are_compared(tmp_path):
    def plain(words):
        return {"none": [replace(one, keywords=()) for one in records_of({"none": words})["none"]]}

    write_conditions(score_conditions(plain(BEFORE["none"])), tmp_path)
    comparison = Baseline.read(tmp_path).compare(score_conditions(plain(LEARNT["none"])))
    assert {name: list(changes) for name, changes in comparison.changes.items()} == {"none": ["wer"]}


def test_metrics_have_every_difference_and_the_interval_of_the_error_rate(baseline):
    metrics = baseline.compare(scores_of(LOST)).metrics()
    assert metrics["wer_change"] == metrics["wer_change_low"] == metrics["wer_change_high"] == 0
    assert metrics["right/wer_change"] == pytest.approx(1 / 12) and metrics["right/recall_change"] == -1 / 4
    assert metrics["right/wer_change_low"] == 0 < metrics["right/wer_change"] < metrics["right/wer_change_high"]
    assert (metrics["right/strict_recall_fixed"], metrics["right/strict_recall_fixed_change"]) == (1 / 4, -1 / 4)
    assert "strict_recall_fixed" not in metrics and not {"wer", "recall", "right/recall"} & metrics.keys()


def test_files_and_report_show_before_after_and_the_difference(baseline, tmp_path):
    after = scores_of(LEARNT)
    comparison = baseline.compare(after)
    write_comparison(comparison, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "baseline.json").read_text())
    none, right = entry["conditions"]["none"], entry["conditions"]["right"]
    assert entry["baseline"] == "before" and none["rates"]["wer"]["difference"] == pytest.approx(-1 / 6)
    assert none["improved"] == comparison.improved["none"] > 0.9 and right["improved"] == 0
    assert right["rates"]["strict_recall_fixed"]["before"] == 0.5
    low, high = none["rates"]["wer"]["interval"]["fraction"]
    lines = (tmp_path / "out" / "baseline.txt").read_text().splitlines()
    assert lines[0] == "Against before"
    (line,) = [line for line in lines if line.split()[:2] == ["none", "WER"]]
    assert line.split()[2:7] == ["33.33", "16.67", "-16.67", f"[{100 * low:.2f},", f"{100 * high:.2f}]"]
    assert "\n".join(lines) + "\n" == comparison_text(comparison)
    page = write_report(after.plain, tmp_path / "report.html", conditions=after, comparison=comparison).read_text()
    assert "<h2>Against before</h2>" in page and "<td>33.33</td><td>16.67</td><td>-16.67 [" in page
    assert "Against" not in write_report(after.plain, tmp_path / "report.html", conditions=after).read_text()


def test_the_report_escapes_the_name_of_the_baseline(tmp_path):
    write_conditions(scores_of(BEFORE), tmp_path / "<b>x")
    after = scores_of(LEARNT)
    comparison = Baseline.read(tmp_path / "<b>x").compare(after)
    page = write_report(after.plain, tmp_path / "report.html", comparison=comparison).read_text()
    assert "<b>x" not in page and "Against &lt;b&gt;x" in page
