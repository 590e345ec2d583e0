"""The register of mutants applies to the tree as it is; what counts as killed."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import MUTANTS
from support.mutation import Mutant, Recorder, Verdict, faults, summary

LINE = Mutant(
    area="guard",
    name="one",
    file="kairos_train/operations/guard.py",
    old="LEAST = 20",
    new="LEAST = 19",
    test="tests/unit/test_mutants.py::test_every_mutant_applies_and_its_test_is_there",
)


def test_every_mutant_applies_and_its_test_is_there():
    """A line that was written anew needs its mutant written anew: run `make mutants ONLY=…` then."""
    assert faults(MUTANTS) == []
    assert len(MUTANTS) >= 70


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"old": "LEAST = 21"}, "one: 'LEAST = 21' stands 0 times in kairos_train/operations/guard.py, not once"),
        ({"old": "self._good"}, "times in kairos_train/operations/guard.py, not once"),
        ({"new": "LEAST = ("}, "one: kairos_train/operations/guard.py is no Python any more"),
        ({"new": "LEAST = 20"}, "one: changes no line, or more than one"),
        ({"old": 'fast."""\n\n\nclass Guard:'}, "one: changes no line, or more than one"),
        ({"file": "kairos_train/nowhere.py"}, "one: there is no file kairos_train/nowhere.py"),
        ({"test": "tests/unit/test_mutants.py::test_x"}, "one: there is no test tests/unit/test_mutants.py::test_x"),
        ({"test": "tests/unit/test_x.py::test_x"}, "one: there is no test tests/unit/test_x.py::test_x"),
    ],
)
def test_a_mutant_that_does_not_apply_is_named(change, fault):
    assert faults([LINE]) == []
    found = faults([replace(LINE, **change)])
    assert any(fault in line for line in found), found


def test_a_name_is_given_once():
    assert faults([LINE, LINE]) == ["one: two mutants have this name"]


TESTS = {
    "fails": ("killed", "def test_it():\n    assert 1 == 2"),
    "raises": ("killed", "def test_it():\n    raise ValueError('shapes')"),
    "passes": ("survived", "def test_it():\n    pass"),
    "is_no_python": ("error", "def test_it(:"),
    "misses_a_name": ("error", "def test_it():\n    nowhere()"),
    "misses_an_import": ("error", "def test_it():\n    import nowhere"),
    "misses_a_name_on_a_rank": ("error", "def test_it():\n    assert False, 'rank 0: NameError: name x'"),
    "cannot_be_collected": ("error", "import nowhere\ndef test_it():\n    pass"),
    "cannot_be_set_up": (
        "error",
        "import pytest\n@pytest.fixture\ndef x():\n    raise ValueError('x')\ndef test_it(x):\n    pass",
    ),
    "skips": ("skipped", "import pytest\ndef test_it():\n    pytest.skip('no vectors')"),
    "has_no_test": ("error", ""),
}


class Apart:
    """A pytest plugin: a recorder for every file."""

    def __init__(self):
        self.recorders = defaultdict(Recorder)

    def pytest_collectreport(self, report):
        self.recorders[Path(report.nodeid).stem].pytest_collectreport(report)

    def pytest_runtest_logreport(self, report):
        self.recorders[Path(report.nodeid.partition("::")[0]).stem].pytest_runtest_logreport(report)


def test_only_a_test_that_ran_and_failed_kills(tmp_path):
    plugin = Apart()
    for name, (_, text) in TESTS.items():
        (tmp_path / f"test_mutant_{name}.py").write_text(text)
    alone = [
        "--disable-plugin-autoload",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:terminal",
        "--continue-on-collection-errors",
    ]
    pytest.main([str(tmp_path), "-c", "/dev/null", f"--rootdir={tmp_path}", *alone], plugins=[plugin])
    outcomes = {name: plugin.recorders[f"test_mutant_{name}"].verdict()[0] for name in TESTS}
    assert outcomes == {name: outcome for name, (outcome, _) in TESTS.items()}


def test_the_summary_counts_and_shows_who_survives():
    verdicts = {
        LINE: Verdict("killed", 1.0),
        replace(LINE, name="two"): Verdict("survived", 2.0),
        replace(LINE, area="other", name="three"): Verdict("skipped", 0.5, "needs vectors"),
    }
    text = summary(verdicts)
    assert [line.split() for line in text.splitlines()[1:4]] == [
        ["guard", "1", "2", "3.0"],
        ["other", "0", "1", "0.5"],
        ["all", "1", "3", "3.5"],
    ]
    assert "survived: guard: two\n    kairos_train/operations/guard.py: LEAST = 20\n    → LEAST = 19\n" in text
    assert text.endswith("1 killed of 3 registered, 1 survived, 1 skipped")
