"""Checks that files import nothing beyond the standard library of the Python that runs this.

`python3 -I -S .ci/imports.py FILE [NAME ...]`: NAMEs are allowed besides. -S hides what is
installed, so that what is still found is the standard library. Every import counts, wherever it
stands. Parsing shows as well that the file is valid for this Python.
"""

import ast
import importlib.util
import sys


def imported_names(tree):
    """Yield (line, module) of each import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            dots = "".rjust(node.level, ".")
            yield node.lineno, dots + (node.module or "")


def is_found(module):
    """Tell whether the module exists; importing its parents is what find_spec does."""
    try:
        return not module.startswith(".") and importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def main(path, *allowed):
    """Return 1 and name each import that is not allowed, else 0."""
    with open(path, encoding="utf-8") as source:
        tree = ast.parse(source.read(), path)
    version = "{}.{}".format(*sys.version_info)
    foreign = [(line, module) for line, module in imported_names(tree)
               if module.split(".")[0] not in allowed and not is_found(module)]
    for line, module in foreign:
        print(f"{path}:{line}: {module} is not in the standard library of Python {version}")
    return 1 if foreign else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
