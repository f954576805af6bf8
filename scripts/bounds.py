"""Fail if a file has more than 500 lines or a function more than 60. Run by scripts/check."""

import ast
import sys
from pathlib import Path

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
FOLDERS = ("edge", "server", "shared", "tests", "scripts")


def too_long(path: Path) -> list[str]:
    """What in `path` is over the bounds, one line each."""
    text = path.read_text()
    found = [f"{path}: {text.count(chr(10))} lines"] if text.count("\n") > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name}: {lines} lines")
    return found


def main() -> int:
    """Print what is too long; 1 if anything is."""
    root = Path(__file__).resolve().parent.parent
    rows = [row for folder in FOLDERS for path in sorted((root / folder).rglob("*.py")) for row in too_long(path)]
    for row in rows:
        print(row)
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main())
