"""Contenders take turns, and their ratios are those of the same round."""

import sys

from benchmarks import compare


def test_contenders_take_turns_after_a_warm_up():
    calls = []

    def contender(name):
        def measure():
            calls.append(name)
            return {"speed": float(len(calls))}

        return measure

    results = compare.take_turns({"a": contender("a"), "b": contender("b")}, rounds=2)
    assert calls == ["a", "a", "b", "b", "a"]
    assert results == {"a": {"speed": [2, 5]}, "b": {"speed": [3, 4]}}


def test_a_ratio_is_the_median_over_rounds(capsys):
    compare.print_table({"a": {"speed": [2.0, 30.0, 6.0]}, "b": {"speed": [4.0, 15.0, 12.0]}})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["(1.00)", "(2.00)"]


def test_a_run_has_its_threads_its_metrics_and_its_errors():
    code = "import os, sys; open('metrics.jsonl', 'w').write('{\"a\": 1}'); "
    code += "print(os.environ['OMP_NUM_THREADS'], file=sys.stderr)"
    assert compare.run([sys.executable, "-c", code], threads=3) == ([{"a": 1}], "3\n")
