"""How much there is to read: lines, columns, tokens, names in a function. Raise a limit only with a reason."""
import ast
import io
import token
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"data.py": (975, 8454), "model.py": (243, 2152), "losses.py": (501, 3883), "train.py": (560, 4605),
          "probe.py": (1791, 16160)}  # lines, tokens
NAMES = 32
LAYOUT = {token.NEWLINE, token.NL, token.INDENT, token.DEDENT, token.ENDMARKER, token.COMMENT, token.ENCODING}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def docstring_lines(tree):
    """Numbers of the lines in docstrings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def names_of(function):
    """Arguments and assigned names of a function, with those of its lambdas and comprehensions."""
    arguments = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    stored = [node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return arguments | {node.id for node in stored}


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_stays_short(name):
    text = (ROOT / name).read_text()
    tree, lines = ast.parse(text), text.splitlines()
    docstrings = docstring_lines(tree)
    code = [t for t in tokenize.generate_tokens(io.StringIO(text).readline)
            if t.type not in LAYOUT and t.start[0] not in docstrings]
    assert (len(lines), len(code)) <= LIMITS[name] and len(code) <= LIMITS[name][1]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", LIMITS)
def test_a_function_has_few_names_and_no_nested_comprehension(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.FunctionDef):
            assert len(names_of(node)) <= NAMES, node.name
        if isinstance(node, COMPREHENSIONS):
            assert sum(isinstance(inner, COMPREHENSIONS) for inner in ast.walk(node)) == 1, node.lineno


def test_readme_is_read_in_ten_minutes():
    text = (ROOT / "README.md").read_text()
    prose = [line for part in text.split("```")[::2] for line in part.splitlines() if not line.startswith(("|", "    "))]
    assert len(text.splitlines()) <= 200 and max(map(len, prose)) <= 100
