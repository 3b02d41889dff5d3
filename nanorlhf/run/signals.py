"""How a run is stopped: a signal lets the step finish, the run saves and leaves."""
import signal
import time

DEBOUNCE_SECONDS = 1.0                # seconds: torchrun passes on a Ctrl-C that the terminal has sent to everyone; a person takes longer to press it again
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}       # exit codes of a run that has saved and left; 75 is sysexits' "try again later"


class Preempted(KeyboardInterrupt):
    """A signal asked for it, everything is saved; `code` is the exit code."""

    def __init__(self, number):
        super().__init__("stopped; the same command goes on from the last save")
        self.code = EXIT_CODES[number]


class GracefulStop:
    """Ctrl-C and SIGTERM let the step finish; the loop then saves and leaves. `asked` is the signal's number, or 0. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.signum, self.since = 0, 0.0
        for name in EXIT_CODES:
            signal.signal(name, self._ask)

    def _ask(self, number, _):
        if self.signum and number == signal.SIGINT and time.monotonic() - self.since > DEBOUNCE_SECONDS:
            raise Preempted(number)
        self.signum, self.since = number, time.monotonic()
