"""What the README and the guides tell a user to type exists: commands parse, make targets and files are there."""

import re
import shlex
from pathlib import Path

import pytest

from seedling.launch.cli import parse
from seedling.launch.stage_lookup import find_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PROMPT = r"(?:\$ )?(?:\.venv/bin/)?"


def typed(page: Path) -> list[str]:
    """Return the `seedling ...` and `make ...` lines of a page, in its code blocks (continued lines joined), inline."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    return [re.sub(f"^{PROMPT}", "", line) for line in lines if re.match(rf"{PROMPT}(seedling|make) \S", line)]


def wrong_with(line: str) -> str:
    """Say what a user who types this line would stumble over; "" for a line that is right."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        wanted = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        return "".join(f"no make target {word}" for word in wanted if word not in TARGETS)
    # [optional], A|B and ... belong to a synopsis.
    words = [word.strip("[]") for word in words[1:] if word.strip("[].") not in ("", "options")]
    try:
        arguments = parse(words)
    except SystemExit as ended:
        if ended.code:
            return "the command line does not parse"
        return ""
    if arguments.command == "pipeline" and not arguments.file.isupper():
        words.append(str(find_config(arguments.file, folder="pipelines")))
    missing = [word for word in words if re.fullmatch(r"configs/\S+\.yaml", word) and not (ROOT / word).is_file()]
    return "".join(f"no file {word}" for word in missing)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_tells_to_type_exists(page):
    wrong = [f"{line}: {problem}" for line in typed(page) if (problem := wrong_with(line))]
    assert not wrong, "\n".join(wrong)


def test_the_readme_tells_how_to_start():
    lines = typed(ROOT / "README.md")
    assert any(line.startswith("make demo") for line in lines), "README.md does not say `make demo`"
    assert any(line.startswith("seedling transcribe ") for line in lines), "README.md does not say how to transcribe"


@pytest.mark.parametrize(
    "line", ["make dmeo", "seedling trian sft", "seedling run --nproc", "seedling prepare a b --out c"]
)
def test_a_wrong_line_would_be_found(line, capsys):
    assert wrong_with(line)


def test_a_right_line_is_not_complained_about():
    assert not wrong_with("make test ARGS='-k plan'  # some of it")
    assert not wrong_with("seedling run STAGE --config F [key=value ...] [--nproc N]".replace("N]", "2]"))
