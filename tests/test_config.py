"""The command line is the dataclass: types, defaults and comments; a mistake is one line."""
import importlib.util
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Literal

import pytest

from nanorlhf.io.read import InputError
from nanorlhf.run import cli
from nanorlhf.run.cli import check_bounds, parse, run_script


@dataclass(frozen=True)
class Config:
    data: str                                       # where the texts are
    k: int = 4                                      # responses per prompt, 100% of them
    kl_coef: float = 0.05                           # beta in  r_t = -beta * (logprob - ref_logprob)
    lr: float = 1e-5                                # learning rate, #1 of all
    detach_value: bool = False                      # keeps the value loss out of the trunk
    whiten: bool = True                             # advantages
    out: str = ""                                   # run folder
    loss: Literal["ranking", "classification"] = "ranking"   # what is minimised

    @property
    def twice(self):
        return 2 * self.k


def refused(words, *arguments):
    """Every refusal is an InputError of one line that says these words."""
    with pytest.raises(InputError) as error:
        parse(Config, list(arguments))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_defaults_and_types():
    found = parse(Config, ["--data", "x"])
    assert found == Config("x") and found.twice == 8
    found = parse(Config, ["--data=-x", "--k", "7", "--kl_coef=-1e-3", "--lr=2", "--out", "", "--loss", "classification"])
    assert found == Config("-x", 7, -0.001, 2.0, loss="classification")
    assert [type(value) for value in (found.k, found.kl_coef, found.lr)] == [int, float, float]
    assert parse(Config, ["--data", "a b", "--k", "-3"]).k == -3                # its bounds are check's business
    with pytest.raises(FrozenInstanceError):
        found.k = 5


@pytest.mark.parametrize("words, expected", [((), False), (("--detach_value",), True), (("--detach_value", "true"), True), (("--detach_value", "False"), False),
                                             (("--detach_value=TRUE",), True), (("--detach_value", "--k", "2"), True)])
def test_bool_flags(words, expected):
    assert parse(Config, ["--data", "x", *words]).detach_value is expected


def test_a_flag_that_is_on_can_be_put_off():
    assert parse(Config, ["--data", "x"]).whiten is True and parse(Config, ["--data", "x", "--whiten", "false"]).whiten is False


def test_refusals():
    refused(["--data", "required", "--help"])
    refused(["--data", "expected one argument"], "--data")
    refused(["--nonsense"], "--data", "x", "--nonsense", "3")
    refused(["stray"], "--data", "x", "stray")
    refused(["--kl"], "--data", "x", "--kl", "0.1")                             # no abbreviation: --kl could become another flag one day
    refused(["--kl-coef"], "--data", "x", "--kl-coef", "0.1")                   # flags are spelled as the fields are
    for value in ("1.5", "four", "", "1e3", "0x4"):
        refused(["--k", "int", repr(value)], "--data", "x", "--k", value)
    refused(["--lr", "float", "'1,5'"], "--data", "x", "--lr", "1,5")
    refused(["--loss", "'rank'", "'ranking', 'classification'"], "--data", "x", "--loss", "rank")
    for value in ("yes", "1", "", "no"):
        refused(["--detach_value", "true or false", repr(value)], "--data", "x", "--detach_value", value)
    refused(["--k"], "--data", "x", "--k", "a\nb")                              # one line whatever was typed
    refused(["stray"], "--data", "x", "stray\nword")
    with pytest.raises(InputError, match="--data"):                             # sys.argv is what it reads by itself
        sys_argv, sys.argv = sys.argv, ["script.py"]
        try:
            parse(Config)
        finally:
            sys.argv = sys_argv


def test_help_shows_default_and_comment_of_each_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and __doc__.strip() in text
    parts = text.split("\n  --")[1:]                                           # a long flag has its help on the line below
    lines = {"--" + part.split()[0]: part for part in parts}
    assert set(lines) == {f"--{name}" for name in Config.__dataclass_fields__}
    expected = {"--data": "where the texts are", "--k": "responses per prompt, 100% of them  [4]", "--lr": "learning rate, #1 of all  [1e-05]",
                "--kl_coef": "beta in  r_t = -beta * (logprob - ref_logprob)  [0.05]", "--detach_value": "keeps the value loss out of the trunk  [False]",
                "--whiten": "advantages  [True]", "--out": "run folder  [none]", "--loss": "what is minimised  [ranking]"}
    for flag, words in expected.items():
        assert " ".join(words.split()) in " ".join(lines[flag].split()), flag
    assert "[" not in lines["--data"]                                          # required: no default to show
    assert "{ranking,classification}" in lines["--loss"] and "true|false" in lines["--whiten"]


@dataclass(frozen=True)
class Above(Config):
    # what a longer comment says,
    # on two lines
    mode: Literal["fast",
                  "slow"] = "fast"
    # the lines above are not read
    both: int = 1                                   # where a comment follows

    # not of the next field

    silent: int = 2
    k: int = 5                                      # said again, at 50%


def test_a_comment_may_stand_above_its_field(capsys):
    comments = cli.field_comments(Above)
    assert comments["mode"] == "what a longer comment says, on two lines"
    assert comments["both"] == "where a comment follows" and comments["silent"] == ""
    assert comments["k"] == "said again, at 50%" and comments["whiten"] == "advantages"          # of the dataclass that it extends
    with pytest.raises(SystemExit):
        parse(Above, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what a longer comment says, on two lines [fast]" in text and "said again, at 50% [5]" in text


@pytest.mark.parametrize("script", sorted(Path(__file__).parent.parent.glob("train_*.py")), ids=lambda path: path.stem)
def test_the_scripts_document_every_flag(script):
    """Every field of the real scripts has its comment, and so its line of --help."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module                                          # where inspect finds the source of Config
    spec.loader.exec_module(module)
    comments = cli.field_comments(module.Config)
    assert [name for name in module.Config.__dataclass_fields__ if not comments.get(name)] == []


def test_check_bounds():
    ok = Config("x")
    check_bounds(ok, k=1, lr=(0, 1), kl_coef=0)
    check_bounds(Config("x", k=1, lr=1.0), k=(1, 4), lr=(0, 1))                        # the bounds themselves are allowed
    check_bounds(Config("x", k=4, lr=0.0), k=(1, 4), lr=(0, 1))
    nan, inf = float("nan"), float("inf")
    for bad, bounds, words in ((Config("x", k=0), dict(k=1), "--k 0: must be at least 1"),
                               (Config("x", k=5), dict(k=(1, 4)), "--k 5: must be between 1 and 4"),
                               (Config("x", lr=-1e-9), dict(k=1, lr=(0, 1)), "--lr -1e-09: must be between 0 and 1"),
                               (Config("x", lr=nan), dict(lr=(0, 1)), "--lr nan: must be between 0 and 1"),
                               (Config("x", lr=nan), dict(lr=0), "--lr nan: must be at least 0"),
                               (Config("x", lr=inf), dict(lr=(0, 1)), "--lr inf: must be between 0 and 1"),
                               (Config("x", lr=-inf), dict(lr=0), "--lr -inf: must be at least 0"),
                               (Config("x", lr=nan), {}, "--lr nan: must be between 0 and 10"),   # from COMMON_BOUNDS
                               (Config("x", k=0), dict(lr=(0, 1)), "--k 0: must be at least 1"),
                               (Config("x", kl_coef=-1.0), {}, "--kl_coef -1.0: must be at least 0")):         # named nowhere
        with pytest.raises(InputError) as error:
            check_bounds(bad, **bounds)
        assert str(error.value) == words


@pytest.mark.parametrize("error, code, words", [
    (InputError("data.jsonl:3: not JSON"), 2, "error: data.jsonl:3: not JSON"),
    (FloatingPointError("the gradient's norm is nan"), 2, "error: the gradient's norm is nan"),
    (OSError(28, "No space left on device", "runs/x"), 2, "error: runs/x: No space left on device; what was saved before is whole"),
    (KeyboardInterrupt(), 130, "stopped"),
    (KeyboardInterrupt("stopped; go on"), 130, "stopped; go on"),
    (None, 0, "")])
def test_run_ends_with_one_line(error, code, words, monkeypatch, capsys):
    def main(found):
        assert found == Config("x")
        if error is not None:
            raise error
    monkeypatch.setattr(sys, "argv", ["script.py", "--data", "x"])
    if code:
        with pytest.raises(SystemExit) as end:
            run_script(main, Config)
        assert end.value.code == code
    else:
        run_script(main, Config)
    assert capsys.readouterr().err == (words + "\n" if words else "")


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    """A KeyError is no user's mistake: it keeps its traceback."""
    monkeypatch.setattr(sys, "argv", ["script.py", "--data", "x"])
    with pytest.raises(KeyError):
        run_script(lambda found: {}["missing"], Config)


def test_run_reports_a_wrong_flag(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", "--data", "x", "--k", "many"])
    with pytest.raises(SystemExit) as end:
        run_script(lambda found: pytest.fail("main must not start"), Config)
    assert end.value.code == 2 and capsys.readouterr().err == "error: argument --k: invalid int value: 'many' (--help lists the flags)\n"
