"""Lines of code of the library's rooms at commits: no blanks, no comments, no docstrings.

python tools/count_lines.py BASE HEAD          of the seam: core, rules, optim, quant
python tools/count_lines.py --all BASE HEAD    of every room
"""

import ast
import io
import subprocess
import sys
import tokenize

ROOMS = ("core", "rules", "optim", "quant")


def code_lines(source: str) -> int:
    """Lines with something on them that runs."""
    documented = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            lines |= set(range(token.start[0], token.end[0] + 1)) if token.string.strip() else set()
    for node in ast.walk(ast.parse(source)):
        # a text that stands alone: a docstring, of a module, a class, a function or an attribute
        for part in getattr(node, "body", []) if isinstance(node, documented) else []:
            text = part.value if isinstance(part, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                lines -= set(range(part.lineno, (part.end_lineno or part.lineno) + 1))
    return len(lines)


def count(commit: str, every: bool = False) -> dict[str, int]:
    """Room -> lines at this commit."""
    git = ["git", "ls-tree", "-r", "--name-only", commit, "apollo_optim/"]
    names = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split()
    found = dict.fromkeys(ROOMS, 0)
    for name in names:
        room = name.split("/")[1] if name.count("/") > 1 else "top level"
        if (every or room in ROOMS) and name.endswith(".py"):
            shown = subprocess.run(["git", "show", f"{commit}:{name}"], check=True, capture_output=True, text=True)
            found[room] = found.get(room, 0) + code_lines(shown.stdout)
    return found


if __name__ == "__main__":
    every = "--all" in sys.argv
    for commit in [word for word in sys.argv[1:] if word != "--all"] or ["HEAD"]:
        rooms = count(commit, every)
        print(f"{commit}: {sum(rooms.values())} lines ({', '.join(f'{room} {n}' for room, n in rooms.items())})")
