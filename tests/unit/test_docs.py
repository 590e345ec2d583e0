"""README.md and docs/ name only paths, commands, flags, settings and make targets that exist."""

import io
import re
import shlex
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from kairos_train.cli import build_parser
from kairos_train.config.keys import MAPPINGS, all_keys

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
ROOMS = (
    "kairos_train",
    "parallel",
    "dataloaders",
    "configs",
    "slurm",
    "evaluation",
    "benchmarks",
    "tests",
    "docs",
    ".ci",
)
NEVER = re.compile(
    r"few bits|\bwidened|lives of|in a life\b|stands? in for|\b[Mm]end(s|ed|ing)?\b|\banew\b|passed over|at hand\b|"
    r"[Ww]hoever|\buntold\b|GATED layer|\bso many\b"
)
"""House words for which the field has its own; `GATED` alone is a value of configurations."""
PLACEHOLDER = re.compile(r"[A-Z_]+|.*[<>…*].*|.*\.\.\..*")


def codes(text: str) -> Iterator[str]:
    """Every line of a code block (continued lines joined) and every piece of inline code."""
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.S | re.M):
        yield from block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
    yield from re.findall(r"`([^`\n]+)`", prose)


def commands(line: str, program: str) -> Iterator[list[str]]:
    """The words behind `program` in a line of shell, up to a comment, pipe or the next command."""
    for match in re.finditer(rf"(?:^|[\s;&|/(]){re.escape(program)}(?=\s|$)([^;&|#\n]*)", line):
        yield shlex.split(match[1])


def flags_of(parser) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", parser.format_help()))


def subparsers(parser) -> dict:
    """Name -> parser of the subcommands; empty for a command that has none."""
    actions = [action for action in parser._actions if isinstance(getattr(action, "choices", None), dict)]
    return actions[0].choices if actions else {}


def all_flags(parser) -> set[str]:
    return flags_of(parser).union(*(all_flags(sub) for sub in subparsers(parser).values()))


def command_faults(words: list[str]) -> list[str]:
    parser = build_parser()
    while words and subparsers(parser):
        if words[0].startswith("-") or PLACEHOLDER.fullmatch(words[0]):
            break
        if words[0] not in subparsers(parser):
            return [f"{parser.prog} has no command {words[0]}"]
        parser = subparsers(parser)[words[0]]
        words = words[1:]
    faults = []
    for word in words:
        if word.startswith("--") and word.split("=")[0] not in flags_of(parser):
            faults.append(f"{parser.prog} has no {word}")
        elif "=" in word and not word.startswith("-") and "OVERRIDE" in parser.format_help():
            faults += override_faults(word)
    return faults


def override_faults(word: str) -> list[str]:
    key, value = word.split("=", 1)
    group = ROOT / "configs" / key
    if group.is_dir():
        known = PLACEHOLDER.fullmatch(value) or value == "null" or (group / f"{value}.yaml").is_file()
        return [] if known else [f"configs/{key} has no {value}.yaml"]
    if PLACEHOLDER.fullmatch(key) or key in all_keys() or key.rpartition(".")[0] in MAPPINGS:
        return []
    return [f"there is no setting {key}"]


def make_faults(words: list[str]) -> list[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = [word for word in words if not word.startswith("-") and "=" not in word]
    return [f"the Makefile has no target {word}" for word in named if word not in targets]


def path_faults(text: str, folder: Path) -> list[str]:
    faults = []
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target and not target.startswith("mailto:") and not (folder / target).exists():
            faults.append(f"link to {target}, which does not exist")
    for code in codes(text):
        for word in re.findall(r"[\w./*{},-]+", code):
            word = word.rstrip(".,").split("::")[0]
            if word.removeprefix("./").split("/")[0] in ROOMS and "/" in word and not re.search(r"\.\.\.|[{},]", word):
                matches = list(ROOT.glob(word.removeprefix("./"))) if "*" in word else [ROOT / word]
                if not any(match.exists() for match in matches):
                    faults.append(f"path {word}, which does not exist")
    return faults


def faults_of(text: str, folder: Path) -> list[str]:
    faults = path_faults(text, folder)
    known = all_flags(build_parser())
    for code in codes(text):
        for words in commands(code, "kairos-train"):
            faults += command_faults(words)
        for words in commands(code, "make"):
            faults += make_faults(words)
        if re.fullmatch(r"--[a-z][\w-]*", code) and code not in known:
            faults.append(f"no command has {code}")
    return faults


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_names_only_what_exists(path):
    assert faults_of(path.read_text(), path.parent) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("`kairos-train trian model=tiny`", "kairos-train has no command trian"),
        ("```\n$ .venv/bin/kairos-train data pakc X\n```", "kairos-train data has no command pakc"),
        ("```bash\nkairos-train data pack X --out Y \\\n  --encoed\n```", "kairos-train data pack has no --encoed"),
        ("`kairos-train train experiment=dmo`", "configs/experiment has no dmo.yaml"),
        ("`kairos-train train train.stesp=3`", "there is no setting train.stesp"),
        ("`make tset`", "the Makefile has no target tset"),
        ("```\nmake setup && make dmeo ENV=push2d\n```", "the Makefile has no target dmeo"),
        ("see `kairos_train/model/nowhere.py`", "path kairos_train/model/nowhere.py, which does not exist"),
        ("see `configs/nowhere/*.yaml`", "path configs/nowhere/*.yaml, which does not exist"),
        ("see [there](nowhere.md)", "link to nowhere.md, which does not exist"),
        ("the flag `--encoed`", "no command has --encoed"),
    ],
)
def test_a_name_that_does_not_exist_is_found(text, fault):
    assert faults_of(text, ROOT) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        "`kairos-train train experiment=demo stage=joint train.steps=40`",
        "`kairos-train train model=NAME KEY=VALUE`",
        "```\nkairos-train data pack SOURCE --out DIR --encode experiment=demo | tail -1  # pack\n```",
        "`make demo ENV=push2d`, `make setup PYTHON=python3.11`, `--tolerance-outputs`",
        "[configs](configs) in `kairos_train/config/schema.py`, `configs/model/*.yaml`, `tests/unit`",
        "`kairos-train --version`, `kairos-train train stage.conditions.t2v=0.5`",
    ],
)
def test_names_that_exist_pass(text):
    assert faults_of(text, ROOT) == []


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) that a reader greps: of Python the strings (docstrings, help, log lines) and comments."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from enumerate(token.string.splitlines(), token.start[0])


def sources_of_prose() -> list[Path]:
    folders = [folder for folder in ROOMS if folder not in ("tests", "docs", ".ci")]
    code = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh")]
    return [*DOCUMENTS, ROOT / "Makefile", *sorted(code)]


def test_prose_uses_the_words_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {match[0]}"
        for path in sources_of_prose()
        for line, text in prose(path)
        if (match := NEVER.search(text))
    ]
    assert found == []


def test_a_house_word_is_found_in_strings_and_comments(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        'anew = 1  # not in names\n\ndef f():\n    """Read it anew."""\n    return f"mend {anew}"  # so many\n'
    )
    found = [(line, match[0]) for line, text in prose(path) if (match := NEVER.search(text))]
    assert found == [(4, "anew"), (5, "mend"), (5, "so many")]
