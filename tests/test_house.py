"""The house itself: floors, settings, packages and documents hold what they promise."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import grimp
import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FLOORS = ("planner", "workers", "web")
HEAVY = ("torch", "transformers", "celery", "flask", "redis", "huggingface_hub", "safetensors")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def modules(floor: str) -> list[str]:
    files = [path for path in (ROOT / floor).rglob("*.py") if path.name != "__init__.py"]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_point_down_only() -> None:
    done = subprocess.run([str(BIN / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


#: A folder's files beside its face, at most; the next one is the sign that it holds two nouns.
MOST_FILES = 12
#: A module's lines, at most; a longer one stands here with the reason.
MOST_LINES = 400
LONG: dict[str, str] = {}


def folders(*roots: str) -> list[Path]:
    return sorted({path.parent for root in roots for path in (ROOT / root).rglob("*.py")})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")} - {"__init__.py", "conftest.py"}


def test_no_folder_holds_two_nouns() -> None:
    crowded = {str(folder.relative_to(ROOT)): len(names(folder)) for folder in folders(*FLOORS, "tests")}
    assert {folder: count for folder, count in crowded.items() if count > MOST_FILES} == {}


def test_a_long_module_has_a_reason() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
    }
    assert {path for path, count in lines.items() if count > MOST_LINES} == set(LONG)


@pytest.mark.parametrize("folder", folders(*FLOORS), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_face_says_what_its_folder_is_and_only_hands_on_names(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert isinstance(node, ast.ImportFrom) or is_all, ast.unparse(node)


def test_no_import_leads_back_and_nobody_imports_the_face_of_its_own_folder() -> None:
    graph = grimp.build_graph(*FLOORS, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    list(TopologicalSorter(imports).static_order())  # graphlib.CycleError names the circle
    own = {(module, found) for module, all_ in imports.items() for found in all_ if module.startswith(f"{found}.")}
    assert own == set()


@pytest.mark.parametrize(
    ("imported", "absent"),
    [
        (", ".join(["planner", *(m for m in modules("planner") if m != "planner.tasks")]), HEAVY),
        ("planner.tasks, workers.celery_app, workers.jobs.jobs", ("torch", "transformers", "flask")),
        ("web.app, web.wsgi, web.gunicorn_conf", ("torch", "transformers", "safetensors")),
        ("workers.cli.main", ("torch", "transformers", "celery", "flask", "redis")),
        ("workers.up.service, workers.up.supervisor", ("torch", "transformers", "celery", "flask")),
        (
            "workers.checkpoint.headers, workers.checkpoint.folder, workers.downloader",
            ("torch", "numpy", "huggingface_hub", "transformers"),
        ),
    ],
    ids=["values", "planner", "web", "cli", "up", "headers"],
)
def test_importing_loads_nothing_heavy(imported: str, absent: tuple[str, ...]) -> None:
    loaded = python(f"import sys, {imported}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))").split()
    assert not set(absent) & set(loaded)


def test_the_environment_is_read_in_one_place() -> None:
    reads = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in (ROOT / floor).rglob("*.py")
        if re.search(r"os\.(environ|getenv)|from os import .*(environ|getenv)", path.read_text(encoding="utf-8"))
    }
    assert {name.rpartition("/")[0] for name in reads} <= {"workers/settings"}


def test_no_pickle_and_no_remote_code() -> None:
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert isinstance(node.value, ast.Constant), path
                    assert node.value.value is False, path
                assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & {
                    n.split(".")[0] for n in names
                }, path


#: Calls that run what they read, or a shell.
RUNS_DATA = {"eval", "exec", "compile", "torch.load", "torch.jit.load", "numpy.load", "np.load", "yaml.unsafe_load",
             "yaml.full_load", "os.system", "os.popen"}  # fmt: skip


def calls_that_run_data(text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            shell = any(
                k.arg == "shell" and not (isinstance(k.value, ast.Constant) and not k.value.value)
                for k in node.keywords
            )
            shell &= name != "shellcode"  # argcomplete's, whose `shell` is the name of one
            if name in RUNS_DATA or shell or any(k.arg == "allow_pickle" for k in node.keywords):
                found.append(name)
    return found


def test_nothing_runs_what_it_reads() -> None:
    assert calls_that_run_data("torch.load(x); eval('1'); run(a, shell=True); f(shell=False)") == [
        "torch.load",
        "eval",
        "run",
    ]
    for folder in (*FLOORS, "deploy", "scripts", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not calls_that_run_data(path.read_text(encoding="utf-8")), path


def test_every_file_of_the_packages_is_shipped() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*"):
            inner = path.relative_to(ROOT / floor)
            if path.is_dir() or "__pycache__" in inner.parts:
                continue
            if path.suffix == ".py":
                assert ".".join((floor, *inner.parent.parts)) in packages, path
            else:
                assert any(fnmatch(inner.as_posix(), pattern) for pattern in data[floor]), path


def test_every_dependency_is_pinned() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", text, flags=re.MULTILINE)}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(item for extra in extras.values() for item in extra)]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=;! \[]", item)[0]).lower() for item in wanted}
    assert names - {"fairshard"} <= pinned


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_module_is_documented_as_it_is() -> None:
    module = script("modules_doc")
    assert module.TARGET.read_text(encoding="utf-8") == module.render(), "run 'make docs'"
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            assert module.summary(path), f"{path} has no docstring"


def test_every_call_is_documented_as_it_is() -> None:
    module = script("api_doc")
    assert module.TARGET.read_text(encoding="utf-8") == module.render(), "run 'make docs'"


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ("", 0, "NOT CHECKED"),
        ("{}", 0, "NOT CHECKED"),
        ('{"dependencies": [{"name": "a", "skip_reason": "not found"}]}', 0, "NOT CHECKED"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "No known hole in 1"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}]}', 1, "a 1: CVE-1"),
    ],
)
def test_an_audit_without_advisories_is_no_all_clear(output: str, status: int, said: str) -> None:
    judged, sentence = script("audit").judge(output)
    assert judged == status
    assert said in sentence


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", link):
            assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    inline = "\n".join(re.findall(r"`([^`\n]+)`", text))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    said = blocks + "\n" + inline
    assert set(re.findall(r"^(?:\$ )?(?:\w+=\S+ )*make ([a-z-]+)", said, flags=re.MULTILINE)) <= targets
    commands = python("from workers.cli.main import main; main(['--help'])")
    for command in set(re.findall(r"^(?:\$ )?fairshard ([a-z]+)", said, flags=re.MULTILINE)):
        assert re.search(rf"\b{command}\b", commands), command


def test_every_setting_is_documented_as_it_is() -> None:
    module = script("settings_doc")
    assert module.TARGET.read_text(encoding="utf-8") == module.render(), "run 'make docs'"
