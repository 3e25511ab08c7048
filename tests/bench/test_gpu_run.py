"""The run on a GPU (bench/gpu), without one: the runner, the summary, and a dry run of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import expert_work as work
import pytest
import torch
from bench_command import ROOT

from bench.gpu import __main__ as command
from bench.gpu import measured, profile, runner, steps, summary, verbs
from bench.gpu.runner import FAILED, LEFT_OUT, OK, TIMED_OUT, Outcome, Runner, Step


def python(name: str, code: str, limit: float = 20.0, **more: object) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, **{"group": name, **more})


def alive(process: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(true: object, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return bool(true())


# ---- the runner ----------------------------------------------------------------------------------


def test_a_failing_step_does_not_end_the_others(tmp_path):
    found = Runner(tmp_path, 60).run(
        [
            python("bad", "print('half done'); raise SystemExit(3)"),
            python("good", "print('\\nall of it\\n')"),
            Step("nowhere", [str(tmp_path / "no-such-program")], 5, "nowhere"),
            python("absent", "", absent="no ncu here"),
        ]
    )
    assert [(o.name, o.state) for o in found] == [
        ("bad", FAILED),
        ("good", OK),
        ("nowhere", FAILED),
        ("absent", LEFT_OUT),
    ]
    assert found[0].note == "exit code 3; half done" and found[1].note == "all of it"
    assert "no-such-program" in found[2].note and found[3].note == "no ncu here"


HANGS = """
import os, subprocess, sys, time
own = [sys.executable, "-c", "import time; time.sleep(600)"]
same = subprocess.Popen(own)
other = subprocess.Popen(own, process_group=0)  # as `fomoe train` starts its sites
print(same.pid, other.pid, flush=True)
{end}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sessions are read from /proc")
@pytest.mark.parametrize(
    "end, state", [("time.sleep(600)", TIMED_OUT), ("sys.exit(0)", OK)], ids=["hangs", "ends"]
)
def test_nothing_of_a_step_is_left(tmp_path, end, state):
    """Neither of one that hangs nor of one that ends, in whatever process group it is."""
    (found,) = Runner(tmp_path, 60).run([python("step", HANGS.format(end=end), 1.5)])
    assert found.state == state
    children = [int(word) for word in found.log.read_text().split()]
    assert len(children) == 2
    assert wait_until(lambda: not any(map(alive, children)))
    if state == TIMED_OUT:
        assert 1.5 <= found.seconds < 5 and found.note.startswith("longer than 2 s; ")


def test_the_runs_own_time(tmp_path, monkeypatch):
    """What does not fit is left out, and what has begun gets what is left."""
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.5)
    begun = time.monotonic()
    found = Runner(tmp_path, 1.0).run(
        [python("long", "import time; time.sleep(600)", 300), python("late", "")]
    )
    assert [o.state for o in found] == [TIMED_OUT, LEFT_OUT]
    assert found[1].note == "no time was left"
    assert time.monotonic() - begun < 5


def test_a_group_runs_side_by_side(tmp_path):
    """Each waits for what the other writes."""
    code = (
        "import pathlib, time; pathlib.Path(r'{own}').touch()\n"
        "while not pathlib.Path(r'{other}').exists(): time.sleep(0.01)"
    )
    first, second = tmp_path / "first", tmp_path / "second"
    found = Runner(tmp_path, 60).run(
        [
            python("a", code.format(own=first, other=second), group="both"),
            python("b", code.format(own=second, other=first), group="both"),
        ]
    )
    assert [o.state for o in found] == [OK, OK]


def test_what_all_need(tmp_path):
    found = Runner(tmp_path, 60).run(
        [python("build", "raise SystemExit(1)", needed=True), python("tests", "")]
    )
    assert [o.state for o in found] == [FAILED, LEFT_OUT] and found[1].note == "build failed"


def test_a_step_that_prepares_itself(tmp_path):
    """It starts with the run; its time counts from its turn on."""
    file = tmp_path / "prepared"
    code = f"import pathlib, sys; pathlib.Path(r'{file}').touch(); print(sys.stdin.readline())"
    waits = (
        f"import pathlib, time\nwhile not pathlib.Path(r'{file}').exists(): time.sleep(0.01)\n"
        "time.sleep(1)"
    )
    found = Runner(tmp_path, 60).run(
        [python("build", ""), python("other", waits), python("early", code, early=True)]
    )
    assert [o.state for o in found] == [OK, OK, OK]
    assert found[2].note == "go" and found[2].seconds < 1


@pytest.mark.skipif(sys.platform != "linux", reason="sessions are read from /proc")
def test_a_run_that_is_ended_leaves_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from bench.gpu.runner import Runner, Step\n"
        "hang = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'\n"
        "Runner(Path(sys.argv[1]), 600).run([Step('x', [sys.executable, '-c', hang], 600, 'x')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    log = tmp_path / "x.log"
    assert wait_until(lambda: log.exists() and log.read_text().strip(), 20)
    child = int(log.read_text())
    run.terminate()
    assert run.wait(20) == 143
    assert wait_until(lambda: not alive(child))


# ---- what is said and kept -----------------------------------------------------------------------


def many_results() -> summary.Results:
    """More of everything than a run makes."""
    verb = {
        "seconds": 1.0,
        "fraction_of_floor": 0.5,
        "rivals": {"dense": {"ratio": 0.9}, "grouped_mm": {"ratio": 1.5}},
        "tile_seconds": {"other": 0.5, "chosen": 0.9},
        "absent": {"liger": "none " * 100},
    }
    made: summary.Results = {"verbs": [], "layers": [], "training": [], "tokens": []}
    for place in range(20):
        for tokens, routing in ((16384, "balanced"), (4096, "zipf")):
            model = {"name": f"model {place}"}
            facts = {**verb, "model": model, "tokens": tokens, "routing": routing}
            facts["tiles"] = {"expand": "chosen"}
            made["verbs"].append({"name": "verbs", "extra_info": {**facts, "task": "expand"}})
            for task in ("forward", "forward_backward"):
                made["layers"].append({"name": "layers", "extra_info": {**facts, "task": task}})
        token = {"seconds": 1e-6, "fraction_of_floor": 0.5, "verb": f"verb {place}"}
        token |= {"tokens": 1, "experts": 2}
        made["tokens"].append({"name": "tokens", "extra_info": token})
        step = {"preset": "p", "layers": 1, "tokens": 2, "resident": 1 / (place + 1)}
        step |= {"seconds": 2.0, "host_seconds": 1.0, "gpu_seconds": None}
        step |= {"graph_seconds": 1.5, "peak_bytes": 10**9}
        made["training"].append({"name": "training[p]", "extra_info": step})
    return made


def test_never_more_than_80_lines(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n".join(f"line {i} " + "x" * 300 for i in range(500)))
    outcomes = [Outcome(f"step {i}", FAILED, 1.0, "y" * 500, log) for i in range(10)]
    lines = summary.lines_of(["gpu"] * 2, outcomes, many_results())
    shown = summary.shortened(lines, "folder")
    assert len(lines) > 80 and len(shown) == 80
    assert all(len(line) <= summary.MOST_COLUMNS for line in shown)
    assert shown[-1] == f"... {len(lines) - 79} more lines in folder/summary.txt"
    assert any(line.startswith("step 0 ") and "failed" in line for line in shown)
    assert any("other 2.00x" in line for line in lines)
    # 40 products, and the one that was chosen does not count.
    assert "40 products are faster with another tile than the chosen one" in lines
    assert summary.shortened(lines[:80], "folder")[-1].startswith(lines[79][:100])


def test_never_more_than_8_files(tmp_path):
    work, folder = tmp_path / "work", tmp_path / "folder"
    work.mkdir()
    (work / "profile.ncu-rep").write_text("report")
    for place in range(12):
        cut = '{"name": "half'  # of a step that was ended as it wrote
        (work / f"results{place}.jsonl").write_text('{"name": "a", "extra_info": {}}\n' + cut)
    command.keep(folder, work, [Outcome("step", OK)], ["gpu"], ["line"])
    assert len(list(folder.iterdir())) == command.MOST_FILES == 8
    kept = json.loads((folder / "results0.json").read_text())
    assert kept == {"benchmarks": [{"name": "a", "extra_info": {}}]}


def test_exit_status(tmp_path, monkeypatch, capsys):
    def run(*made: Step) -> tuple[int, str]:
        monkeypatch.setattr(command, "make_steps", lambda setting: list(made))
        folder = tmp_path / made[-1].name
        code = command.main([str(folder), "--dry-run"])
        return code, capsys.readouterr().out

    code, said = run(python("fine", ""), python("left", "", absent="no such thing here"))
    assert code == 0 and "no such thing here" in said
    code, said = run(python("slow", "import time; time.sleep(60)", 0.3), python("after", ""))
    assert code == 1 and "timed out" in said and "after" in said
    code, said = run(python("wrong", "print('what is wrong'); raise SystemExit(1)"))
    assert code == 1 and "exit code 1; what is wrong" in said
    assert command.main([str(tmp_path / "wrong"), "--dry-run"]) == 2  # holds another run's results
    assert "FOLDER must be new or empty, got" in capsys.readouterr().err


def test_unknown_step(tmp_path, capsys):
    assert command.main([str(tmp_path / "x"), "--dry-run", "--steps", "verbs,sleep"]) == 2
    said = capsys.readouterr().err
    assert "--steps must be some of build, tests, verbs" in said and "got 'sleep'" in said


# ---- what measuring steps share ------------------------------------------------------------------


def test_results_of_a_step(tmp_path, capsys):
    """What fails or is wrong is told and fails the step; what there is no time for is told."""
    results = measured.Results(tmp_path / "r.jsonl", budget=100.0)
    results.check("close", 1e-3)
    assert results.enough("first") and results.finish("1 measured") == 0
    assert capsys.readouterr().out == "1 measured\n"
    with results.guarded("second"):
        raise ValueError("bad sizes")
    with results.guarded("third"):
        raise torch.OutOfMemoryError("too large")
    results.check("far", float("nan"))
    results.began -= 99.5
    assert not results.enough("fourth")
    assert results.finish("1 measured") == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == (
        "1 measured, WRONG: second: ValueError: bad sizes, far (nan), "
        "not reached: 2 (third: out of memory ...)"
    )


def test_a_turn(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(read) as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        turn = measured.Turn(waits=True)
        time.sleep(0.05)
        assert not turn.here
        before = time.monotonic()
        os.write(write, b"go\n")
        assert turn.wait() >= before and turn.here
        os.close(write)
    alone = measured.Turn(waits=False)
    assert not alone.here and alone.wait() > before


# ---- the table of steps --------------------------------------------------------------------------


def test_steps_fit_the_time(tmp_path):
    """All limits add up to less than the run has, but for a build, and the checks side by side."""
    made = steps.make_steps(steps.Setting(tmp_path, standin=True))
    groups: dict[str, float] = {}
    for step in made:
        groups[step.group] = max(groups.get(step.group, 0.0), step.limit)
    del groups["build"]
    assert sum(groups.values()) <= command.parse([]).seconds - 10
    assert len({step.name for step in made}) == len(made)
    for tests in steps.KERNEL_TESTS:
        assert Path(tests).is_file()


def test_missing_programs_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(steps, "CUDA_BIN", tmp_path)
    made = {step.name: step for step in steps.make_steps(steps.Setting(tmp_path))}
    assert made["profile"].absent == "no ncu here"
    assert made["memcheck"].absent == "no compute-sanitizer here"
    assert steps.Setting(tmp_path).lacks("no_such_module", "json") == "no no_such_module here"


def test_standins_refuse_what_they_do_not_know(tmp_path):
    setting = steps.Setting(tmp_path, standin=True)
    run = lambda *words: subprocess.run(
        words, env={**os.environ, "PATH": setting.programs}, capture_output=True, text=True
    )
    assert run("compute-sanitizer", "--tool", "memcheck", "true").returncode == 0
    assert run("compute-sanitizer", "--tool", "memchek", "true").returncode == 2
    assert run("compute-sanitizer", "--kernel-name", "fomoe", "true").returncode == 2
    assert run("compute-sanitizer", "--tool", "memcheck", "false").returncode == 1
    assert run("ncu", "--section", "SourceCounter", "--export", "x", "true").returncode == 2
    assert run("nvidia-smi", "--query-gpu=power", "--format=csv,noheader").returncode == 2


def test_counters_of_a_profile():
    mangled = (
        "_ZN5fomoe4cuda16warp_specialized23warp_specialized_kernelINS1_5ShapeINS0_11RowsProblem"
        "INS0_8ActivateINS0_6Bf16x2ELb1EEELNS0_5MajorE0ELb1EEELi256ELb0EEEEEvNS1_6ParamsE"
    )
    text = (
        '==PROF== words before\n"ID","Kernel Name","gpu__time_duration.sum","other"\n'
        f'"","","ns","%"\n"0","{mangled}","1,234.5","3"\n"1","_Z3abcv","n/a","3"\n'
    )
    first, second = profile.read_counters(text)
    assert first["nanoseconds"] == 1234.5 and "nanoseconds" not in second
    assert first["kernel"].startswith("warp_specialized warp_specialized_kernel Shape RowsProblem")
    assert "Activate Bf16x2 Major Params" in first["kernel"] and second["kernel"] == "abc"
    assert profile.read_counters("==ERROR== no permission") == []


# ---- a dry run -----------------------------------------------------------------------------------


def test_dry_run(tmp_path):
    """The command itself, with the steps that take seconds."""
    folder = tmp_path / "results"
    done = subprocess.run(
        [ROOT / ".ci" / "gpu", folder, "--dry-run", "--steps", "build,tokens,profile"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((folder / "run.json").read_text())
    assert [(step["name"], step["state"]) for step in run["steps"]] == [
        ("build", OK),
        ("tokens", OK),
        ("profile", OK),
    ]
    assert run["profile"][0]["extra_info"]["nanoseconds"] == 1234.5
    tokens = json.loads((folder / "tokens.json").read_text())["benchmarks"]
    combine = next(entry["extra_info"] for entry in tokens if "combine" in entry["name"])
    assert combine["seconds"] > 0 and combine["memory_floor_seconds"] > 0
    assert "== other kernels" in done.stdout and "some_kernel" in done.stdout
    assert len(list(folder.iterdir())) <= command.MOST_FILES


def test_each_product_is_timed_with_the_tiles_that_it_can_take(monkeypatch):
    """Blocks cannot share a B that is gathered; few tokens also try the other architectures'."""
    monkeypatch.setenv(verbs.FORCED, "")
    model = work.MODELS[0]
    gemms = work.gemms(model, work.expected_load(model, 16384, "balanced"))
    of = lambda name, tokens: verbs.tiles_for(measured.Case(model, tokens, "balanced"), gemms[name])
    hopper = ["ping_pong_128", "cooperative_256"]
    assert of("contract_backward", 16384) == [*hopper, "paired_128"]
    assert of("expand_weight_grad", 16384) == hopper
    assert of("expand", 4096)[:2] == ["multistage_64", "multistage_128"]
    assert os.environ[verbs.FORCED] == ""
