"""Recorded human speech in three languages: error rates on the dev sets, beside those of models that cannot listen.

    python benchmarks/human_speech.py --out runs/human_speech [--quick] [STEP.key=value ...]

SEEDLING_SPEECH names the recordings. What has no manifest yet is made first, in OUT/inputs: composed digit strings and
the LM's text, and training manifests without any sentence of a dev set. Then the pipeline human_speech runs, and the
same dev sets are decoded by an untrained model, and by the trained one with silence or another utterance's audio in its
ears: its language model alone, which must do much worse. Prints a markdown table, also written to OUT/table.md. What is
finished is not repeated. docs/human_speech.md has the times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

# Name, as steps and files have it -> manifest in the folder of recordings.
TRAIN = {
    "fsdd_isolated": "fsdd/isolated_train.jsonl",
    "arabic_isolated": "arabic_digits/isolated_train.jsonl",
    "kathleen_en": "kathleen_en/train.jsonl",
    "kerstin_de": "kerstin_de/train.jsonl",
    "librispeech_250": "librispeech_250/train.jsonl",
}
DEV = {
    "fsdd_isolated": "fsdd/isolated_dev.jsonl",
    "fsdd_strings": "fsdd/strings_dev.jsonl",
    "arabic_isolated": "arabic_digits/isolated_dev.jsonl",
    "arabic_strings": "arabic_digits/strings_dev.jsonl",
    "kathleen_en": "kathleen_en/dev.jsonl",
    "kerstin_de": "kerstin_de/dev.jsonl",
    "librispeech_250": "librispeech_250/dev.jsonl",
}
# Set of composed strings -> the folder of its isolated digits, the language.
COMPOSED = {"fsdd_strings": ("fsdd", "en"), "arabic_strings": ("arabic_digits", "ar")}
SAMPLE_RATE = 16000
# The LM sees about half of its text once. So LibriSpeech is thinned and the few German sentences are repeated, or the
# vocabulary would have hardly a German word.
LIBRISPEECH_EVERY = 2
TRANSCRIPT_REPEATS = 5
LM_DIGIT_STRINGS = 4000  # of each language
LM_VALID_SENTENCES = 300
PIECE_WORDS = (2, 20)
BASELINES = {"untrained": ("untrained", "own"), "text only": ("sft", "silence"), "other audio": ("sft", "other")}
QUICK_UTTERANCES = 12


class Utterance(NamedTuple):
    """What the inputs need of a manifest's line; `audio` is a path."""

    id: str
    audio: str
    seconds: float
    text: str
    speaker: str
    lang: str


# --- texts: nothing of a dev set may be learnt -----------------------------------------------------------------------


def spoken(text: str) -> str:
    """Return lower-case words without punctuation, apostrophes kept: the form in which texts are compared."""
    return " ".join(re.sub(r"[^\w']|_", " ", text.lower()).split())


class HeldOut:
    """Says whether a text gives away a dev set.

    A dev sentence does, also inside a longer text if it has three words or more. A dev string of digits does as a
    whole: within a longer string it tells nothing, since digits are drawn uniformly. A single digit is no sentence.
    """

    def __init__(self, *, sentences: Iterable[str], strings: Iterable[str]):
        sentences = {spoken(text) for text in sentences}
        self.whole = sentences | {text for text in map(spoken, strings) if " " in text}
        self.inside = [f" {text} " for text in sorted(sentences) if text.count(" ") >= 2]

    @classmethod
    def of(cls, manifests: dict[str, list[Utterance]]) -> HeldOut:
        """The dev sets, by name."""
        digits = {name for name in manifests if name.startswith(("fsdd", "arabic"))}
        texts = {name: [utterance.text for utterance in utterances] for name, utterances in manifests.items()}
        return cls(
            sentences=[text for name in texts if name not in digits for text in texts[name]],
            strings=[text for name in digits for text in texts[name]],
        )

    def holds(self, text: str) -> bool:
        text = spoken(text)
        padded = f" {text} "
        return text in self.whole or any(inside in padded for inside in self.inside)


def pieces(text: str, *, draw: random.Random) -> Iterator[str]:
    """Cut a text into pieces of 2 to 20 words, so that the LM meets sentences of every length; none is left alone."""
    words, low, high = text.split(), *PIECE_WORDS
    at = 0
    while at < len(words):
        count = draw.randint(low, high)
        if len(words) - at - count < low:
            count = len(words) - at
        yield " ".join(words[at : at + count])
        at += count


def digit_strings(digits: Sequence[str], *, count: int, draw: random.Random, held_out: HeldOut) -> Iterator[str]:
    """Yield `count` strings of 1 to 7 digits."""
    while count:
        text = " ".join(draw.choices(digits, k=draw.randint(1, 7)))
        if not held_out.holds(text):
            yield text
            count -= 1


def arctic_prompts(path: Path, *, without: set[str]) -> list[str]:
    """Return the sentences of `( arctic_a0001 "Text." )` lines, except those of the prompts named in `without`.

    By name as well as by text: some were spoken in other words than they are printed.
    """
    found = re.findall(r'^\( (\S+) "(.*)" \)$', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) > 1000, f"{path}: {len(found)} prompts, where the list has 1132"
    return [spoken(text) for name, text in found if name not in without]


def lm_text(speech: Path, train: dict[str, list[Utterance]], *, held_out: HeldOut, seed: int, quick: bool) -> list[str]:
    """Return the LM's sentences, shuffled: LibriSpeech, Arctic prompts, training transcripts, digit strings."""
    draw = random.Random(f"lm-{seed}")
    librispeech = (speech / "text/librispeech_train100_transcripts.txt").read_text(encoding="utf-8").splitlines()
    librispeech = librispeech[:: 100 if quick else LIBRISPEECH_EVERY]
    dev_prompts = {json.loads(line)["prompt"] for line in _lines(speech / DEV["kathleen_en"])}
    prompts = arctic_prompts(speech / "text/cmu_arctic_prompts.txt", without=dev_prompts)
    transcripts = prompts + [u.text for name, set_ in train.items() if name not in COMPOSED for u in set_]
    lines = [piece for line in librispeech if not held_out.holds(line) for piece in pieces(line, draw=draw)]
    lines += [text for text in transcripts if " " in text for _ in range(TRANSCRIPT_REPEATS)]
    for name in COMPOSED:
        digits = sorted({word for u in train[name] for word in u.text.split()})
        lines += [u.text for u in train[name]]
        lines += digit_strings(digits, count=LM_DIGIT_STRINGS, draw=draw, held_out=held_out)
    lines = [line for line in lines if not held_out.holds(line)]
    draw.shuffle(lines)
    return lines


def set_apart(sentences: list[str], *, count: int) -> tuple[list[str], list[str]]:
    """Return (training, validation) sentences; the latter are the first `count` that occur only once."""
    occurrences = Counter(sentences)
    valid = set(islice((sentence for sentence in sentences if occurrences[sentence] == 1), count))
    return [s for s in sentences if s not in valid], [s for s in sentences if s in valid]


# --- inputs ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_set(speech: Path, name: str, manifest: str) -> list[Utterance]:
    """Read a manifest of the recordings. The id begins with the set's name, so that it is unique among all sets."""
    folder, utterances = (speech / manifest).parent, []
    for row in map(json.loads, _lines(speech / manifest)):
        audio = row["audio_filepath"]
        id_ = f"{name}/{Path(audio).stem}"
        utterances.append(
            Utterance(id_, str(folder / audio), row["duration"], row["text"], row["speaker"], row["lang"])
        )
    return utterances


def compose(speech: Path, name: str, *, out: Path, count: int, seed: int, held_out: HeldOut) -> list[Utterance]:
    """Write `count` strings of 2 to 7 training digits as FLAC below `out`, none of them a dev string."""
    source, lang = COMPOSED[name]
    strings = _composer(speech)(source, split="train", root=speech, seed=seed, lo=2, hi=7)
    folder = out / "audio" / name
    folder.mkdir(parents=True)
    utterances: list[Utterance] = []
    while len(utterances) < count:
        waveform_N, text, speaker = strings.sample()
        if held_out.holds(text):
            continue
        stem = f"{speaker}_{len(utterances):04d}"
        soundfile.write(folder / f"{stem}.flac", np.clip(waveform_N, -1, 1), SAMPLE_RATE, subtype="PCM_16")
        audio = f"audio/{name}/{stem}.flac"
        utterances.append(Utterance(f"{name}/{stem}", audio, len(waveform_N) / SAMPLE_RATE, text, speaker, lang))
    return utterances


def _composer(speech: Path) -> type:
    """The recordings' own rule for joining digits: their dev strings were made with it."""
    spec = importlib.util.spec_from_file_location("compose_digit_strings", speech / "compose_digit_strings.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DigitStrings


def write_manifest(path: Path, utterances: list[Utterance]) -> None:
    keys = ("id", "audio_filepath", "duration", "text", "speaker", "lang")
    rows = (json.dumps(dict(zip(keys, utterance)), ensure_ascii=False) for utterance in utterances)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


STARTED = ".started"  # marks a folder as this script's own before settings.json says that it is whole


def write_inputs(speech: Path, out: Path, *, strings: int, seed: int, quick: bool) -> None:
    """Write `out` (training manifests, composed audio, lm_text.txt), unless it is there with the same settings."""
    settings = {"speech": str(speech), "strings": strings, "seed": seed, "quick": quick, "version": 1}
    done = out / "settings.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == settings:
        return
    if out.exists() and not done.is_file() and not (out / STARTED).is_file():
        raise ValueError(f"{out}: this folder was not made by this script; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / STARTED).touch()
    held_out = HeldOut.of({name: read_set(speech, name, manifest) for name, manifest in DEV.items()})
    train: dict[str, list[Utterance]] = {}
    for name, manifest in TRAIN.items():
        found = read_set(speech, name, manifest)
        train[name] = [utterance for utterance in found if not held_out.holds(utterance.text)]
        if len(train[name]) < len(found):
            print(f"{name}: {len(found) - len(train[name])} training utterances say a dev sentence and are left out")
    for name in COMPOSED:
        train[name] = compose(speech, name, out=out, count=strings, seed=seed, held_out=held_out)
    sentences = lm_text(speech, train, held_out=held_out, seed=seed, quick=quick)
    texts = [utterance.text for utterances in train.values() for utterance in utterances]
    leaked = [text for text in sentences + texts if held_out.holds(text)]
    assert not leaked, f"{len(leaked)} texts of dev sets are among the inputs, the first: {leaked[0]}"
    for name, utterances in train.items():
        write_manifest(out / f"{name}.jsonl", utterances)
    for file, lines in zip(("lm_text.txt", "lm_valid.txt"), set_apart(sentences, count=LM_VALID_SENTENCES)):
        (out / file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    done.write_text(json.dumps(settings), encoding="utf-8")
    hours = sum(utterance.seconds for utterances in train.values() for utterance in utterances) / 3600
    words = sum(len(line.split()) for line in sentences)
    print(f"{out}: {len(texts):,} utterances, {hours:.2f} h; {len(sentences):,} sentences, {words:,} words of text")


# --- runs ------------------------------------------------------------------------------------------------------------


def quick_overrides() -> list[str]:
    """A run of minutes that shows that everything works and nothing else: a dozen utterances a set, a few steps."""
    steps = [f"train_{name}.limit={QUICK_UTTERANCES}" for name in (*TRAIN, *COMPOSED)]
    steps += [f"dev_{name}.limit={QUICK_UTTERANCES}" for name in DEV]
    steps += ["lm_pretrain.lm.num_layers=1", "lm_pretrain.train.max_steps=4", "lm_pretrain.train.log_every=2"]
    steps += [f"{step}.cmvn_batches=2" for step in ("untrained", "sft")]
    return [*steps, "sft.train.max_steps=4", "sft.ctc_steps=2", "sft.train.log_every=2", "sft.train.eval_every=4"]


def run_baselines(out: Path) -> None:
    """Decode every dev set with every baseline into OUT/baselines, in this process: 21 starts would take minutes."""
    from seedling.launch.job import run_job

    for baseline, (step, audio) in BASELINES.items():
        for name in DEV:
            run_dir, corpus = _baseline_dir(out, baseline, name), out / f"dev_{name}"
            if _is_current(run_dir / "artifact", corpus):
                continue
            print(f"\n== baseline {baseline} on {name}", flush=True)
            overrides = [f"run_dir={run_dir}", f"inputs.acllm={out / step / 'artifact'}", f"data={corpus}"]
            run_job("evaluate", None, overrides=[*overrides, f"audio={audio}"])


def _baseline_dir(out: Path, baseline: str, name: str) -> Path:
    return out / "baselines" / baseline.replace(" ", "_") / name


def _is_current(artifact: Path, corpus: Path) -> bool:
    """Whether an evaluation is there, of the model and the corpus that are there now."""
    from seedling.stages.runtime.artifacts import lineage

    manifest = artifact / "manifest.json"
    if not manifest.is_file() or manifest.stat().st_mtime < (corpus / "corpus.json").stat().st_mtime:
        return False
    return not any(ancestor.problem for ancestor in lineage(artifact))


# --- the table -------------------------------------------------------------------------------------------------------


def table(own: dict[str, dict], baselines: dict[str, dict[str, dict]]) -> str:
    """Return markdown: a row per dev set from its summary.json, and a column of WER per baseline."""
    head = ["set", "utterances", "hours", "WER [95 %]", "CER", *(f"WER {name}" for name in baselines)]
    rows = [head, ["---"] * len(head)]
    for name, summary in own.items():
        wer = summary["rates"]["wer"]
        low, high = wer["interval"]["percent"]
        cells = [name, f"{summary['utterances']:,}", f"{summary['seconds'] / 3600:.2f}"]
        cells += [f"{wer['percent']:.1f} [{low:.1f}, {high:.1f}]", f"{summary['rates']['cer']['percent']:.1f}"]
        rows.append([*cells, *(f"{sets[name]['rates']['wer']['percent']:.1f}" for sets in baselines.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def facts(out: Path) -> str:
    """Return one line about the run: hours of training audio, and the seconds of the stages."""
    corpora = [json.loads((out / f"train_{name}" / "corpus.json").read_text()) for name in (*TRAIN, *COMPOSED)]
    hours = sum(corpus["seconds"] for corpus in corpora) / 3600
    stages = json.loads((out / "summary.json").read_text())["stages"]
    seconds = ", ".join(f"{name} {stages[name]['seconds']:.0f} s" for name in ("lm_pretrain", "sft"))
    utterances = sum(corpus["utterances"] for corpus in corpora)
    return f"trained on {utterances:,} utterances, {hours:.2f} h; {seconds}; rates in percent, whisper-basic"


def write_table(out: Path) -> str:
    """Read all summaries, write OUT/table.md and return its text."""

    def summary(folder: Path) -> dict:
        return json.loads((folder / "artifact" / "summary.json").read_text(encoding="utf-8"))

    own = {name: summary(out / name) for name in DEV}
    others = {baseline: {name: summary(_baseline_dir(out, baseline, name)) for name in DEV} for baseline in BASELINES}
    text = f"{table(own, others)}\n\n{facts(out)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--strings", type=int, default=500, help="composed digit strings of each language (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the composed strings and the LM's text")
    parser.add_argument("--quick", action="store_true", help="a few utterances and steps: shows only that it works")
    parser.add_argument("overrides", nargs="*", metavar="STEP.key=value", help="as for `seedling pipeline`")
    args = parser.parse_intermixed_args()
    from seedling.launch.pipeline import run_pipeline
    from seedling.launch.pipeline_config import load_pipeline

    speech = Path(os.environ.get("SEEDLING_SPEECH", ""))
    if not (speech / "compose_digit_strings.py").is_file():
        parser.error("SEEDLING_SPEECH must name the folder of recordings, with fsdd/, kathleen_en/, text/, ...")
    strings = QUICK_UTTERANCES if args.quick else args.strings
    overrides = [f"run_dir={args.out}", *(quick_overrides() if args.quick else []), *args.overrides]
    write_inputs(speech.resolve(), args.out / "inputs", strings=strings, seed=args.seed, quick=args.quick)
    code = run_pipeline(load_pipeline("human_speech", overrides=overrides))
    if code:
        return code
    run_baselines(args.out)
    print(f"\n{write_table(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
