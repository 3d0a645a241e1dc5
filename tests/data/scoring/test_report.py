"""report.html: self-contained, well formed, escaped, bounded in size."""

import base64
import re
from html.parser import HTMLParser

import pytest

from seedling.data.scoring import ScoredUtterance, score, write_report
from seedling.data.scoring.report import read_metrics

NASTY = "<script>alert('x')</script> & \"quoted\" </article>"
VOID = {"meta", "input", "br", "line", "circle", "path"}


class Tree(HTMLParser):
    """Checks that every tag is closed in order, and collects tags with their attributes and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    tree = Tree()
    tree.feed(path.read_text(encoding="utf-8"))
    tree.close()
    assert tree.open == []
    return tree


@pytest.fixture
def report():
    records = [
        ScoredUtterance("first", "call mark now", "call marc now", 1.5, ("call marc now", NASTY), (-0.1, -2.0), 0.1),
        ScoredUtterance(NASTY, "play " + NASTY, NASTY, 2.0),
        ScoredUtterance("third", "", "from nothing"),
        ScoredUtterance("fourth", "right", "right", 0.5),
    ]
    return score(records, normalizer="none", equivalences=[["marc", "mark"]])


def rows():
    return [{"step": s, "train/loss": 3 - s / 50, "valid/<dev>/wer": 0.5} for s in range(1, 100)]


def test_the_page_is_well_formed_and_loads_nothing_from_outside(report, tmp_path):
    path = write_report(
        report,
        tmp_path / "deep" / "report.html",
        title=NASTY,
        others={NASTY: report},
        stages={NASTY: {"wer": 0.125, "seconds": 300.0, "note": NASTY}},
        runs={NASTY: rows()},
        details={"decode": {"beam": NASTY}},
        audio=lambda key: (b"fLaC" + key.encode(), "audio/flac"),
    )
    tree = parse(path)
    for tag, attributes in tree.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    page = path.read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_text_from_models_is_shown_and_never_executed(report, tmp_path):
    tree = parse(write_report(report, tmp_path / "report.html", title=NASTY))
    assert [tag for tag, _ in tree.tags].count("script") == 1
    assert any(NASTY in text for text in tree.text)


def test_wrong_utterances_are_listed_worst_first_with_their_audio(report, tmp_path):
    asked = []

    def audio(key):
        asked.append(key)
        return b"sound of " + key.encode(), "audio/ogg"

    tree = parse(write_report(report, tmp_path / "report.html", audio=audio))
    assert asked == [report.utterances[index].id for index in report.worst(40)] and "fourth" not in asked
    sources = [attributes["src"] for tag, attributes in tree.tags if tag == "audio"]
    assert [base64.b64decode(source.split(",")[1]) for source in sources] == [b"sound of " + k.encode() for k in asked]
    errors = [int(attributes["data-errors"]) for tag, attributes in tree.tags if tag == "article"]
    assert errors == sorted(errors, reverse=True) and len(errors) == 3


def test_audio_stays_under_its_limit_and_says_so(report, tmp_path):
    path = write_report(
        report, tmp_path / "report.html", audio=lambda key: (bytes(1000), "audio/flac"), max_audio_bytes=2500
    )
    page = path.read_text()
    assert page.count("<audio") == 2 and page.count("size limit") == 1


def test_unreadable_audio_costs_its_player_and_not_the_report(report, tmp_path):
    def audio(key):
        if key == "first":
            raise ValueError("shard-000001.tar: member <first> is cut off")
        return None

    page = write_report(report, tmp_path / "report.html", audio=audio).read_text()
    assert "member &lt;first&gt; is cut off" in page and "<audio" not in page and page.count("no audio") == 3


def test_alignments_are_coloured_by_kind(tmp_path):
    report = score([ScoredUtterance("u", "a b c", "a x c d")], normalizer="none")
    page = write_report(report, tmp_path / "report.html").read_text()
    kinds = re.findall(r"class='pair (\w+)'><\w+>([^<]*)</\w+><\w+>([^<]*)<", page)
    assert kinds == [("hit", "a", "a"), ("sub", "b", "x"), ("hit", "c", "c"), ("ins", "", "d")]


def test_rates_made_differently_are_marked_in_the_table(report, tmp_path):
    other = score(report.utterances, normalizer="whisper-basic")
    page = write_report(report, tmp_path / "report.html", others={"same": report, "other": other}).read_text()
    assert page.count("not comparable") == 1


def test_a_perfect_result_and_a_rate_over_nothing_have_a_page_too(tmp_path):
    perfect = score([ScoredUtterance("u", "a", "a")], normalizer="none")
    page = write_report(perfect, tmp_path / "perfect.html")
    parse(page)
    assert "Every utterance is right" in page.read_text()
    parse(write_report(score([ScoredUtterance("u", "", "a")], normalizer="none"), tmp_path / "nothing.html"))


def test_the_same_input_gives_the_same_page(report, tmp_path):
    first = write_report(report, tmp_path / "1.html", runs={"sft": rows()}).read_bytes()
    assert first == write_report(report, tmp_path / "2.html", runs={"sft": rows()}).read_bytes()


def test_metrics_of_a_running_job_may_end_in_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "tra')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.0}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        read_metrics(path)
