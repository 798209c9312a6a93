"""`python -m docs.generate` writes docs/reference from the code; with `--check` it writes nothing, and exits 1 where a page is another."""

import argparse
import sys

from docs.generate.pages import FOLDER, differing, pages


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is not what the code gives")
    check = parser.parse_args().check
    made = pages()
    names = differing(made)
    for name in names:
        print(f"{FOLDER / name} {'is not what the code gives' if check else 'written'}")
        if not check and name in made:
            (FOLDER / name).write_text(made[name], encoding="utf-8")
        elif not check:
            (FOLDER / name).unlink()
    if check and names:
        print("write them anew with: make docs")
    return int(check and bool(names))


if __name__ == "__main__":
    sys.exit(main())
