"""The program as a whole: start, help, info, warm-up, and how errors look."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.child import HANG

import favor_np
from favor_np.cli import COMMANDS, _text, main
from favor_np.cli import _options as options
from favor_np.cli.info import describe
from favor_np.cpu.code import Kernel, described, useful_kernels
from favor_np.cuda import device


def program(*arguments, **kwargs):
    command = [sys.executable, "-m", "favor_np.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, check=False, **kwargs
    )


def test_version_and_help(capsys):
    for argv in (["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"favor-np {favor_np.__version__}" in out
    for name in COMMANDS:
        assert name in out


def test_the_program_alone_shows_its_help(capsys):
    assert main([]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for name in COMMANDS:
        assert name in captured.out


def test_the_program_multiplies_with_one_thread_of_openblas():
    """The others would spin beside ours; a call of `main` from Python leaves them as they are."""
    code = "import os, sys; from favor_np.cli import main; main({}); print(os.environ.get({!r}))"
    for argv, expected in (("", "1"), ("['info']", "None")):
        command = [sys.executable, "-c", code.format(argv, "OPENBLAS_NUM_THREADS"), "info"]
        environ = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
        assert done.stdout.splitlines()[-1] == expected


def test_help_imports_little():
    code = (
        "import sys; from favor_np.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'numba', 'matplotlib', 'tqdm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "argv",
    [
        ["nothing"],
        ["forecast", "a", "b"],
        ["forecast", "--window", "0"],
        ["forecast", "--window", "x"],
        ["forecast", "--features", "7"],
        ["forecast", "--scale", "nan"],
        ["forecast", "--scale", "0"],
        ["forecast", "--cost", "-1"],
        ["forecast", "--threshold", "inf"],
        ["forecast", "--target", "profit"],
        ["forecast", "--seed", "-1"],
        ["forecast", "--calibration", "best"],
        ["demo", "--rows", "100"],
        ["warmup", "--float16"],
        ["warmup", "--device", "gpu"],
    ],
)
def test_wrong_options_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("favor-np: error: ")
    assert captured.err.count("\n") == 1


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 or " " not in line[12:] for line in out.splitlines())
    whole = out.replace("\n" + 12 * " ", " ")  # what did not fit goes on in the next line
    lines = dict(line.split(maxsplit=1) for line in whole.splitlines())
    assert lines["favor_np"].startswith(favor_np.__version__)
    ours = ["processor", "code", "vectors", "bfloat16", "threads", "cache"]
    assert [name for name in lines if name in ours] == ours
    assert {"python", "numpy", "numba"} <= set(lines)
    assert lines["code"] == described()
    assert int(lines["threads"]) >= 1
    assert {"gpu", "numba-cuda"} <= set(lines)
    assert lines["gpu"].startswith("none: ") == (device.problem() is not None)


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == describe()
    assert facts["gpu"].removeprefix("none: ") == (device.problem() or str(device.current()))


@pytest.mark.parametrize("more", [[], ["--float64"]])
def test_warmup_compiles_what_is_missing(more, capsys, monkeypatch):
    """None, if each is there already."""
    kernels = [k for k in useful_kernels() if more or k.dtype.itemsize == 4]
    assert main(["warmup", *more]) == 0
    assert f"{len(kernels)} kernels ready" in capsys.readouterr().out
    assert all(kernel.origin for kernel in kernels)
    done = program("warmup", *more)
    assert done.returncode == 0
    assert done.stdout.endswith(", 0 of them compiled now\n")


def test_warmup_of_a_gpu_that_cannot_be_used_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(device, "problem", lambda: "no NVIDIA driver can be used")
    assert main(["warmup", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "favor-np: error: no NVIDIA driver can be used\n"
    assert main(["warmup", "--device", "cuda", "--float64"]) == 2
    assert capsys.readouterr().err.startswith("favor-np: error: --float64: a GPU computes in")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 4 TiB"), "not enough memory: Unable to allocate 4 TiB"),
        (OSError(28, "No space left on device", "x.csv"), "x.csv: No space left on device"),
        (options.CommandError("two\nlines"), "two lines"),
        (ImportError("a plot needs matplotlib", name="matplotlib"), "a plot needs matplotlib"),
    ],
)
def test_errors_of_a_command_are_one_line(error, message, capsys, monkeypatch):
    from favor_np.cli import info

    def fail(args):
        raise error

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"favor-np: error: {message}\n"


def test_a_bug_is_not_hidden(monkeypatch):
    from favor_np.cli import info

    for error in (ValueError("bug"), ImportError("bug", name="favor_np.gone"), KeyError("bug")):

        def fail(args, error=error):
            raise error

        monkeypatch.setattr(info, "run", fail)
        with pytest.raises(type(error), match="bug"):
            main(["info"])


def test_interrupt(monkeypatch, capsys):
    from favor_np.cli import info

    def fail(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module",
    [
        "argparse",
        "favor_np.calibration",
        "numpy",
        "numpy._core._multiarray_umath",
        "favor_np.cpu.processor",
        "numba",
        "llvmlite.binding",
        "favor_np.cpu.kernels.simd",
        "matplotlib.figure",
    ],
)
def test_an_interrupt_at_any_time_is_one_line(module, tmp_path):
    """It comes when that module is about to be imported, an extension module for example."""
    code = (
        "import os, signal, sys\n"
        "def hook(event, args):\n"
        f"    if event == 'import' and args[0] == {module!r}:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(hook)\n"
        "from favor_np.cli import main\n"
        "sys.exit(main())"
    )
    out = tmp_path / "out.csv"
    command = [sys.executable, "-c", code, "forecast", "--csv", str(out), "--features", "16"]
    if module.startswith("matplotlib"):
        command += ["--plot", str(tmp_path / "out.png")]
    environ = dict(os.environ)
    if module.startswith(("numba", "llvmlite", "favor_np.cpu.kernels")):  # what compiles
        environ |= {"FAVOR_NP_CACHE": "0", "FAVOR_NP_PREBUILT": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, check=False, env=environ
    )
    assert done.returncode == 130
    lines = done.stderr.splitlines(keepends=True)
    assert [x for x in lines if "compiling" not in x] == ["favor-np: error: interrupted\n"]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_removes_what_is_half_written(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from favor_np.cli import _options, info, main\n"
        "def run(args):\n"
        f"    with _options.output_file({str(tmp_path / 'out.csv')!r}) as path:\n"
        "        path.write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print('not reached')\n"
        "info.run, sys.argv = run, ['favor-np', 'info']\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "favor-np: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "favor_np.cli", "info"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=HANG,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(
    ("line", "status", "err"),
    [
        ("info >&-", 0, ""),
        ("info <&- >&- 2>&-", 0, ""),
        ("forecast - <&-", 2, "favor-np: error: standard input: the file is empty\n"),
        ("forecast none >&- 2>&-", 2, ""),
        ("forecast '\x1b[31mred'", 2, "favor-np: error: ?[31mred: No such file or directory\n"),
    ],
    ids=["stdout", "all", "stdin", "an error", "an escape"],
)
def test_closed_streams_and_names_that_are_no_text(line, status, err, tmp_path):
    shell = ["sh", "-c", f'exec "$0" -m favor_np.cli {line}', sys.executable]
    done = subprocess.run(
        shell, cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert (done.returncode, done.stderr) == (status, err)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "favor_np.cli", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("favor-np: error: No space left")
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_the_signs():
    done = program("forecast", "--help", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "|x|?" in done.stdout


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (_text.seconds(3.14159e-5), "31.4 µs"),
        (_text.seconds(0.002), "2.00 ms"),
        (_text.seconds(0.9996), "1000 ms"),
        (_text.seconds(12345.0), "12345 s"),
        (_text.seconds(0.0), "0 µs"),
        (_text.memory(2**16 - 1), "< 64 KiB"),
        (_text.memory(3 * 2**19), "1.50 MiB"),
        (_text.memory(2**40), "1024 GiB"),
    ],
)
def test_quantities_have_three_figures_and_no_exponent(found, text):
    assert " " not in found  # a line is never broken before a unit
    assert _text.printed([found, found]) == f"{text}\n{text}"


# ----------------------------------------------------------------------------------------
# Output files, what is told meanwhile
# ----------------------------------------------------------------------------------------


def test_output_file_appears_only_when_all_went_well(tmp_path):
    target = tmp_path / "out.csv"
    target.write_text("old")

    def fail():
        with options.output_file(str(target)) as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    with options.output_file(str(target)) as path:
        path.write_text("new")
        assert target.read_text() == "old"
        old = target.stat().st_ino
    assert target.read_text() == "new"
    assert target.stat().st_ino != old  # put in place whole, not written over
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_output_file_that_cannot_be_is_known_at_once(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("x")
    for path in (tmp_path, tmp_path / "none" / "out.csv", source):
        with (
            pytest.raises(options.CommandError, match=str(path.name)),
            options.output_file(str(path), str(source)),
        ):
            raise AssertionError("the work began")
    with options.output_file(None) as nothing:
        assert nothing is None


def test_output_to_a_device():
    with options.output_file(os.devnull) as path:
        path.write_text("gone")
    assert os.path.exists(os.devnull)


def test_compilation_is_told_once(capsys):
    kernel = Kernel("holds_large", np.dtype(np.float32), frozenset())
    with options.compilation_told():
        for _ in range(2):
            kernel.compile()
    err = capsys.readouterr().err
    assert err.startswith("favor-np: compiling the kernels of attention for this processor")
    assert err.count("\n") == 1
    kernel.load()
    with options.compilation_told():
        kernel.load()
    kernel.compile()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["forecast", "compare"])
def test_a_cold_start_says_what_it_does(command):
    arguments = [sys.executable, "-m", "favor_np.cli", command]
    environment = os.environ | {"FAVOR_NP_CACHE": "0", "FAVOR_NP_PREBUILT": "0"}
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          env=environment, text=True) as process:  # fmt: skip
        line = process.stderr.readline()
        process.kill()
    assert line.startswith("favor-np: compiling the kernels of attention for this processor")
    assert line.endswith("they are not kept, as there is no cache\n")
