"""The files of a scored set, and scoring again from them without the model.

hyp.jsonl     one utterance a line: id, ref_raw, hyp_raw, ref, hyp, nbest, scores, seconds, rtf, memory_gb, lang,
              keywords, phrases, context
hyp.trn       `text (utt)`, tokens of the headline unit, for sclite; ref.trn the same for references
errs.txt      the lines that scripts look for: %WER, %SER, PER-UTT DETAILS, SUBSTITUTIONS, DELETIONS, INSERTIONS
summary.json  rates as percent and as fraction, intervals, counts, the stamp, model hash, decode options; written last

Rescoring reads ref_raw and hyp_raw only: normalising a normalised text again changes word counts.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from .bootstrap import Interval
from .errors import DELETION, HIT, INSERTION, ErrorRate, tokenize
from .normalize import Normalizer
from .result import ScoredUtterance, ScoreReport, score

_NOT_IN_TRN_ID = re.compile(r"[\s()%]")


def write_score_folder(
    report: ScoreReport,
    out: str | Path,
    *,
    model_hash: str | None = None,
    decode: Mapping | None = None,
    conditions: Mapping[str, Mapping] | None = None,
) -> dict:
    """Write the five files to `out` (made if absent) and return what summary.json holds.

    conditions: {name: {rate: fraction}}, the report's and those of other conditions side by side, for the summary.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    summary = summarize(report, model_hash=model_hash, decode=decode)
    if conditions:
        summary["conditions"] = {name: dict(rates) for name, rates in conditions.items()}
    _write_lines(out / "hyp.jsonl", (json.dumps(row, ensure_ascii=False) for row in _hypothesis_rows(report)))
    ids = [utterance.id for utterance in report.utterances]
    _write_lines(out / "ref.trn", _trn_lines(ids, report.references, unit=report.stamp.unit))
    _write_lines(out / "hyp.trn", _trn_lines(ids, report.hypotheses, unit=report.stamp.unit))
    _write_lines(out / "errs.txt", _error_lines(report))
    _write_lines(out / "summary.json", [json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)])
    return summary


def read_hypotheses(path: str | Path) -> list[ScoredUtterance]:
    """Read hyp.jsonl back; only id, ref_raw and hyp_raw are required, so other systems' output can be scored too."""
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                records.append(_record(line, where=f"{path}:{number}"))
    return records


def score_folder(
    hyp_jsonl: str | Path,
    out: str | Path,
    *,
    normalizer: str | Normalizer | None = None,
    unit: str | None = None,
    equivalences: Sequence[Collection[str]] | None = None,
    seed: int = 0,
) -> ScoreReport:
    """Score the raw texts of `hyp_jsonl` again and write the files to `out`.

    Model hash and decode options are taken from the summary.json beside `hyp_jsonl`, where there is one.
    """
    report = score(read_hypotheses(hyp_jsonl), normalizer=normalizer, unit=unit, equivalences=equivalences, seed=seed)
    known = read_summary(Path(hyp_jsonl).parent)
    write_score_folder(report, out, model_hash=known.get("model_hash"), decode=known.get("decode"))
    return report


def read_summary(folder: Path) -> dict:
    """Return what summary.json in a folder says, {} where there is none."""
    file = folder / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def summarize(report: ScoreReport, *, model_hash: str | None = None, decode: Mapping | None = None) -> dict:
    """Return the content of summary.json; a rate that is not finite (errors over nothing) is null."""
    headline = report.headline
    return {
        "metric": headline.metric,
        **rate_entry(headline),
        "rates": {name: rate_entry(rate) for name, rate in report.rates.items()},
        "languages": {lang: {"metric": rate.metric, **rate_entry(rate)} for lang, rate in report.languages.items()},
        "merged": rate_entry(report.merged) if report.merged else None,
        "equivalences": [list(group) for group in report.equivalences],
        "stamp": report.stamp._asdict(),
        "diagnostics": asdict(report.diagnostics),
        "utterances": len(report.utterances),
        "seconds": report.seconds,
        "rtf": report.rtf,
        "memory_gb": report.memory_gb,
        "bootstrap_seed": report.seed,
        "model_hash": model_hash,
        "decode": {name: _in_json(value) for name, value in decode.items()} if decode is not None else None,
    }


def rate_entry(rate: ErrorRate) -> dict:
    """Return a rate as JSON numbers: percent and unrounded fraction, interval, counts."""
    counts = rate.counts
    return {
        "percent": finite(rate.percent),
        "fraction": finite(rate.fraction),
        "interval": interval_entry(rate.interval) if rate.interval else None,
        "errors": counts.errors,
        "reference_tokens": counts.reference_tokens,
        "substitutions": counts.substitutions,
        "deletions": counts.deletions,
        "insertions": counts.insertions,
        "hits": counts.hits,
    }


def interval_entry(interval: Interval) -> dict:
    """Return an interval as JSON numbers."""
    return {
        "confidence": interval.confidence,
        "percent": [100 * interval.low, 100 * interval.high],
        "fraction": [interval.low, interval.high],
        "replicates": interval.replicates,
    }


def finite(number: float) -> float | None:
    """Return a number that JSON can hold, None for the others."""
    return number if math.isfinite(number) else None


def _in_json(value: object) -> object:
    """JSON has no infinity, which settings of the search may have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _record(line: str, *, where: str) -> ScoredUtterance:
    try:
        row = json.loads(line)
        return ScoredUtterance(
            id=row["id"],
            reference=row["ref_raw"],
            hypothesis=row["hyp_raw"],
            seconds=row.get("seconds") or 0.0,
            nbest=tuple(row.get("nbest") or ()),
            scores=tuple(row.get("scores") or ()),
            rtf=row.get("rtf"),
            memory_gb=row.get("memory_gb"),
            lang=row.get("lang") or "",
            keywords=tuple(row.get("keywords") or ()),
            phrases=tuple(row.get("phrases") or ()),
            context=row.get("context") or "",
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); is the file cut off?") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{where}: each line must be an object with id, ref_raw and hyp_raw") from None


def _hypothesis_rows(report: ScoreReport) -> Iterator[dict]:
    for utterance, reference, hypothesis in zip(report.utterances, report.references, report.hypotheses):
        yield {
            "id": utterance.id,
            "ref_raw": utterance.reference,
            "hyp_raw": utterance.hypothesis,
            "ref": reference,
            "hyp": hypothesis,
            "nbest": list(utterance.nbest),
            "scores": list(utterance.scores),
            "seconds": utterance.seconds,
            "rtf": utterance.rtf,
            "memory_gb": utterance.memory_gb,
            "lang": utterance.lang,
            "keywords": list(utterance.keywords),
            "phrases": list(utterance.phrases),
            "context": utterance.context,
        }


def _trn_lines(ids: Iterable[str], texts: Iterable[str], *, unit: str) -> Iterator[str]:
    """Yield `text (utt)`. Spaces and brackets of an id are percent-encoded: sclite ends the id there."""
    for id_, text in zip(ids, texts):
        # sclite splits at spaces: a space that counts as a character needs a name.
        tokens = ["<space>" if token == " " else token for token in tokenize(text, unit)]
        trn_id = _NOT_IN_TRN_ID.sub(lambda match: quote(match[0], safe=""), id_)
        yield " ".join([*tokens, f"({trn_id})"])


def _error_lines(report: ScoreReport) -> Iterator[str]:
    wrong = round(report.diagnostics.sentence_error_rate * len(report.utterances))
    counts = report.headline.counts
    yield str(report.headline)
    yield f"%SER {100 * wrong / len(report.utterances):.2f} [ {wrong} / {len(report.utterances)} ]"
    if report.headline.interval:
        low, high, confidence, _ = report.headline.interval
        yield f"Interval {100 * low:.2f} .. {100 * high:.2f} ({confidence:.0%}, bootstrap over utterances)"
    if report.merged:
        # Not in first place of the line: scripts that take every %WER would find two.
        yield f"With words that sound alike merged: {report.merged}"
    yield f"Normaliser {report.stamp.normalizer} {report.stamp.normalizer_version}, unit {report.stamp.unit}"
    yield (
        f"Errors: {counts.insertions} insertions, {counts.deletions} deletions, {counts.substitutions} substitutions, "
        f"over {counts.reference_tokens} reference tokens ({counts.hits} correct)"
    )
    yield ""
    yield "PER-UTT DETAILS: correct or (ref->hyp)"
    for index, utterance in enumerate(report.utterances):
        yield f"{utterance.id}:\t" + " ".join(_alignment_tokens(report, index))
    yield from _confusion_lines(report)


def _alignment_tokens(report: ScoreReport, index: int) -> Iterator[str]:
    for kind, reference, hypothesis in report.alignment(index):
        if kind == HIT:
            yield "<space>" if reference == " " else str(reference)
        else:
            yield f"({'*' if kind == INSERTION else reference}->{'*' if kind == DELETION else hypothesis})"


def _confusion_lines(report: ScoreReport) -> Iterator[str]:
    confusions = report.confusions
    yield ""
    yield "SUBSTITUTIONS: count ref -> hyp"
    for (reference, hypothesis), count in _most_common(confusions.substitutions):
        yield f"{count} {reference} -> {hypothesis}"
    yield ""
    yield "DELETIONS: count ref"
    yield from (f"{count} {token}" for token, count in _most_common(confusions.deletions))
    yield ""
    yield "INSERTIONS: count hyp"
    yield from (f"{count} {token}" for token, count in _most_common(confusions.insertions))


def _most_common(counter: Mapping) -> list[tuple]:
    """Order by count, then alphabet: Counter.most_common leaves ties in the order of the corpus."""
    return sorted(counter.items(), key=lambda item: (-item[1], item[0]))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
