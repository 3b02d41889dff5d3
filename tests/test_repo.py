"""The repository keeps its word: flags are read, imports point one way, the README names what exists, files stay short."""
import ast
import dataclasses
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from nanorlhf.config import parse

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "nanorlhf").rglob("*.py"))
SCRIPTS = [ROOT / f"train_{name}.py" for name in ("sft", "rm", "ppo")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENTRIES = {"train_sft.py": "train_sft", "train_rm.py": "train_rm", "train_ppo.py": "train_ppo", "nanorlhf.sample": "nanorlhf.sample",
           "nanorlhf.study": "nanorlhf.study.__main__", "nanorlhf.study.world": "nanorlhf.study.world", "nanorlhf.study.judge": "nanorlhf.study.judge",
           "nanorlhf.study.evaluate": "nanorlhf.study.evaluate"}

# Who may import whom; a leaf imports nobody and can be read alone in a lecture.
LEAVES = {"losses", "ppo", "gpt2", "llama", "heads", "config", "tokenizer", "files", "optim", "speed"}
ALLOWED = {"data": {"config"}, "batching": {"config", "data"}, "generate": {"batching"}, "reward": {"batching", "config", "data"},
           "checkpoint": {"config", "files", "gpt2", "heads", "llama", "reward", "tokenizer"}, "runs": {"batching", "checkpoint", "config", "dist", "files"}, "log": {"files"}, "dist": {"config"},
           "sample": {"batching", "checkpoint", "config", "data", "dist", "files", "generate", "reward", "speed"},
           # the study may import the method and the scripts, the method never the study
           "study/world": set(), "study/small": {"checkpoint", "gpt2", "heads", "llama", "tokenizer"},
           "study/judge": {"config", "data", "files", "reward"},
           "study/evaluate": {"batching", "checkpoint", "config", "data", "dist", "losses", "judge"},
           "study/stages": {"batching", "checkpoint", "data", "files", "heads", "log", "losses", "ppo", "sample", "evaluate", "judge", "small", "world"},
           "study/report": {"files", "evaluate", "figures", "findings", "world"}, "study/findings": {"config", "evaluate", "figures"}, "study/figures": set(),
           "study/__main__": {"checkpoint", "config", "dist", "files", "log", "report", "stages"}}
THIRD_PARTY = {"torch", "tiktoken", "sentencepiece", "numpy", "safetensors", "regex"}      # regex comes with tiktoken
MORE = {"study/world": {"nanorlhf"}, "study/evaluate": {"train_rm"}, "study/stages": {"train_sft", "train_rm", "train_ppo"},
        "study/report": {"matplotlib"}, "study/figures": {"matplotlib"}}


def imports(path):
    """(siblings, others) that a file imports, wherever in it."""
    siblings, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            siblings |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
    return siblings, others


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    name, (siblings, others) = path.relative_to(ROOT / "nanorlhf").with_suffix("").as_posix(), imports(path)
    assert siblings <= (set() if name in LEAVES else ALLOWED.get(name, set())), path
    assert others - set(sys.stdlib_module_names) <= THIRD_PARTY | MORE.get(name, set()), path


@pytest.mark.parametrize("module", ENTRIES.values())
def test_every_flag_is_read_and_explained(module):
    loaded = importlib.import_module(module)
    source = Path(loaded.__file__).read_text(encoding="utf-8")
    used = source + (ROOT / "nanorlhf" / "runs.py").read_text(encoding="utf-8")
    for field in dataclasses.fields(loaded.Config):
        assert re.search(rf"config\.{field.name}\b", used), f"--{field.name} of {module} is read by nothing"
        assert re.search(rf"^    {field.name}:[^#\n]*#\s*\S", source, re.MULTILINE), f"--{field.name} of {module} has no comment"


def test_number_of_flags():
    # A flag is for what a study varies: a new one must be worth this line.
    flags = {module: len(dataclasses.fields(importlib.import_module(module).Config)) for module in ENTRIES.values()}
    assert flags["train_sft"] <= 18 and flags["train_rm"] <= 26 and flags["train_ppo"] <= 35, flags


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


def test_readme_names_files_that_exist():
    for name in re.findall(r"`([\w/.]+\.(?:py|txt|toml|md))`", README):
        here = [ROOT / name, ROOT / "nanorlhf" / name, ROOT / "tests" / name]
        assert any(path.exists() for path in here) or f"cat > {name}" in README, f"the README names {name}, which does not exist"


def test_readme_reading_order_has_the_right_lengths():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert {Path(name).name for name, _ in rows} >= {p.name for p in PACKAGE + SCRIPTS if p.name != "__init__.py"}
    for name, lines in rows:
        path = ROOT / name if (ROOT / name).exists() else ROOT / "nanorlhf" / name
        real = len(path.read_text(encoding="utf-8").splitlines())
        assert abs(real - int(lines)) <= 0.1 * real + 5, f"{name} has {real} lines, the README says {lines}"


def test_functions_fit_on_a_screen():
    for path in PACKAGE + SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= (120 if node.name == "main" else 60), f"{path.name}: {node.name} has {length} lines"


def test_heart_is_short():
    heart = [ROOT / "nanorlhf" / f"{name}.py" for name in ("gpt2", "llama", "batching", "generate", "losses", "ppo")] + SCRIPTS
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in heart) <= 2000


def test_nothing_is_unpickled():
    for path in PACKAGE + SCRIPTS:
        assert not re.search(r"torch\.load\(|import pickle|pickle\.load", path.read_text(encoding="utf-8")), path
