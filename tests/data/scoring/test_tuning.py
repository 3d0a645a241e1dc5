"""Choosing the settings of the search: the limits first, then recall, then errors, then the smaller weight."""

from xml.etree import ElementTree

from seedling.data.scoring.tuning import Choice, Trial, choose, tuning_figure, tuning_table


def trial(alpha, *, recall, right=0.1, wrong=0.1, echo=0.0, chance=0.0, prune=5.0) -> Trial:
    rates = {
        "none": {"wer": 0.1, "recall": 0.3},
        "right": {"wer": right, "strict_recall": recall, "recall": recall},
        "wrong": {"wer": wrong, "echo_rate": echo, "echo_rate_chance": chance, "conflict_rate": None},
    }
    return Trial({"context_prune": prune, "context_alpha": alpha}, rates, "wer")


def chosen(*trials, max_loss=0.003, max_echo=0.02) -> Choice:
    return choose(trials, max_loss=max_loss, max_echo=max_echo)


def test_the_most_recall_that_keeps_the_limits_is_chosen():
    modest, best = trial(0.5, recall=0.5), trial(1.0, recall=0.7, wrong=0.103, echo=0.05, chance=0.03)
    harmful, parrot = trial(2.0, recall=0.9, wrong=0.104), trial(4.0, recall=0.95, echo=0.03)
    assert chosen(modest, harmful, best, parrot) == Choice(best, allowed=True)


def test_equal_recall_is_decided_by_errors_and_then_by_the_smaller_weight():
    worse, better, heavier = (
        trial(0.5, recall=0.5, right=0.09),
        trial(1.0, recall=0.5, right=0.05),
        trial(2.0, recall=0.5, right=0.05),
    )
    assert chosen(heavier, worse, better).trial is better


def test_where_every_setting_harms_the_least_harmful_one_is_named_and_not_allowed():
    little, much = trial(0.5, recall=0.1, wrong=0.12), trial(2.0, recall=0.9, wrong=0.3)
    assert chosen(much, little) == Choice(little, allowed=False)


def test_table_and_figure_show_every_trial_and_mark_the_chosen_one():
    trials = [trial(a, recall=a / 10, wrong=0.1 + a / 100, prune=p) for p in (3.0, 8.0) for a in (0.5, 1.0, 2.0)]
    limits = {"max_loss": 0.01, "max_echo": 0.02}
    best = choose(trials, **limits).trial
    table = tuning_table(trials, best, **limits)
    rows = table.splitlines()
    assert len(rows) == 2 + 1 + len(trials)
    assert [row for row in rows if "chosen" in row] == [next(row for row in rows if row.startswith("| 3 | 1 |"))]
    assert sum("harms" in row for row in rows) == 2
    assert len({row.count("|") for row in rows}) == 1
    figure = tuning_figure(trials, best, along="context_alpha", max_loss=0.01)
    root = ElementTree.fromstring(figure)
    dots = [node for node in root.iter() if node.tag.endswith("circle") and "r" in node.attrib and node.get("r") == "4"]
    assert len(dots) >= len(trials) + 1
    assert "prune 3" in figure and "prune 8" in figure
