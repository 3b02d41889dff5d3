"""A frozen dataclass becomes the command line: one line a flag, its comment is its --help. And how a user's files are read: within bounds."""
import argparse
import dataclasses
import gzip
import inspect
import json
import os
import re
import sys
import typing
import zlib

LARGEST_FILE = 2**30                     # bytes, unzipped: all of HH is a third of it, and as Python's objects it takes several times as much memory
LARGEST_JSON = 2**26                     # bytes of one JSON value: "[[],[],[], ..." takes 20 times as much memory
DEEPEST = 100                            # JSON inside JSON, ours has 5 levels: at 1,000 Python's recursion ends, parsing perhaps not, but printing


class InputError(ValueError):
    """A user's mistake: its message is one line that names the place, the value and what to do."""


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


def read_bytes(path, largest=None):
    """A file, gunzipped where its name ends in .gz: piece by piece, because a small one can unfold to anything."""
    raw, largest = bytearray(), largest or LARGEST_FILE
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            while len(raw) <= largest and (piece := file.read(2**20)):
                raw += piece
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:               # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read ({error})") from None
    if len(raw) > largest:
        raise InputError(f"{path}: more than {largest:,} bytes{' when unzipped' * str(path).endswith('.gz')}, the most that is read; split the file")
    return bytes(raw)


def parse_json(raw, where):
    """bytes -> dict. Whoever gets it may print, walk and write it: it is not deep."""
    try:
        if len(raw) > LARGEST_JSON:
            raise ValueError(f"more than {LARGEST_JSON:,} bytes")
        value = json.loads(raw.decode("utf-8-sig"))
        level, depth = [value], 0
        while level:
            level, depth = [x for part in level if isinstance(part, (dict, list)) for x in (part.values() if isinstance(part, dict) else part)], depth + 1
            if depth > DEEPEST:
                raise ValueError(f"more than {DEEPEST} levels deep")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.object[error.start]:#04x}), so not JSON; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error)[:80]}): {raw[:60].decode('utf-8', 'replace')!r}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object {{...}}, found {raw[:60].decode('utf-8', 'replace')!r}")
    return value


def check(config, **bounds):
    """check(config, k=(1, None), lr=(0, 1)): refuses a field outside [low, high], a NaN among them."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not (value >= low and (high is None or value <= high)):
            raise InputError(f"--{name} {value}: must be {'at least ' + str(low) if high is None else f'between {low} and {high}'}")


def first_to_say(message, echo):
    """Should this process say it? Of several that are about to end with the same message, one should: here one a machine. dist.setup, which knows
    the others, puts a better answer in this one's place.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


def run(main, cls):
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
    if first_to_say(message, echo):
        print(" ".join(message.splitlines()), file=sys.stderr, flush=True)        # what a user's function raised may have several lines
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)                           # taking the processes' group apart would wait for those that wait for us
    sys.exit(code)
