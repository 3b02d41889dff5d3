"""The repository keeps its word: flags are read, imports point one way, pages name what exists, files stay short."""
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

from nanorlhf.io.read import InputError
from nanorlhf.run.cli import field_comments, parse

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "nanorlhf").rglob("*.py"))
SCRIPTS = [ROOT / f"train_{name}.py" for name in ("sft", "rm", "ppo")]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
NO_FIELDS = {"--help"}                       # a flag of every script that is no field of its Config
STUDY = sorted((ROOT / "nanorlhf" / "study").glob("*.py"))
ENTRIES = {"train_sft.py": "train_sft", "train_rm.py": "train_rm", "train_ppo.py": "train_ppo", "nanorlhf.sample": "nanorlhf.sample",
           "nanorlhf.study": "nanorlhf.study.__main__", "nanorlhf.study.world": "nanorlhf.study.world", "nanorlhf.study.judge": "nanorlhf.study.judge",
           "nanorlhf.study.evaluate": "nanorlhf.study.evaluate"}

THIRD_PARTY = {"torch", "tiktoken", "sentencepiece", "numpy", "safetensors", "regex"}      # regex comes with tiktoken
# A leaf can be read alone in a lecture; the models know nothing but attention.
LEAVES = {"attention": set(), "losses": set(), "ppo": {"losses"}, "gpt2": {"attention"}, "llama": {"attention"}}
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
    comments = field_comments(loaded.Config)
    shared = ROOT / "nanorlhf" / "run"           # what the three scripts share reads some of their flags
    used = source + "".join((shared / f"{name}.py").read_text(encoding="utf-8") for name in ("run_folder", "training_run"))
    for field in dataclasses.fields(loaded.Config):
        assert re.search(rf"config\.{field.name}\b", used), f"--{field.name} of {module} is read by nothing"
        assert comments[field.name], f"--{field.name} of {module} has no comment"


def test_number_of_flags():
    # A flag is for what a study varies: a new one must be worth this line.
    flags = {module: len(dataclasses.fields(importlib.import_module(module).Config)) for module in ENTRIES.values()}
    assert flags["train_sft"] <= 20 and flags["train_rm"] <= 28 and flags["train_ppo"] <= 39, flags


# ------------------------------------------------------------------------------------------------- README and docs/

def commands(text):
    """Every command of a page's shell blocks, continued lines joined."""
    for block in re.findall(r"```(?:bash|sh|sbatch)\n(.*?)```", text, re.DOTALL):
        block = re.sub(r"<<'EOF'\n.*?\nEOF\n", "\n", block, flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines():
            line = line.split("  #")[0].strip().removesuffix(" &")
            if line and not line.startswith("#"):
                yield line


def entries_of(text):
    """The scripts and modules that a page's commands run; their flags are read as the command line's are."""
    for line in commands(text):
        words = shlex.split(line)
        for i, word in enumerate(words):
            if word in ENTRIES:
                parse(importlib.import_module(ENTRIES[word]).Config, words[i + 1:])
                yield word


@pytest.mark.parametrize("name", PAGES)
def test_commands_have_the_flags_they_name(name):
    list(entries_of(PAGES[name]))


def test_every_entry_is_shown():
    shown = {entry for text in PAGES.values() for entry in entries_of(text)}
    assert shown == set(ENTRIES), f"no page shows a command for {set(ENTRIES) - shown}"


def test_the_checks_of_pages_find_what_is_wrong():
    wrong = "```bash\npython train_sft.py --data d --init i --out o \\\n  --stepz 3\n```"
    with pytest.raises(InputError, match="stepz"):
        list(entries_of(wrong))
    assert missing_flags("`--no_such_flag` and `--steps 3`") == {"--no_such_flag"}
    assert missing_files("`nowhere.py`, `losses.py`, `run/log.py`, [a](docs/none.md)", ROOT) == {"nowhere.py", "docs/none.md"}


def missing_flags(text):
    """Of the flags that a page names in its sentences, those that no script of ours has."""
    ours = {f"--{field.name}" for module in ENTRIES.values() for field in dataclasses.fields(importlib.import_module(module).Config)}
    for path in (ROOT / "benchmarks").glob("*.py"):
        ours |= {f"--{name}" for name in re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.MULTILINE)}
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return set(re.findall(r"`(--[a-z]\w*)[ `]", sentences)) - ours


@pytest.mark.parametrize("name", PAGES)
def test_flags_in_sentences_exist(name):
    assert missing_flags(PAGES[name]) <= NO_FIELDS


def missing_files(text, folder):
    """Of the files that a page in this folder names or links to, those that do not exist."""
    made = set(re.findall(r"cat > (\S+)", "".join(PAGES.values())))
    named = set(re.findall(r"`([\w/.-]+\.(?:py|txt|toml))`", text)) - made
    homes = (ROOT, ROOT / "nanorlhf", ROOT / "tests")
    missing = {name for name in named if not any((home / name).exists() for home in homes)}
    links = {link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    return missing | {link for link in links if not (folder / link).exists()}


@pytest.mark.parametrize("name", PAGES)
def test_files_that_are_named_exist(name):
    assert not missing_files(PAGES[name], (ROOT / name).parent)


def test_readme_tree_names_every_file_once():
    """In the order to read them. The study, of which a page is made, and the packages' own files are left out."""
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    named, folder = [], ROOT
    for line in tree.splitlines():
        indent, name = re.match(r"( *)([\w/.]+)", line).groups()
        if name == "nanorlhf/":
            folder = ROOT / name
        elif name.endswith(".py"):
            named.append((folder if indent else ROOT) / name)
        else:
            assert ((folder if indent else ROOT) / name).is_dir(), name
    expected = [path for path in PACKAGE + SCRIPTS if path not in STUDY and path.name != "__init__.py"]
    assert sorted(named) == sorted(expected)


@pytest.mark.parametrize("name", PAGES)
def test_pages_wrap(name):
    for number, line in enumerate(PAGES[name].splitlines(), 1):
        assert len(line) <= 100 or line.startswith(("|", "pip install")), f"{name}:{number} has {len(line)} characters"


def test_functions_fit_on_a_screen():
    for path in PACKAGE + SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= (80 if node.name == "main" else 50), f"{path.name}: {node.name} has {length} lines"


def test_lines_can_be_projected():
    for path in PACKAGE + SCRIPTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{path.name}:{number} has {len(line)} characters"


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


def test_it_is_small():
    """Counted in tokens: a wide line is no saving."""
    assert size(HEART + SCRIPTS) <= 23_000
    assert size([path for path in PACKAGE + SCRIPTS if path not in STUDY]) <= 44_000
    assert size(STUDY) <= 32_000
    assert len(README.splitlines()) <= 160


def test_a_line_says_one_thing():
    for path in SCRIPTS:
        count, lines = tokens(path)
        assert count / lines <= 10.5, path
    counts, lines = zip(*(tokens(path) for path in PACKAGE + SCRIPTS if path not in STUDY))
    assert sum(counts) / sum(lines) <= 11


def test_nothing_is_unpickled():
    for path in PACKAGE + SCRIPTS:
        assert not re.search(r"torch\.load\(|import pickle|pickle\.load", path.read_text(encoding="utf-8")), path
