"""What holds the house together: what may import what, that nothing imports the oracle, and that the tour of the code
leads through the rooms that there are.

Imports are read from the source, so that those inside functions, under TYPE_CHECKING and by a module's name in a text
count like any other.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import flexreason

PACKAGE = Path(flexreason.__file__).parent

TREE = ["sample", "layout", "chains", "merge", "mask", "blocks", "row"]  # reading order is import order
PROOF = [
    "float64",
    "oracle",
    "sizes",
    "tiny",
    "compare",
    "verdict",
    "draws",
    "rows",
    "explain",
    "selftest",
    "source",
    "kept",
    "harmless",
]
PROOF += ["identity", "parts", "evidence", "scan", "conversations", "diagnose"]
TOOLS = ["talk", "memory", "load"]  # these know nothing of the rest

LAYERS = {  # what a folder may import, beside itself
    "tree": set(),
    "tools": set(),
    "attention": {"tree"},
    "recurrent": {"tree", "attention"},
    "model": {"tree", "attention", "recurrent"},
    "proof": {"tree", "tools", "attention", "recurrent", "model"},
    "patching": {"model", "proof"},
    "chat": {"tree", "tools"},
    "data": {"tree", "tools", "chat"},
    "show": {"tree", "chat", "data"},
    "train": {"tree", "tools", "attention", "model", "proof", "patching", "chat", "data"},
    "bench": {"tree", "tools", "attention", "model", "proof", "patching", "chat", "data"},
    "demo": {"tree", "tools", "attention", "model", "proof", "patching", "chat", "data", "train"},
}  # commands import what they like, and nothing imports a command

OUTSIDE = ("train", "bench", "demo")
"""Folders that use the library as its users do."""

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imports(source):
    """Modules of flexreason, and other packages, that a source imports. Its version is no module."""
    own, others = set(), set()
    tree = ast.parse(source)
    version_only = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    version_only = {name for name in version_only if name.startswith("flexreason.")} <= {"flexreason.__version__"}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name != "flexreason" or a.asname or not version_only]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not read here"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("flexreason.") in MODULES else node.module for name in whole]
        elif isinstance(node, ast.Constant) and str(node.value).removeprefix("flexreason.") in MODULES:
            names = [node.value] if node.value.startswith("flexreason.") else []
        for name in names:
            top, _, rest = name.partition(".")
            if top == "flexreason":
                own.add(rest or "flexreason")
            else:
                others.add(top)
    return own, others - set(sys.stdlib_module_names)


LOOK = "show.look"
"""`layout.show()` imports it when it is called: a layout knows that it can be shown, and nothing of how."""


def imports_of(module):
    own, others = imports(MODULES[module].read_text())
    return own - ({LOOK} if module == "tree.layout" else set()), others


def layer(module):
    top = module.partition(".")[0]
    return "tools" if top in TOOLS else top


def test_imports_are_read_wherever_they_stand():
    source = """
import torch, flexreason as fr
from flexreason.proof import oracle
if TYPE_CHECKING:
    from flexreason.tree.row import Row
def late():
    from flexreason.model import head
    import_module("flexreason.cli")
    return "mask"
"""
    assert imports(source) == ({"flexreason", "proof.oracle", "tree.row", "model.head", "cli"}, {"torch"})
    for more, found in (("version = flexreason.__version__", set()), ("flexreason.patch(model)", {"flexreason"})):
        assert imports(f"import flexreason\n{more}")[0] == found


def test_the_oracle_imports_nothing_of_layouts_and_masks():
    own, others = imports_of("proof.oracle")
    assert own == {"proof.float64"}
    assert others == {"torch"}
    own, others = imports_of("proof.float64")
    assert own == set()
    assert others == {"torch"}


def test_the_idea_is_torch_and_numpy_and_points_one_way():
    for at, name in enumerate(TREE):
        own, others = imports_of(f"tree.{name}")
        assert own <= {f"tree.{before}" for before in TREE[:at]}, name
        assert others <= {"torch", "numpy"}, name


def test_the_proof_is_read_in_the_order_in_which_it_imports():
    assert {f"proof.{name}" for name in [*PROOF, "verify"]} == {name for name in MODULES if name.startswith("proof.")}
    for at, name in enumerate(PROOF):
        own = {other for other in imports_of(f"proof.{name}")[0] if other.startswith("proof.")}
        assert own <= {f"proof.{before}" for before in PROOF[:at]}, name


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_imports_what_is_below_it_only(name):
    modules = [module for module in MODULES if layer(module) == name]
    assert modules
    for module in modules:
        allowed = LAYERS[name] | {name} | ({"flexreason"} if name in OUTSIDE else set())
        wrong = {other for other in imports_of(module)[0] if layer(other) not in allowed}
        assert not wrong, module


def test_nothing_imports_a_command_but_commands_and_the_command_line():
    assert {layer(module) for module in MODULES} == {*LAYERS, "commands", "cli", "__main__"}
    for module in MODULES:
        commands = {other for other in imports_of(module)[0] if layer(other) == "commands"}
        assert not commands or layer(module) in ("cli", "commands"), module
    assert [module for module in MODULES if "cli" in imports_of(module)[0]] == ["__main__"]


def test_imports_make_no_circle():
    below = {module: {other for other in imports_of(module)[0] if other in MODULES} for module in MODULES}
    while free := [module for module in below if not below[module] & below.keys()]:
        for module in free:
            del below[module]
    assert not below


def test_no_module_of_the_package_has_the_name_of_what_it_exports():
    """Importing the module would put it in the place of the function."""
    assert not set(flexreason.__all__) & {module for module in MODULES if "." not in module}


def test_importing_flexreason_imports_neither_torch_nor_transformers():
    """The first import stays quick; names bring with them what they need."""
    code = "import flexreason, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_public_name_is_there_when_it_is_asked_for():
    assert all(getattr(flexreason, name).__module__.startswith("flexreason.") for name in flexreason.__all__)
    with pytest.raises(AttributeError, match="no attribute 'gone'"):
        _ = flexreason.gone


def test_the_least_versions_are_those_that_the_tests_can_be_run_under():
    """requirements-least.txt, of `make least`, has the lower bounds that pyproject.toml declares."""
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared: dict[str, Version] = {}
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["train"], *extras["sft"]]:
        requirement = Requirement(line)
        if requirement.name == "flexreason":
            continue
        [bound] = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        declared[requirement.name] = max(bound, declared.get(requirement.name, bound))
    lines = (root / "requirements-least.txt").read_text().splitlines()
    least = {name: Version(version) for name, _, version in (line.partition("==") for line in lines) if version}
    assert {name: least[name] for name in declared} == declared


def tour():
    """What the tour of the code names, in its order: paths from the package on."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    [block] = re.findall(r"```\nflexreason/\n(.*?)```", text, re.DOTALL)
    named, folder = [], ""
    for line in block.splitlines():
        indent, name = re.match(r"( +)(\S+)  +\S", line).groups()
        folder = folder if indent == "    " else name if name.endswith("/") else ""
        named.append(name if name == folder else folder + name)
    return named


def test_the_tour_names_every_file_and_nothing_that_is_not_there():
    """The files of commands are named by their commands."""
    named = tour()
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.glob("[a-z]*/*.py") if path.name != "__init__.py"}
    assert {name for name in files if not name.startswith("commands/")} - set(named) == set()
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in named if name.endswith("/")} == folders
    assert {path.name for path in PACKAGE.glob("*.py")} - set(named) == {"__init__.py", "__main__.py"}
    assert [name for name in named if not (PACKAGE / name).exists()] == []
    assert len(set(named)) == len(named)


def test_the_tour_goes_the_way_of_imports():
    named = tour()
    rooms = [name.rstrip("/").removesuffix(".py") for name in named if name.count("/") == name.endswith("/")]
    for at, room in enumerate(rooms):
        assert LAYERS.get(room, set()) - {"tools"} <= set(rooms[:at]), room
    modules = [name.removesuffix(".py").replace("/", ".") for name in named if name.endswith(".py")]
    for at, module in enumerate(modules):
        own = {other for other in imports_of(module)[0] if layer(other) == layer(module)}
        assert not own & set(modules[at + 1 :]), module


def test_what_is_to_be_done_in_files_is_said_of_files_that_are_there():
    """NAME stands for what a reader adds."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    files = set(re.findall(r"`((?:flexreason|tests|docs)/[\w/.]+)`", text))
    assert len(files) > 20
    assert [name for name in files if "NAME" not in name and not (PACKAGE.parent / name).exists()] == []
