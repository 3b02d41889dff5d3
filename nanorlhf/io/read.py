"""A user's files are read within bounds, and a user's mistake has a class of its own."""
import gzip
import importlib.util
import json
import sys
import zlib
from pathlib import Path

# bytes, unzipped: all of HH is a third of it, and takes several times as much as Python's objects
MAX_FILE_BYTES = 2**30
# bytes of one JSON value: "[[],[],[], ..." takes 20 times as much memory; a tokenizer.json of 256
# thousand tokens has 33 million
MAX_JSON_BYTES = 2**26
# levels of JSON, ours has 5: at 1,000 Python's recursion ends, if not in parsing, then in printing
MAX_JSON_DEPTH = 100


class InputError(ValueError):
    """A user's mistake: its message is one line that names the place, the value and what to do."""


def read_bytes(path, max_bytes=None):
    """The bytes of a file, gunzipped where its name ends in .gz.

    Piece by piece, because a small file can unfold to any size.
    """
    is_zipped = str(path).endswith(".gz")
    max_bytes = max_bytes or MAX_FILE_BYTES
    raw = bytearray()
    try:
        with (gzip.open if is_zipped else open)(path, "rb") as file:
            while len(raw) <= max_bytes and (piece := file.read(2**20)):
                raw += piece
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # ValueError: a name that no file can have
        raise InputError(f"{path}: cannot be read ({error})") from None
    if len(raw) > max_bytes:
        raise InputError(
            f"{path}: more than {max_bytes:,} bytes{' when unzipped' * is_zipped}, "
            "the most that is read; split the file"
        )
    return bytes(raw)


def parse_json(raw, where):
    """bytes -> dict, which may be printed, walked and written: it is not deep."""
    start = raw[:60].decode("utf-8", "replace")
    try:
        if len(raw) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(raw.decode("utf-8-sig"))
        _check_depth(value, 1)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 (byte {error.object[error.start]:#04x}), so not JSON; "
            "save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({str(error)[:80]}): {start!r}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object {{...}}, found {start!r}")
    return value


def read_json(path):
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def _check_depth(value, depth):
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"more than {MAX_JSON_DEPTH} levels deep")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _check_depth(inner, depth + 1)


def import_file(path):
    """The module in a file, which may import modules that lie beside it."""
    # the prefix: a file called json.py takes no other module's place
    name = f"nanorlhf_user_{Path(path).stem}"
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)                  # last: installed modules go before those beside it
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module                   # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:     # a script that parses its own command line exits
        raise InputError(
            f"{path}: cannot be imported ({type(error).__name__}: {error})"
        ) from None
    return module
