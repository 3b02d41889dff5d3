"""The repository keeps its word: flags are read, imports point one way, the README names what exists, files stay short."""
import ast
import dataclasses
import importlib
import io
import re
import shlex
import sys
import tokenize
from pathlib import Path

import pytest

from nanorlhf.run.cli import parse

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "nanorlhf").rglob("*.py"))
SCRIPTS = [ROOT / f"train_{name}.py" for name in ("sft", "rm", "ppo")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENTRIES = {"train_sft.py": "train_sft", "train_rm.py": "train_rm", "train_ppo.py": "train_ppo", "nanorlhf.sample": "nanorlhf.sample",
           "nanorlhf.study": "nanorlhf.study.__main__", "nanorlhf.study.world": "nanorlhf.study.world", "nanorlhf.study.judge": "nanorlhf.study.judge",
           "nanorlhf.study.evaluate": "nanorlhf.study.evaluate"}

THIRD_PARTY = {"torch", "tiktoken", "sentencepiece", "numpy", "safetensors", "regex"}      # regex comes with tiktoken
# A leaf can be read alone in a lecture; the models know nothing but attention.
LEAVES = {"attention": set(), "losses": set(), "ppo": set(), "gpt2": {"attention"}, "llama": {"attention"}}
SCRIPT_NAMES = {path.stem for path in SCRIPTS}


def module_of(path):
    """nanorlhf/io/data.py -> io.data"""
    return ".".join(path.relative_to(ROOT / "nanorlhf").with_suffix("").parts)


MODULES = {module_of(path): path for path in PACKAGE}


def imports(path):
    """(modules of the package, others) that a file imports, wherever in it."""
    package = path.relative_to(ROOT).parts[:-1]
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        if not isinstance(node, ast.ImportFrom):
            continue
        base = list(package[: len(package) - node.level + 1]) if node.level else []
        base += node.module.split(".") if node.module else []
        if base[0] != "nanorlhf":
            others.add(base[0])
            continue
        base = ".".join(base[1:])
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            ours.add(inner if inner in MODULES else base)
    return ours - {""}, others


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    """The method never imports the study or a script; leaves import nothing of ours; nothing else than the five libraries."""
    ours, others = imports(MODULES[name])
    in_study = name.startswith("study.")
    assert ours <= LEAVES.get(name, set(MODULES))
    assert in_study or not any(each.startswith("study") for each in ours)
    assert not others & SCRIPT_NAMES             # a script is used by its command line alone
    drawing = {"matplotlib"} if name in ("study.figures", "study.report") else set()
    own = {"nanorlhf"} if name == "study.world" else set()               # which users also run as a file
    assert others - set(sys.stdlib_module_names) <= THIRD_PARTY | drawing | own


def test_no_module_imports_itself_in_a_circle():
    graph = {name: imports(path)[0] for name, path in MODULES.items()}
    done = set()
    while len(done) < len(graph):
        ready = {name for name in graph.keys() - done if graph[name] - {name} <= done}
        assert ready, f"a circle among {sorted(graph.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("module", ENTRIES.values())
def test_every_flag_is_read_and_explained(module):
    loaded = importlib.import_module(module)
    source = Path(loaded.__file__).read_text(encoding="utf-8")
    shared = ROOT / "nanorlhf" / "run"           # what the three scripts share reads some of their flags
    used = source + "".join((shared / f"{name}.py").read_text(encoding="utf-8") for name in ("run_folder", "training_run"))
    for field in dataclasses.fields(loaded.Config):
        assert re.search(rf"config\.{field.name}\b", used), f"--{field.name} of {module} is read by nothing"
        assert re.search(rf"^    {field.name}:[^#\n]*#\s*\S", source, re.MULTILINE), f"--{field.name} of {module} has no comment"


def test_number_of_flags():
    # A flag is for what a study varies: a new one must be worth this line.
    flags = {module: len(dataclasses.fields(importlib.import_module(module).Config)) for module in ENTRIES.values()}
    assert flags["train_sft"] <= 20 and flags["train_rm"] <= 28 and flags["train_ppo"] <= 39, flags


def commands():
    """Every command of the README's shell blocks, continued lines joined."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL):
        block = re.sub(r"<<'EOF'\n.*?\nEOF\n", "\n", block, flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip()
            if line and not line.startswith("#"):
                yield line


def test_readme_commands_have_the_flags_they_name():
    seen = set()
    for line in commands():
        words = shlex.split(line)
        for i, word in enumerate(words):
            if word in ENTRIES:
                arguments = [w for w in words[i + 1:] if w not in ("&&",)]
                parse(importlib.import_module(ENTRIES[word]).Config, arguments)
                seen.add(word)
    assert seen == set(ENTRIES), f"the README shows no command for {set(ENTRIES) - seen}"


def test_functions_fit_on_a_screen():
    for path in PACKAGE + SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= (100 if node.name == "main" else 60), f"{path.name}: {node.name} has {length} lines"


# ------------------------------------------------------------------------------------------------------------- size

SPACE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def tokens(path):
    """Python tokens that say something: neither comments nor docstrings nor line breaks.  -> (their number, lines that hold some)"""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].lineno)
    count, lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings and token.line.lstrip().startswith('"')
        if token.type not in SPACE and not is_docstring:
            count += 1
            lines |= set(range(token.start[0], token.end[0] + 1))
    return count, len(lines)


def size(paths):
    return sum(tokens(path)[0] for path in paths)


HEART = [ROOT / "nanorlhf" / f"{name}.py" for name in ("attention", "gpt2", "llama", "batching", "heads", "losses", "ppo", "generate", "reward")]
STUDY = [path for path in PACKAGE if path.parent.name == "study"]


def test_a_line_says_one_thing():
    for path in SCRIPTS:
        count, lines = tokens(path)
        assert count / lines <= 10.5, path
    counts, lines = zip(*(tokens(path) for path in PACKAGE + SCRIPTS if path not in STUDY))
    assert sum(counts) / sum(lines) <= 11


def test_nothing_is_unpickled():
    for path in PACKAGE + SCRIPTS:
        assert not re.search(r"torch\.load\(|import pickle|pickle\.load", path.read_text(encoding="utf-8")), path
