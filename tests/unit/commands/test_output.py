"""The one function that shows what a command ends with: on a terminal, into a pipe, on other ranks."""

import ast
import json
import sys
from pathlib import Path

import pytest
from support.terminal import on_a_terminal, terminal

from kairos_train.cli import build_parser, main
from kairos_train.commands.output import Result, Table, cell, show

ROOT = Path(__file__).resolve().parents[3]
RESULT = Result(
    {"samples": 1234, "share": 0.5, "faults": [{"name": "a"}]},
    look={"page": Path("report/index.html"), "curves": "tensorboard --logdir runs"},
    then=["kairos-train serve policy", "kairos-train export " + "long/" * 40],
)


@pytest.fixture
def shown(monkeypatch):
    """`shown(result, as_json=…)`: what stands on a terminal of 60 columns."""

    def run(result: Result, *, as_json: bool = False) -> list[str]:
        with terminal(monkeypatch, columns=60) as screen:
            show(result, as_json=as_json)
        return screen.lines()

    return run


def test_a_terminal_gets_a_table_where_to_look_and_the_next_command(shown):
    assert shown(RESULT) == [
        "samples  1,234",
        "share    0.5",
        "",
        "where to look",
        "  page    report/index.html",
        "  curves  tensorboard --logdir runs",
        "",
        "next",
        "  kairos-train serve policy",
        f"  kairos-train export {'long/' * 40}",  # whole, to be copied
    ]


def test_headings_stand_over_columns_and_numbers_to_the_right(shown):
    table = Table([("model", 0.25, None), ("hold", 12.5, "[x]")], ("row", "error", "note"))
    head, line, *rows = [line for line in shown(Result({}, table)) if line]
    assert head.split() == ["row", "error", "note"]
    assert set(line.strip()) <= {"─", " "}
    assert [row.split() for row in rows] == [["model", "0.25", "–"], ["hold", "12.5", "[x]"]]
    assert rows[0].index("0.25") + 4 == rows[1].index("12.5") + 4 == head.index("error") + 5


def test_a_pipe_and_a_terminal_that_asks_for_it_get_the_same_json(shown, capsys):
    asked = "\n".join(shown(RESULT, as_json=True))
    show(RESULT, as_json=False)  # pytest's capture is no terminal
    piped = capsys.readouterr().out
    assert json.loads(piped) == json.loads(asked) == RESULT.content


def test_a_document_is_the_same_everywhere_but_for_json(shown, capsys):
    document = Result({"a": 1}, document="a: 1\n", look={"page": "x"})
    assert shown(document) == ["a: 1"]
    show(document, as_json=False)
    assert capsys.readouterr().out == "a: 1\n"
    show(document, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_what_ends_without_a_result_needs_no_package_to_say_so(shown, monkeypatch):
    """A server, where the project is installed with the extra `serve` alone."""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(Result()) == []


def test_other_ranks_show_nothing_and_give_the_exit_code(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert show(Result({"a": 1}, code=3), as_json=True) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (True, "yes"), (1234567, "1,234,567"), (1 / 3, "0.3333"), ([0.5, None], "0.5, –"), (Path("a"), "a")],
)
def test_values_of_a_table(value, text):
    assert cell(value) == text


# --- all commands ---


def test_every_command_takes_json_and_none_prints_by_itself():
    """Only what is not a command's end goes past `show`: lines of a job or a server while it runs, errors."""
    while_it_runs = {"kairos_train/commands/launch.py": 1, "kairos_train/commands/output.py": 2}
    for path in sorted((ROOT / "kairos_train/commands").glob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printed = [c for c in calls if getattr(c.func, "id", "") == "print" or getattr(c.func, "attr", "") == "print"]
        file = str(path.relative_to(ROOT))
        if file != "kairos_train/commands/output.py":
            assert len(printed) == while_it_runs.get(file, 0), file
    for parser in leaves(build_parser()):
        assert "--json" in parser.format_help(), parser.prog


def leaves(parser) -> list:
    actions = [action for action in parser._actions if isinstance(action.choices, dict)]
    return [leaf for action in actions for sub in action.choices.values() for leaf in leaves(sub)] or [parser]


def test_a_command_on_a_terminal_and_in_a_pipe(monkeypatch, capsys):
    text = on_a_terminal(monkeypatch, "model", "summary", "model=tiny")
    assert "model tiny: 4 layers of SWA/SWA/DSWA/GATED" in text
    assert text.endswith("next\n  kairos-train plan model=tiny")
    assert main(["model", "summary", "model=tiny"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 4
