"""What holds the house together: what may import what, and that nothing imports the oracle."""

import ast
import subprocess
import sys
from pathlib import Path

import flexreason

PACKAGE = Path(flexreason.__file__).parent

CORE = ["sample", "layout", "tree", "mask", "blocks", "row"]  # reading order is import order


def imports(module):
    """Names of flexreason modules and of other packages that a module imports."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "flexreason":
                own.add(rest or "flexreason")
            else:
                others.add(top)
    return own, others - set(sys.stdlib_module_names)


def test_the_oracle_imports_nothing_of_layouts_and_masks():
    own, others = imports("proof/oracle")
    assert own == {"proof.testing"}
    assert others == {"torch"}
    own, others = imports("proof/testing")
    assert own == set()
    assert others == {"torch"}


def test_the_core_is_torch_only_and_points_one_way():
    for at, module in enumerate(CORE):
        own, others = imports(module)
        assert own <= set(CORE[:at]), module
        assert others <= {"torch"}, module


def test_importing_flexreason_does_not_import_transformers():
    """The first import stays quick; models bring transformers with them."""
    code = "import flexreason, sys; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
