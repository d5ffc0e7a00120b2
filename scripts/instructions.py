#!/usr/bin/env python3
"""Counts the instructions of the functions that every message goes through.

    scripts/instructions.py               counts and compares with benches/instructions.txt
    scripts/instructions.py trie          those with "trie" in their names
    scripts/instructions.py --update      writes the file anew

Builds benches/instructions.rs and runs it under callgrind (Debian: apt-get install
valgrind). Prints old, new and difference for each function; exits with 1 where one takes
more than 5 % more or less than the file says, or is not in it, and with 2 where it cannot
count. A gain fails too, so that the file is brought down to it.

Instructions of this program and of the libraries that it calls, not the kernel's. They do
not depend on what else runs on the machine. They do depend on the compiler, and a little on
libc and the processor, for memcpy and ciphers come in versions for each: the file says what it
was counted with.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benches/instructions.txt"

REGION = "instructions::counted_region"


def fail(text):
    print(f"instructions.py: {text}", file=sys.stderr)
    sys.exit(2)


def first_line(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def build():
    command = ["cargo", "build", "--locked", "--release", "--example", "instructions",
               "--message-format", "json-render-diagnostics"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        fail("the benchmark cannot be built")
    built = (json.loads(line) for line in done.stdout.splitlines())
    return next(each["executable"] for each in built if each.get("executable"))


def count(program, words):
    """Instructions for each call, by name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            "valgrind", "--tool=callgrind", f"--toggle-collect={REGION}",
            f"--dump-after={REGION}", f"--callgrind-out-file={out}", program, *words,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            fail(f"{program} has failed:\n{done.stdout}{done.stderr}")
        rounds, *names = done.stdout.splitlines()
        rounds = int(rounds.removeprefix("rounds "))
        counts = {}
        for number, name in enumerate(names, 1):
            dump = Path(f"{out}.{number}").read_text()
            total = re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)
            counts[name] = round(int(total[1]) / rounds)
        return counts


def read():
    """What the file says: what it was counted with, and instructions by name."""
    if not FILE.exists():
        return "", {}
    lines = FILE.read_text().splitlines()
    made = next((line[2:] for line in lines if line.startswith("# counted with ")), "")
    rows = (line.split(None, 1) for line in lines if line and not line.startswith("#"))
    return made, {name: int(number.replace(",", "")) for number, name in rows}


def write(made, counts):
    lines = [
        "# Instructions of one call, by scripts/instructions.py, which also writes this file.",
        f"# {made}",
        *(f"{count:>9,}  {name}" for name, count in counts.items()),
    ]
    FILE.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("word", nargs="?", help="a part of the names of functions; all by default")
    parser.add_argument("--tolerance", type=float, default=5, help="percent; 5 by default")
    parser.add_argument("--program", help="counts this one instead of building it")
    parser.add_argument("--update", action="store_true", help="writes the file anew")
    arguments = parser.parse_args()
    if not shutil.which("valgrind"):
        fail("valgrind is not here, and nothing else counts instructions on every machine. "
             "Debian and Ubuntu: apt-get install valgrind")
    if arguments.word and arguments.update:
        fail("the file is written as a whole: no name with --update")
    made = (
        f"counted with {first_line('rustc', '--version')}, {first_line('valgrind', '--version')}, "
        f"{' '.join(platform.libc_ver())}, {platform.machine()}"
    )
    old_made, old = read()
    new = count(arguments.program or build(), [arguments.word] if arguments.word else [])
    if not new:
        fail(f"no function has {arguments.word!r} in its name")
    apart = []
    print(f"{'before':>9}  {'now':>9}  {'':>8}  instructions of")
    for name, now in new.items():
        before = old.get(name)
        change = (now - before) * 100 / before if before else None
        if change is None or abs(change) > arguments.tolerance:
            apart.append(name)
        text = "new" if change is None else f"{change:+.1f} %"
        mark = "  <--" if name in apart else ""
        print(f"{before or 0:>9,}  {now:>9,}  {text:>8}  {name}{mark}")
    gone = [] if arguments.word else [name for name in old if name not in new]
    for name in gone:
        print(f"{old[name]:>9,}  {'':>9}  {'gone':>8}  {name}  <--")
    if arguments.update:
        write(made, new)
        print(f"{FILE.relative_to(ROOT)} is written")
        return
    if made != old_made:
        print(f"\nbefore: {old_made}\nnow:    {made}")
    if apart or gone:
        print(f"\n{len(apart) + len(gone)} of {len(new)} are off by more than "
              f"{arguments.tolerance:g} %. Where that is meant: scripts/instructions.py --update")
        sys.exit(1)


if __name__ == "__main__":
    main()
