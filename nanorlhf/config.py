"""A frozen dataclass becomes the command line: one line a flag, its comment is its --help."""
import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing


class InputError(ValueError):
    """A user's mistake: its message is one line that names the place, the value and what to do."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(" ".join(f"{message} (--help lists the flags)".splitlines()))     # a word with a line break in it


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


def check(config, **bounds):
    """check(config, k=(1, None), lr=(0, 1)): refuses a field outside [low, high], a NaN among them."""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if not (value >= low and (high is None or value <= high)):
            raise InputError(f"--{name} {value}: must be {'at least ' + str(low) if high is None else f'between {low} and {high}'}")


def run(main, cls):
    """The last line of a script: parse, call main, and end a user's mistake with one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")        # a terminal without a sample's letters shows their codes
    try:
        main(parse(cls))
        return
    except (InputError, FloatingPointError) as error:
        message, code = f"error: {error}", 2
    except BrokenPipeError:                      # whoever read our output has left (`| head`): nobody to tell
        os._exit(1)
    except OSError as error:
        message, code = f"error: {error.filename or ''}: {error.strerror or error}; what was saved before is whole", 2
    except KeyboardInterrupt as error:
        message, code = str(error) or "stopped", 130
    print(" ".join(message.splitlines()), file=sys.stderr)        # what a user's function raised may have several lines
    sys.exit(code)
