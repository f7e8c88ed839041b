"""Every message that the package raises, read from its syntax trees; and docs/errors.md, the index of them.

    python tests/messages.py    # writes the index anew

A message is a text that an exception is made of, whoever raises it in the end; a reason is what a function gives that
says in its first word that it gives one ("Why ..."), or that gives a `Reason`. What stands for a value is written `…`.
A `raise` that cannot be read is an error here, so that nothing is left out unseen.
"""

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import flexreason
from flexreason.cli import EXIT_CODES

PACKAGE = Path(flexreason.__file__).parent
INDEX = PACKAGE.parent / "docs" / "errors.md"

NO_MESSAGES = {"KeyboardInterrupt", "TimeoutError", "SystemExit", "AttributeError", "IndexError"}
"""What is raised for Python, or for the way out: it is not read by people, or has the words of Python itself."""

OPTIONS = {"cli.py", "parsing.py"}
"""Where messages are handed to argparse's own way out."""

REASONS = {
    "proof/tiny.py",
    "proof/sizes.py",
    "proof/selftest.py",
    "proof/explain.py",
    "bench/steps.py",
    "bench/batches.py",
}
"""Files whose exceptions are read as reasons: why a model is not known to be exact, or why a way is left out."""

GATHERED = {"Refused"}
"""Exceptions that make their message themselves, of others."""


def exceptions() -> set[str]:
    """The names of all exceptions, Python's and the package's."""
    classes = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    known = {name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    while more := {c.name for c in classes if {ast.unparse(base) for base in c.bases} & known} - known:
        known |= more
    return known


EXCEPTIONS = exceptions()


IMPERATIVES = (
    "accept|add|another|mark|ask|call|change|choose|correct|drop|evaluate|give|install|keep|leave|load|look|make|model.|move"
    "|number|pass|pip|run|say|set|shorten|split|start|take|train|try|turn|unpack|use|verify"
)

NEXT = re.compile(
    rf"(?i)\b(expected|did you mean|need(s|ed)?|may help|missing|takes another)\b|\(--\w"
    rf"|(^|[;:,.?(=-] (or |and |so |then |instead )*)({IMPERATIVES})\b"
)
"""Words of what to do next."""


@dataclass(frozen=True, order=True)
class Message:
    text: str
    module: str
    is_explained: bool = False  # part of a message, or a message with such a part, which says what to do

    @property
    def room(self) -> str:
        return self.module.split("/")[0] if "/" in self.module else "tools"

    @property
    def says_what_to_do(self) -> bool:
        return self.is_explained or bool(NEXT.search(self.text))


def messages_of(source: str, module: str) -> Iterator[Message]:
    """The messages of one module."""
    tree = ast.parse(source)
    name_constants(tree)
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            is_explained = _has_reason(node.exc) or module in REASONS
            yield from (Message(text, module, is_explained) for text in _raised(node.exc, functions, module))
        elif isinstance(node, ast.FunctionDef):
            yield from (Message(text, module, is_explained) for text, is_explained in _given(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".error") and module in OPTIONS:
            yield from (Message(text, module, True) for text in _texts(node.args[0]))  # which names --help


def _has_reason(exception: ast.expr) -> bool:
    """Whether it hands on why: words of another message, or of what was probably meant."""
    names = {node.id for node in ast.walk(exception) if isinstance(node, ast.Name)}
    return bool(names & {"why", "remedy", "against", "words", "hint", "near", "did_you_mean", "near_file"})


def _raised(exception: ast.expr, functions: dict[str, ast.FunctionDef], module: str) -> list[str]:
    if isinstance(exception, ast.Name):
        return []  # raised again, or one of those classes
    if not isinstance(exception, ast.Call):
        raise LookupError(f"{module}, line {exception.lineno}: cannot be read: {ast.unparse(exception)}")
    name = ast.unparse(exception.func).rpartition(".")[2]
    if name in NO_MESSAGES | GATHERED or name == "refusal" or name in functions:
        return []  # the functions are read themselves
    found = [text for argument in exception.args[:2] for text in _texts(argument)]
    if not found and not all(isinstance(argument, ast.Call | ast.Name | ast.Attribute) for argument in exception.args):
        raise LookupError(f"{module}, line {exception.lineno}: cannot be read: {ast.unparse(exception)}")
    return found


def _given(function: ast.FunctionDef) -> list[tuple[str, bool]]:
    """What a function gives to be raised: an exception, or a reason."""
    kind = ast.unparse(function.returns) if function.returns else ""
    is_reason = kind.startswith("Reason") or (kind == "str" and (ast.get_docstring(function) or "").startswith("Why"))
    found = []
    for node in ast.walk(function):
        value = node.value if isinstance(node, ast.Return) else None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == kind and kind in EXCEPTIONS:
            found += [(text, _has_reason(value)) for text in _texts(value.args[0])]
        elif is_reason and value is not None:
            parts = value.elts if isinstance(value, ast.Tuple) else [value]
            texts = [text for part in parts for text in _texts(part)]
            found += [("; ".join(texts), kind == "str")] if texts else []
    return found


def _texts(node: ast.expr) -> list[str]:
    """The texts that an expression may give, if it holds words of its own."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    text = _text(node)
    return [" ".join(text.split())] if text.count(" ") > 1 or ":" in text else []


CONSTANTS: dict[str, str] = {}
"""Texts that have names, such as what can be done about several things."""


def name_constants(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            CONSTANTS.update({name.id: node.value.value for name in node.targets if isinstance(name, ast.Name)})


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.FormattedValue):
        node = node.value
    if isinstance(node, ast.Name) and node.id.isupper():
        return CONSTANTS.get(node.id, "…")
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "…"


def all_messages() -> list[Message]:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    for source in sources.values():  # first of all files: they import each other's
        name_constants(ast.parse(source))
    return sorted({message for module, source in sources.items() for message in messages_of(source, module)})


ROOMS = {  # in the order in which somebody meets them
    "commands": ("Commands", "What was given to a command."),
    "tools": (
        "The command line, models and tokenizers by name",
        "What is wrong with options, names and files, before anything is computed.",
    ),
    "data": ("Data", "Files, entries and their formats, and how they become rows: [report.md](report.md)."),
    "chat": (
        "Messages and templates",
        "A conversation that is refused, by the number of the message. What a template does, and what is refused of "
        "it: [templates.md](templates.md). `flexreason template TOKENIZER` shows it; `--skip-invalid` goes on without "
        "such conversations, and lists them.",
    ),
    "model": (
        "Models and rows",
        "`patch:` refuses a model, or a setting, before anything is computed; `row:` refuses a row that the patched "
        "model was given. What can be done is the last part of each: [patching.md](patching.md).",
    ),
    "attention": (
        "Attention",
        "A model that asks for attention which a tree has not, or a backend that cannot do what is asked here. Where "
        "nothing else is said, `flexreason models CLASS` tells whether the class is known to be exact.",
    ),
    "proof": (
        "Verifying",
        "Why `fr.verify` gives no verdict, and why the self-test finds none: [verify.md](verify.md).",
    ),
    "train": ("Training", "Settings, runs and trainers: [train.md](train.md)."),
    "bench": ("Timing", "Ways that cannot be gone here: [performance.md](performance.md)."),
    "tree": ("Samples, layouts and rows", "The arguments of the functions that make them: [layout.md](layout.md)."),
    "demo": ("The demo", ""),
}


def index(messages: list[Message]) -> str:
    lines = [
        "# Errors",
        "",
        "*Written by `python tests/messages.py`; `make test` holds it against the code.*",
        "",
        "Every message by where it is from. `…` stands for what was found; search for the words around it. A message "
        "names the thing, what was expected, what was found, and what to do next.",
        "",
        "## Exit codes",
        "",
        "| code | of a command |",
        "|---|---|",
        *(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()),
        "",
        "Progress and words for people go to stderr; with `--json` stdout holds one JSON object and nothing else. "
        "`flexreason --version` says what a report of a fault needs.",
    ]
    for room, (title, words) in ROOMS.items():
        of_room = [message for message in messages if message.room == room]
        if of_room:
            lines += ["", f"## {title}", "", *([words, ""] if words else []), "| message | from |", "|---|---|"]
            lines += [f"| {_cell(message.text)} | `{message.module}` |" for message in of_room]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """As it stands: in a table nothing but a bar means anything inside code."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


if __name__ == "__main__":
    INDEX.write_text(index(all_messages()))
