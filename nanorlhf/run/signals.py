"""How a run is stopped: a signal lets the step finish, then the run saves and ends."""
import signal
import time

# torchrun passes on a Ctrl-C that the terminal has sent to all processes already; a person takes
# longer to press it again
DEBOUNCE_SECONDS = 1.0
# of a run that has saved and ended; 75 is sysexits' "try again later"
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class Preempted(KeyboardInterrupt):
    """A signal has ended the run, everything is saved; `code` is the exit code."""

    def __init__(self, signum):
        super().__init__("stopped; the same command goes on from the last save")
        self.code = EXIT_CODES[signum]


class GracefulStop:
    """Ctrl-C and SIGTERM let the step finish; the loop then saves and ends the run.

    signum: the signal that has come, or 0. A second Ctrl-C ends the run at once.
    """

    def __init__(self):
        self.signum = 0
        self.received = 0.0
        for signum in EXIT_CODES:
            signal.signal(signum, self._receive)

    def _receive(self, signum, _):
        now = time.monotonic()
        is_second = self.signum and now - self.received > DEBOUNCE_SECONDS
        if signum == signal.SIGINT and is_second:
            raise Preempted(signum)
        self.signum = signum
        self.received = now
