"""Tables of the terminal at every width, and errors in terms of options."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from branchynet import Choice, ExitCost, Outcome, Policy
from branchynet.report.console import in_options, print_bench, show, speed_lines


def shown(width, terminal, *arguments, print_=show, **options):
    out = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, markup=False, highlight=False, no_color=True
    )
    print_(out, *arguments, **options)
    return re.sub(r"\x1b\[[\d;]*m", "", out.file.getvalue())


@given(
    st.integers(5, 120),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 10**9), st.floats(0, 1), st.text("ab ", max_size=30)), min_size=1, max_size=3),
)
def test_numbers_are_whole_at_every_width(width, terminal, rows):
    rows = [(str(n), f"{share:.3%}", words) for n, share, words in rows]
    output = shown(width, terminal, {"a number": False, "share": False, "words": True}, rows, title="of all")
    numbers = [number for row in rows for number in row[:2]]
    assert [n for n in re.findall(r"[\d.]+%?", output)] == numbers  # in order, none cut and none twice
    assert "…" not in output


def test_wide_terminals_show_a_table_and_narrow_ones_lines():
    columns, rows = {"exit": False, "us": False}, [("1", "12345.6"), ("2", "23456.7")]
    assert "│" in shown(80, True, columns, rows)
    assert shown(12, True, columns, rows).split("\n\n")[:2] == ["\nexit: 1\nus: 12345.6", "exit: 2\nus: 23456.7"]
    assert "│" in shown(12, False, columns, rows)  # a log file has no width


@pytest.mark.parametrize("width", [20, 60, 80])
def test_names_of_engines_are_not_wrapped_if_there_is_space(width):
    row = {
        "runtime": "onnxruntime", "network": "b_resnet110", "batch": 64, "threads": 2, "plain_us": 123456.7,
        "branchy_us": 1234.5, "limit_us": 1200.0, "overhead": 1.03, "plain_accuracy": None, "accuracy_branchy": 0.8734,
        "exit_share": [0.25, 0.25, 0.5], "thresholds": [0.1, 0.2],
    }  # fmt: skip
    output = shown(width, True, [row], print_=print_bench)
    for part in ("onnxruntime", "b_resnet110", "123456.7", "100.01x", "87.34%"):
        assert part in output


OPTIONS = {"max_drop": "--max-drop", "confidence": "--confidence", "batch_size": "--batch", "epochs": "--epochs"}


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("max_drop=0.5 is out of range", "--max-drop 0.5 is out of range"),
        ("give max_drop or min_accuracy, not both", "give --max-drop or min_accuracy, not both"),
        ("or ask for no promise with confidence=None", "or ask for no promise with --no-promise"),
        ("batch_size must be at least 1; got 0", "--batch must be at least 1; got 0"),
        ("trained with epochs=3, but this call has epochs=4", "trained with --epochs 3, but this call has --epochs 4"),
        ("epochs must be at least 1", "--epochs must be at least 1"),
        ("more epochs must follow", "more epochs must follow"),
        ("it is no Choice (x); make it with choose(...)", "it is no Choice (x); make it with `branchynet choose`"),
        ("train again with fit(...)", "train again with `branchynet train`"),
        ("add --trust (in Python, open_run(..., trust=True)).", "add --trust."),
        ("runs/max_drop=1/a.max_drop is not there", "runs/max_drop=1/a.max_drop is not there"),
    ],
)
def test_errors_name_options(python, message):
    assert in_options(python, OPTIONS) == message


def lines_of(policy, mean_us, spread):
    outcome = Outcome(10, 0.9, (0.8, 1.0), 0.9, (0.5, 0.5), (0.9, 0.9), mean_us, mean_us, mean_us)
    cost = ExitCost((50.0, 50.0), (1.0, 0.0), plain_us=100.0, spread=spread)
    return " ".join(speed_lines(Choice(Policy("entropy", policy), {"max_drop": 0.0}, outcome, "00"), cost))


def test_a_speed_up_is_printed_with_its_timing_error():
    assert lines_of((0.1,), 50.0, 0.0).startswith("2.00x the speed of the plain network")
    assert "between 1.87x and 2.14x" in lines_of((0.1,), 50.0, 0.05)
    assert "no clear difference" in lines_of((0.1,), 98.0, 0.05) and "no clear" not in lines_of((0.1,), 98.0, 0.001)
    assert "--remeasure" in lines_of((0.1,), 50.0, 0.05) and "--remeasure" not in lines_of((0.1,), 50.0, 0.01)
    assert "between" not in lines_of((0.1,), 50.0, None)
    assert lines_of((None,), 100.0, 0.01) == "1.00x the speed of the plain network, 100.0 us"
