"""A frozen dataclass becomes the command line: one line a flag, its comment is its --help. And how a user's files are read: within bounds."""
import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing

from ..io.read import InputError

# what every training script has
COMMON_BOUNDS = dict(
    steps=(1, None), groups=(1, None), max_tokens=(1, None), max_length=(0, None), lr=(0, 10), warmup=(0, None),
    seed=(0, 2**63 - 1), eval_every=(1, None), save_every=(1, None),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(" ".join(f"{message[:300]} (--help lists the flags)".splitlines()))     # a word with a line break in it


def _comments(cls):
    """The trailing comment of each field's line, field by name; a field may come from a dataclass that cls extends."""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base))
    found = re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.MULTILINE)
    return {name: comment.replace("%", "%%") for name, comment in found}


def _boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")
    return text.lower() == "true"


def parse(cls, arguments=None):
    """Reads the command line (or a list of words) into the dataclass `cls`; unknown flags and wrong values raise InputError."""
    parser = _Parser(description=(inspect.getmodule(cls).__doc__ or cls.__doc__).strip(), allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = _comments(cls)
    for field in dataclasses.fields(cls):
        kind, options = field.type, {"help": comments.get(field.name, "")}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
            options["help"] += f"  [{field.default if field.default != '' else 'none'}]"
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        elif kind is bool:
            options.update(type=_boolean, nargs="?", const=True, metavar="true|false")
        else:
            options.update(type=kind, metavar=kind.__name__)
        parser.add_argument(f"--{field.name}", **options)
    return cls(**vars(parser.parse_args(arguments)))






def check_bounds(config, **bounds):
    """check(config, k=(1, None), lr=(0, 1)): refuses a field outside [low, high], a NaN among them."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not (value >= low and (high is None or value <= high)):
            raise InputError(f"--{name} {value}: must be {'at least ' + str(low) if high is None else f'between {low} and {high}'}")


def context_limit(max_length, context):
    """--max_length, 0 being the model's context; more than the context is refused."""
    if max_length > context:
        raise InputError(f"--max_length {max_length}: the model's context is {context}")
    return max_length or context


def should_report(message, echo):
    """Should this process say it? Of several that are about to end with the same message, one should: here one a machine. dist.setup, which knows
    the others, puts a better answer in this one's place.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run_script(main, cls):
    """The last line of a script: parse, call main, and end a user's mistake with one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")        # a terminal without a sample's letters shows their codes
    try:
        main(parse(cls))
        return
    except (InputError, FloatingPointError) as error:
        message, code, echo = f"error: {error}", 2, False
    except BrokenPipeError:                      # whoever read our output has left (`| head`): nobody to tell
        os._exit(1)
    except OSError as error:
        message, code, echo = f"error: {error.filename or ''}: {error.strerror or error}; what was saved before is whole", 2, isinstance(error, ConnectionError)
    except KeyboardInterrupt as error:
        message, code, echo = str(error) or "stopped", getattr(error, "code", 130), False
    if should_report(message, echo):
        print(" ".join(message.splitlines()), file=sys.stderr, flush=True)        # what a user's function raised may have several lines
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)                           # taking the processes' group apart would wait for those that wait for us
    sys.exit(code)
