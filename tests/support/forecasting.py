"""The forecast command, run in this process."""

from favor_np.cli import main


def run(capsys, *argv):
    """What ``favor-np forecast`` prints, where it says nothing else and ends well."""
    status = main(["forecast", *argv])
    captured = capsys.readouterr()
    assert unexpected(captured.err) == []
    assert status == 0
    return captured.out


def unexpected(err):
    """What is written to standard error, but for what a cold cache makes the program say."""
    return [x for x in err.splitlines() if not x.startswith("favor-np: compiling the kernels")]
