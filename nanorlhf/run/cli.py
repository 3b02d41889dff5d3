"""A frozen dataclass becomes the command line: one flag per field, whose comment is its --help.

And how a script ends: a user's mistake is one line, printed once per job.
"""
import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing

from ..io.read import InputError

# of flags that several scripts have, see check_bounds
COMMON_BOUNDS = dict(
    steps=1, groups=1, k=1, max_new_tokens=1, max_tokens=1, lr=(0, 10), seed=(0, 2**63 - 1),
    eval_every=1, save_every=1,
)
# the comment lines above a field, its name, the comment after it
FIELD = re.compile(r"((?:^    #.*\n)*)^    (\w+):[^#\n]*(?:# *(.*))?$", re.MULTILINE)


# --------------------------------------------------------------------------------------- flags

class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = f"{message[:300]} (--help lists the flags)"
        raise InputError(" ".join(message.splitlines()))     # an argument may hold a line break


def field_comments(cls):
    """The comment of each field: the one that follows it on its line, or else the lines above it.

    cls: a dataclass; its fields may come from a dataclass that it extends  ->  {name: comment}
    """
    comments = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            for above, name, trailing in FIELD.findall(inspect.getsource(base)):
                comments[name] = trailing or " ".join(re.findall("# *(.*)", above))
    return comments


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() == "true"


def parse(cls, arguments=None):
    """Reads the command line (or a list of arguments) into the dataclass `cls`.

    Raises InputError for unknown flags and wrong values.
    """
    parser = _Parser(
        description=inspect.getmodule(cls).__doc__.strip(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter
    )
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        options = {"help": comments.get(field.name, "").replace("%", "%%")}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
            options["help"] += f"  [{'none' if field.default == '' else field.default}]"
        if typing.get_origin(field.type) is typing.Literal:
            options["choices"] = typing.get_args(field.type)
        elif field.type is bool:
            options.update(type=_boolean, nargs="?", const=True, metavar="true|false")
        else:
            options.update(type=field.type, metavar=field.type.__name__)
        parser.add_argument(f"--{field.name}", **options)
    return cls(**vars(parser.parse_args(arguments)))


def check_bounds(config, **bounds):
    """check_bounds(config, k=1, lr=(0, 1)): refuses a number outside its bounds, or NaN.

    bounds: the least value, or (least, greatest); 0 for a field that is named neither here nor in
    COMMON_BOUNDS
    """
    bounds = COMMON_BOUNDS | bounds
    for field in dataclasses.fields(config):
        if field.type not in (int, float):
            continue
        low = bounds.get(field.name, 0)
        allowed = f"at least {low}"
        high = float("inf")
        if isinstance(low, tuple):
            low, high = low
            allowed = f"between {low} and {high}"
        value = getattr(config, field.name)
        if not low <= value <= high:
            raise InputError(f"--{field.name} {value}: must be {allowed}")


def context_limit(max_length, context):
    """--max_length, where 0 stands for the model's context; more than the context is refused."""
    if max_length > context:
        raise InputError(f"--max_length {max_length}: the model's context is {context}")
    return max_length or context


# ------------------------------------------------------------------------------- how a script ends

# that the processes of the job share, to print the same message once; dist.setup fills it in
report_store = None


def should_report(message, is_echo):
    """Is this process the first of the job with this message? Without a store: of its machine.

    It alone prints why the job ends: several processes may end with the same message.
    is_echo: the error says that another process has ended; it is printed only where no process has
    printed a reason.
    """
    if report_store is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        is_first = report_store.add("any message", 1) == 1
        return is_first if is_echo else report_store.add(message, 1) == 1
    except RuntimeError:                         # the process that held the store has ended
        return True


def run_script(main, cls):
    """The last line of a script: parses the flags and calls main(config).

    A user's mistake, a full disk or a lost process ends with one line and exit code 2, a signal
    with its own code.
    """
    # a terminal that lacks the letters of a sample shows their codes
    sys.stdout.reconfigure(errors="backslashreplace")
    code = 2
    is_echo = False
    try:
        main(parse(cls))
        return
    except (InputError, FloatingPointError) as error:
        message = f"error: {error}"
    except BrokenPipeError:                      # the reader of our output has left (`| head`)
        os._exit(1)
    except OSError as error:
        reason = f"{error.filename or ''}: {error.strerror or error}"
        message = f"error: {reason}; what was saved before is whole"
        is_echo = isinstance(error, ConnectionError)
    except KeyboardInterrupt as error:
        message = str(error) or "stopped"
        code = getattr(error, "code", 130)
    if should_report(message, is_echo):
        # an error of a user's function may have several lines
        print(" ".join(message.splitlines()), file=sys.stderr, flush=True)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # destroying the process group would wait for processes that wait for this one
        os._exit(code)
    sys.exit(code)
