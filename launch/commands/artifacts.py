"""Commands about a finished artifact: evaluate it on a corpus, transcribe files with it, inspect it."""

import argparse
import glob
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FILES_AT_ONCE = 8


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of this family."""
    evaluate_ = commands.add_parser("evaluate", help="decode a prepared corpus, score it and write a report")
    evaluate_.add_argument("artifact")
    evaluate_.add_argument("--data", required=True, metavar="DIR", help="folder of shards")
    evaluate_.add_argument("--out", required=True, metavar="DIR", help="the results go to DIR/artifact")
    evaluate_.add_argument("--config", metavar="F", help="a YAML of the stage evaluate")
    evaluate_.add_argument("--nproc", type=int, default=1)
    evaluate_.add_argument("overrides", nargs="*", metavar="key=value")
    evaluate_.set_defaults(action=evaluate)

    tune = commands.add_parser("tune-decoding", help="choose how much a recogniser trusts contexts, on a dev set")
    tune.add_argument("artifact")
    tune.add_argument("--data", required=True, metavar="DIR", help="folder of shards, not those of a test")
    tune.add_argument("--right", required=True, metavar="DIR", help="folder of contexts with the names that are said")
    tune.add_argument("--wrong", required=True, metavar="DIR", help="folder of contexts without them")
    tune.add_argument("--out", required=True, metavar="DIR", help="the results go to DIR/artifact")
    tune.add_argument("--config", metavar="F", help="a YAML of the stage tune_decoding")
    tune.add_argument("--nproc", type=int, default=1)
    tune.add_argument("overrides", nargs="*", metavar="key=value")
    tune.set_defaults(action=tune_decoding)

    transcribe_ = commands.add_parser("transcribe", help="print the transcript of audio files, one line each")
    transcribe_.add_argument("artifact")
    transcribe_.add_argument("files", nargs="+", help="wav, flac, ogg or mp3 of any rate; patterns such as 'a/*.wav'")
    context = transcribe_.add_mutually_exclusive_group()
    context.add_argument("--context", metavar="TEXT", help="what is known beforehand, such as a dialogue or an agenda")
    context.add_argument("--context-file", metavar="F", help="the same from a text file in UTF-8")
    context.add_argument("--keywords", metavar="A,B,C", help="names and phrases that may occur")
    transcribe_.add_argument("--language", metavar="TAG", help="the language spoken, one of those the recogniser knows")
    transcribe_.add_argument(
        "--context-search",
        choices=("joint", "plain"),
        help="joint: what is implausible without the context is out (default: the recogniser's own)",
    )
    transcribe_.add_argument(
        "--context-alpha", type=float, help="weight of the context (default: the recogniser's own)"
    )
    transcribe_.add_argument("--beam-size", type=int, help="1 is greedy (default: the recogniser's own)")
    transcribe_.add_argument("--ctc-weight", type=float, help="share of the CTC head (default: the recogniser's own)")
    transcribe_.add_argument(
        "--window-seconds", type=float, default=0.0, help="decode longer audio window by window (default: all at once)"
    )
    transcribe_.add_argument(
        "--unpack-gb", type=float, help="memory for dense weights of a packed recogniser (default: by the machine)"
    )
    transcribe_.add_argument("--limit", type=int, help="the first N files only")
    transcribe_.add_argument("--json", action="store_true", help="one JSON object per line instead of text")
    transcribe_.set_defaults(action=transcribe)

    inspect_ = commands.add_parser(
        "inspect", help="print an artifact's manifest, lineage, parameter counts and bits per weight"
    )
    inspect_.add_argument("artifact")
    inspect_.set_defaults(action=inspect)


def artifact_folder(path: str) -> Path:
    """Return the artifact that a user means: the folder itself, or `artifact/` in the folder of a run."""
    folder = Path(path)
    inside = folder / "artifact"
    return inside if not (folder / "manifest.json").is_file() and (inside / "manifest.json").is_file() else folder


def evaluate(arguments: argparse.Namespace) -> int:
    """Run the stage evaluate on an artifact and print its metrics."""
    result = _on_artifact("evaluate", arguments, given={"data": arguments.data})
    if isinstance(result, int):
        return result
    comparison = result.path / "baseline.txt"
    if comparison.is_file():
        print(f"\n{comparison.read_text(encoding='utf-8')}")
    print(f"report: {result.path}")
    return 0


def tune_decoding(arguments: argparse.Namespace) -> int:
    """Run the stage tune_decoding on an artifact; print its metrics and the settings that it has chosen."""
    given = {name: getattr(arguments, name) for name in ("data", "right", "wrong")}
    result = _on_artifact("tune_decoding", arguments, given=given)
    if isinstance(result, int):
        return result
    print(f"table: {result.path}/tuning.md, figure: {result.path}/tuning.svg")
    print(" ".join(json.loads((result.path / "tuning.json").read_text())["overrides"]))
    return 0


def _on_artifact(stage: str, arguments: argparse.Namespace, *, given: dict[str, str]) -> Any:
    """Run a stage on an artifact and print its metrics. Return its result, or the exit code of one that failed."""
    from ...stages.runtime.artifacts import load_artifact
    from ..pipeline import shown
    from ..pipeline_config import yaml_argument
    from ..placement import Placement
    from .stages import run_on

    given = {"run_dir": arguments.out, "inputs.acllm": str(artifact_folder(arguments.artifact)), **given}
    overrides = [f"{key}={yaml_argument(value)}" for key, value in given.items()]
    placement = Placement(nproc=arguments.nproc)
    code = run_on(stage, arguments.config, overrides=[*overrides, *arguments.overrides], placement=placement)
    if code:
        return code
    result = load_artifact(Path(arguments.out) / "artifact", verify=False)
    for name, value in result.metrics.items():
        print(f"{name}\t{shown(name, value)}")
    return result


def transcribe(arguments: argparse.Namespace) -> int:
    """Print one line per file; a file that cannot be read is one line on stderr, and 1 at the end."""
    from ...stages.transcribe import load

    settings = {
        "context": context_text(arguments.context, arguments.context_file),
        "keywords": keywords(arguments.keywords),
        "language": arguments.language,
        "beam_size": arguments.beam_size,
        "ctc_weight": arguments.ctc_weight,
        "context_search": arguments.context_search,
        "context_alpha": arguments.context_alpha,
        "window_seconds": arguments.window_seconds,
    }
    recogniser = load(artifact_folder(arguments.artifact), unpack_gb=arguments.unpack_gb)
    failed = 0
    for files in _in_groups(expand(arguments.files)[: arguments.limit]):
        readable = list(_read(files, sample_rate=recogniser.sample_rate))
        failed += len(files) - len(readable)
        waveforms = [waveform for _, waveform in readable]
        hypotheses = recogniser.transcribe(waveforms, **settings)
        for (file, _), hypothesis in zip(readable, hypotheses, strict=True):
            print(_line(file, hypothesis, as_json=arguments.json), flush=True)
            if not hypothesis.complete:
                print(f"seedling: {file}: the transcript was cut off at its greatest length", file=sys.stderr)
    return 1 if failed else 0


def context_text(text: str | None, file: str | None) -> str | None:
    """Return the context that a user gives as text or as a file."""
    if text is not None and not text.strip():
        raise ValueError("--context is empty; write a context into it, or leave it out")
    if file is None:
        return text
    try:
        read = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8; save the context file as UTF-8") from None
    if not read.strip():
        raise ValueError(f"{file}: the context file is empty; write a context into it, or leave it out")
    return read


def keywords(text: str | None) -> list[str] | None:
    """Return the keywords of a list with commas, of whatever script."""
    if text is None:
        return None
    found = [word.strip() for word in re.split("[,，、;；\n]", text) if word.strip()]
    if not found:
        raise ValueError(f"--keywords {text!r} has no word in it; separate them by commas, as --keywords Ann,Bob")
    return found


def expand(files: Sequence[str]) -> list[str]:
    """Replace patterns by the files that match them; what matches nothing stays, to be named as unreadable."""
    expanded: list[str] = []
    for file in files:
        matches = sorted(glob.glob(file, recursive=True)) if glob.has_magic(file) and not Path(file).exists() else []
        expanded += matches or [file]
    return expanded


def _in_groups(files: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(files), FILES_AT_ONCE):
        yield files[start : start + FILES_AT_ONCE]


def _read(files: Sequence[str], *, sample_rate: int) -> Iterator[tuple[str, Any]]:
    """Yield (file, waveform_N) of the readable ones and name the others."""
    from ...data.audio import AudioError, read_audio
    from ..errors import one_line

    for file in files:
        try:
            yield file, read_audio(file, sample_rate=sample_rate)
        except (AudioError, OSError) as error:
            text = one_line(error)
            print(f"seedling: {text if file in text else f'{file}: {text}'}", file=sys.stderr)


def _line(file: str, hypothesis: Any, *, as_json: bool) -> str:
    if as_json:
        heard = {"text": hypothesis.text, "score": hypothesis.score, "complete": hypothesis.complete}
        return json.dumps({"file": file, **heard}, ensure_ascii=False)
    return f"{file}\t{hypothesis.text}"


def inspect(arguments: argparse.Namespace) -> None:
    """Print what an artifact is, what it was made from, and what is in it."""
    from ...stages.runtime.artifacts import lineage, load_artifact
    from ...stages.runtime.config import yaml_scalar

    folder = artifact_folder(arguments.artifact)
    manifest = load_artifact(folder).manifest
    print(f"{folder}: {manifest['kind']} of stage {manifest['stage']}, seedling {manifest['version']}, hashes verified")
    for title in ("metrics", "facts"):
        for name, value in manifest.get(title, {}).items():
            print(f"{title[:-1] if title == 'facts' else 'metric'}  {name}: {yaml_scalar(value)}")
    for name, count in parameters_by_part(folder).items():
        print(f"parameters  {name}: {count:,}")
    for line in packed_lines(folder):
        print(f"packed  {line}")
    for file, described in manifest["files"].items():
        print(f"file  {file}: {yaml_scalar(described)}")
    for ancestor in lineage(folder):
        made_by = f" of stage {ancestor.stage}" if ancestor.stage else ""
        problem = f"  ({ancestor.problem})" if ancestor.problem else ""
        label = f"{ancestor.name}: " if ancestor.name else ""
        print(f"lineage  {'  ' * ancestor.depth}{label}{ancestor.path} ({ancestor.kind}{made_by}){problem}")


def parameters_by_part(folder: Path) -> dict[str, int]:
    """Count the numbers in an artifact's safetensors by top-level module, from their headers alone.

    A packed matrix counts as many as it stands for.
    """
    from ...quant.storage import PACKED_TENSORS

    counts: dict[str, int] = {}
    forms = packed_forms(folder)
    for name, header in _tensors(folder, forms).items():
        matrix, _, tensor = name.rpartition(".")
        count = math.prod(header["shape"])
        if matrix in forms and tensor in PACKED_TENSORS:
            count = math.prod(forms[matrix]["shape"]) if tensor == "codes" else 0
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + count
    return counts | {"total": sum(counts.values())} if counts else {}


def packed_lines(folder: Path) -> list[str]:
    """Say how many bits packed weights take, one line for matrices whose names differ in numbers only."""
    from ...quant.storage import storage_of

    forms = packed_forms(folder)
    if not forms:
        return []
    found = _tensors(folder, forms)
    sizes = {name: end - start for name, header in found.items() for start, end in [header["data_offsets"]]}
    storage = storage_of(forms, sizes)
    lines = []
    for matrix in storage.by_pattern():
        group = "per channel" if matrix.form["group_size"] == -1 else f"groups of {matrix.form['group_size']}"
        count = f"{matrix.count} x " if matrix.count > 1 else ""
        shape = f"{count}{'x'.join(map(str, matrix.form['shape']))}"
        lines.append(
            f"{matrix.name}: {shape}, {matrix.form['bits']} bits, {group}, {matrix.form['scale_dtype']}: "
            f"{matrix.bits_per_weight:.3f} bits per weight"
        )
    return [
        *lines,
        f"in all: {storage.weights:,} weights of {storage.bits_per_weight:.3f} bits; with everything else "
        f"{storage.total_bits / 8e6:.3f} MB, {storage.ratio:.2f} times as small as with 16 bits a weight",
    ]


def packed_forms(folder: Path) -> dict[str, Any]:
    """Return the form of each packed matrix of an artifact by its name; empty where nothing is packed."""
    config = folder / "config.json"
    if not config.is_file():
        return {}
    described = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    forms = described.get("matrices") or {} if isinstance(described, dict) else described
    if not isinstance(forms, dict):
        raise ValueError(f"{config}: quantization_config is {described!r}; restore the config.json that was saved")
    return forms


def _tensors(folder: Path, forms: dict[str, Any]) -> dict[str, Any]:
    """Return shape and data_offsets of every tensor in an artifact's safetensors, from their headers alone.

    The header is JSON behind its length, eight bytes little-endian (https://huggingface.co/docs/safetensors). Packed
    tensors have the names that `forms` has, which are not always those in the file: Mixtral's mlp is block_sparse_moe
    there.
    """
    from ...quant.storage import PACKED_TENSORS

    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {name: tensor for name, tensor in header.items() if name != "__metadata__"}
    named = {f"{matrix}.{tensor}" for matrix in forms for tensor in PACKED_TENSORS}
    strange = [name for name in found.keys() - named if name.rpartition(".")[2] in PACKED_TENSORS]
    if strange:
        from ...quant.hf import name_in_memory  # transformers takes seconds

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found |= {name_in_memory(name, config): found.pop(name) for name in strange}
    return found
