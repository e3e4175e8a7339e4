"""The rules of the house, as far as a program can see them.

A file that breaks one is named with its line. Rules about meaning are for readers; these are about form.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "threefold"
MOST_LINES = 450

# A file imports only from rooms before its own.
ROOMS = ["errors", "files", "seeds", "strict_json", "config", "device", "console", "hub", "text", "data", "model",
         "generation", "evaluation", "objectives", "training", "plan", "inspection", "remote", "rundir", "stage", "pretrain",
         "task_rows", "finetune",
         "prompting", "auto", "scoring", "exchange", "tasks", "chat",
         "tour_tasks", "tour", "doctor", "command", "verbs", "using", "cli", "__main__"]

# Within a room, from files before it. A room's `__init__` gathers what the room offers and comes last.
ROOM_ORDER: dict[str, list[str]] = {
    "config": ["words", "lines", "leaf", "recipe", "toml", "recipes"],
    "text": ["lines", "rows", "paths", "sources", "duplicates", "clean", "probe_child", "moses", "guard", "tokenizer_json",
             "conventions", "sentencepiece_model", "import_marian", "import_tokenizer", "train_tokenizer", "grow_tokenizer",
             "plain", "tokenizer", "streaming",
             "template_child", "chat", "encoded", "sentences", "pretrained"],
    "data": ["order", "stream", "manifest", "corpus", "shards", "mixture", "loader", "windows", "examples"],
    "model": ["config", "linear", "norms", "positions", "cache", "dropout", "mask", "padding", "scores", "attention", "feedforward",
              "block", "stack", "transformer", "losses", "pooling", "heads", "output", "base", "language", "classifiers",
              "families.family", "families.config_json", "families.rope", "families.gpt2", "families.gpt1", "families.gpt3",
              "families.llama", "families.qwen3", "families.phi3", "families.palm", "families.biogpt", "families.bert",
              "families.roberta", "families.electra", "families.transformer", "families.t5", "families",
              "first_values", "build", "grow", "quantize", "tensors", "names", "weights", "lowrank", "adapters", "opening"],
    "generation": ["sampling", "stopping", "rules", "pieces", "reading", "likelihood", "engine", "beams", "arguments"],
    "tasks": ["base", "writing", "asking", "judging", "zero_shot", "served"],
    "chat": ["conversation", "speakers", "loop"],
    "evaluation": ["loss", "metrics", "execution", "yardsticks"],
    "objectives": ["term", "vocabulary", "causal", "masked", "replaced", "span", "prefix", "rows", "classify", "tag", "instruct",
                   "translate", "embed", "preference", "tasks", "heldout", "heldout_rows", "samples"],
    "training": ["log", "decisions", "guards", "length", "optim", "schedule", "signals", "checkpoint", "gradients", "keeper",
                 "trainer", "search",
                 "report", "card"],
    "plan": ["check", "scaling", "shape"],
    "inspection": ["batches"],
}

FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=NAMES)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def found(path: Path, rule: Callable[[ast.AST], str | None]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {words}"
            for node in ast.walk(tree_of(path)) if (words := rule(node))]


def dotted(node: ast.AST) -> str:
    """`np.random.seed` of the expression that is called, as far as it is a chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever in the file it stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.partition(".")[2] in MODULES and inner.startswith("threefold.")
                yield node.lineno, inner if is_module else str(node.module)


# ------------------------------------------------------------------------------------------ order

def position(module: str) -> tuple[int, int]:
    """(place of the room, place in the room) of `model.families.gpt2`."""
    room, _, inner = module.partition(".")
    order = ROOM_ORDER.get(room, [])
    if inner in order:
        return ROOMS.index(room), order.index(inner)
    assert not inner, f"list `{inner}` in ROOM_ORDER[{room!r}]"
    return ROOMS.index(room), len(order)


@each_file
def test_a_file_imports_only_from_what_stands_before_it(path: Path) -> None:
    module = module_of(path)
    if module == "":  # the public names, loaded lazily from everywhere
        return
    own = position(module)
    for line, name in imports(path):
        if name.startswith("threefold."):
            other = position(name.removeprefix("threefold."))
            assert other < own, f"{path.relative_to(ROOT)}:{line}: `{module}` imports `{name}`, which stands after it"


def test_the_page_about_the_house_lists_the_same_files() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for room, names in ROOM_ORDER.items():
        row = re.search(rf"^\| `{room}/` \|.*\| ([^|]+) \|$", page, re.MULTILINE)
        assert row, f"ARCHITECTURE.md has no row for {room}/"
        listed = [name.rstrip("/") for name in re.findall(r"`([\w/]+)`", row[1])]
        assert listed == list(dict.fromkeys("families" if name.startswith("families") else name for name in names)), room
    alone = {name for name in ROOMS if (ROOT / "threefold" / f"{name}.py").is_file()} - {"__main__"}
    assert {name for name in alone if f"`{name}.py`" not in page} == set()


def test_every_file_that_is_listed_exists() -> None:
    listed = {f"{room}.{name}" for room, names in ROOM_ORDER.items() for name in names}
    assert listed <= MODULES
    assert {module.partition(".")[0] for module in MODULES} - {""} == set(ROOMS)


# ------------------------------------------------------------------------------------------ what is not done

WRITING_CALLS = {"os.replace", "os.rename", "os.renames", "os.remove", "os.unlink", "os.mkdir", "os.makedirs",
                 "os.rmdir", "os.removedirs", "os.link", "os.symlink", "os.truncate", "os.mkfifo", "np.save",
                 "np.savez", "np.savetxt", "np.savez_compressed", "numpy.save", "torch.save", "save_file"}
WRITING_METHODS = {"write_text", "write_bytes", "mkdir", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to",
                   "tofile"}
WRITING_MODE = re.compile(r"[rbt]*[wax+][rbt+]*")


def writes(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    name = dotted(node.func)
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if name in WRITING_CALLS or method in WRITING_METHODS:
        return f"`{name or method}` writes"
    if name in ("open", "io.open") or method == "open":
        at = 0 if method == "open" and name != "io.open" else 1
        modes = [*node.args[at:at + 1], *(k.value for k in node.keywords if k.arg == "mode")]
        for mode in modes:
            value = mode.value if isinstance(mode, ast.Constant) else None
            if isinstance(value, str) and WRITING_MODE.fullmatch(value):
                return f"opens with mode {value!r}"
    if name == "os.open":
        flags = {dotted(n) for arg in node.args[1:] for n in ast.walk(arg)}
        to_nowhere = "os.devnull" in {dotted(arg) for arg in node.args}
        if flags & {"os.O_WRONLY", "os.O_RDWR", "os.O_CREAT"} and not to_nowhere:
            return "opens a descriptor to write"
    if name.endswith("memmap") and any(isinstance(k.value, ast.Constant) and k.value.value in ("w+", "r+")
                                       for k in node.keywords if k.arg == "mode"):
        return "maps a file to write"
    return None


@each_file
def test_only_files_py_writes_to_disk(path: Path) -> None:
    if path.name != "files.py":
        assert found(path, writes) == []
        written = {"shutil", "tempfile"} & {name.partition(".")[0] for _, name in imports(path)}
        assert not written, f"{path.relative_to(ROOT)} imports {written}"


BANNED_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load",
                "yaml.load", "torch.hub.load", "os.system"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib",
                  "transformers", "trl", "peft", "accelerate", "lightning", "sentence_transformers"}


@each_file
def test_no_pickle_no_eval_no_borrowed_trainer(path: Path) -> None:
    assert found(path, lambda node: f"`{dotted(node.func)}`" if isinstance(node, ast.Call)
                 and dotted(node.func) in BANNED_CALLS else None) == []
    assert [name for _, name in imports(path) if name.partition(".")[0] in BANNED_MODULES] == []


@each_file
def test_nothing_is_printed_past_the_console(path: Path) -> None:
    def prints(node: ast.AST) -> str | None:
        return "print" if isinstance(node, ast.Call) and dotted(node.func) == "print" else None

    assert path.name in ("template_child.py", "probe_child.py") or found(path, prints) == []


@each_file
def test_nothing_is_left_undone(path: Path) -> None:
    unfinished = re.compile(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError|not implemented)\b")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{i}: {line}" for i, line in enumerate(lines, 1) if unfinished.search(line)] == []


# ------------------------------------------------------------------------------------------ form

@each_file
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@each_file
def test_public_names_are_explained(path: Path) -> None:
    tree = tree_of(path)
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(tree), "the module has no docstring"
    missing = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [f"{node.lineno}: {node.name}"]
    assert missing == []


def text_files() -> list[Path]:
    """Everything that is published and read, found without git, which a source archive lacks."""
    skipped = {".git", ".venv", "build", "dist", "runs", ".hypothesis", ".ruff_cache", ".mypy_cache", ".pytest_cache"}
    names = ("*.py", "*.md", "*.toml", "*.txt", "Makefile", "run", "*.yml", "*.yaml", "*.sh", "*.css", "*.html")
    return [path for name in names for path in ROOT.rglob(name)
            if not skipped & set(path.relative_to(ROOT).parts) and "fixtures" not in path.parts
            and path != Path(__file__).resolve() and path.is_file()]


MACHINE_PATH = re.compile(r"(?<![\w.:/~])/(?:home|Users|root|work|mnt|opt|scratch)/\w")
REGISTRY = re.compile(r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|registry\.npmjs|"
                      r"--(?:extra-)?index-url[ =]+http|^\s*-i\s+http", re.MULTILINE)


def test_no_path_of_one_machine_is_published() -> None:
    assert [f"{path.relative_to(ROOT)}: {match[0]}" for path in text_files()
            for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))] == []


def test_no_address_of_a_registry_is_published_but_pytorchs_own() -> None:
    allowed = {ROOT / "README.md", PACKAGE / "doctor.py"}
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        if path in allowed:
            text = text.replace("https://download.pytorch.org/whl/cpu", "").replace("--index-url", "")
        assert not REGISTRY.search(text), f"{path.relative_to(ROOT)} names a registry"


# ------------------------------------------------------------------------------------------ the project's files

def test_every_dependency_is_pinned_once_and_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 and re.fullmatch(r"[\w.]+", pin[1]) for pin in pins), "exact versions, no local builds"
    versions = {canonicalize_name(name): version for name, version in pins}
    assert len(versions) == len(pins)
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"constraints.txt does not pin {requirement.name}"
            assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


def test_the_extras_that_errors_name_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and dotted(node.func).endswith("MissingExtra"):
                last = node.args[-1]
                assert isinstance(last, ast.Constant) and last.value in extras, f"{path}:{node.lineno}"


# ------------------------------------------------------------------------------------------ what an import costs

def child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_threefold_imports_no_torch() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'typer', 'huggingface_hub', 'tokenizers'}"
    assert child(f"import sys, threefold; print(*sorted({heavy} & set(sys.modules)))") == ""


def test_help_imports_no_torch() -> None:
    code = ("import sys\nsys.argv = ['threefold', '--help']\n"
            "try:\n    from threefold.cli import main; main()\n"
            "except SystemExit as end:\n    assert not end.code\n"
            "print('HEAVY', *sorted({'torch', 'numpy', 'rich', 'huggingface_hub', 'tokenizers'} & set(sys.modules)))\n")
    assert child(code).splitlines()[-1] == "HEAVY"


def test_R06_the_core_needs_no_extra() -> None:
    """Every module is importable without the packages of the extras."""
    modules = [f"threefold.{module}" for module in sorted(MODULES - {"", "__main__", "text.template_child"})]
    code = ("import importlib, sys\n"
            "for name in ('pyarrow', 'zstandard', 'datasets', 'transformers', 'pytest', 'hypothesis'):\n"
            "    sys.modules[name] = None\n"
            f"for name in {modules!r}:\n    importlib.import_module(name)\n"
            "print('all')\n")
    assert child(code) == "all"
