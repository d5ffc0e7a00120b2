#!/usr/bin/env python3
"""Where the gateway's instructions and system calls go, for each message.

    cargo build --release
    scripts/profile.py                    all scenarios, some minutes each
    scripts/profile.py uplink-1 --functions 30 --callers memory

Runs the gateway under callgrind (Debian: apt-get install valgrind) and under strace, beside
Mosquitto and exproto-bench, twice each with a different number of messages: the difference is
what the messages took, without the start and the connections. What callgrind counts are
instructions outside of the kernel, whatever else runs on the machine.

A gateway under callgrind is some fifty times slower than one that is free, so more of what is
ready is done in one turn: fewer system calls and wake-ups for a message than there are in life.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import figures

# Name, options of the bench, settings of the gateway.
SCENARIOS = [
    ("uplink-1", "uplink --devices 50 --window 1", {}),
    ("uplink-16", "uplink --devices 200 --window 16", {}),
    ("downlink-1", "downlink --devices 50 --window 1", {}),
    ("echo-1", "echo --devices 50 --window 1", {}),
    ("streaming-1", "uplink --devices 50 --window 1", figures.STREAMING),
    ("streaming-16", "uplink --devices 200 --window 16", figures.STREAMING),
]

# What a function is part of: the first that fits. Inlined functions count to whom they are
# inlined into.
GROUPS = [
    ("allocating and freeing", r"malloc|^free\b|calloc|realloc|_int_free|unlink_chunk|__rust_alloc|__rdl_|__rust_dealloc|__rustc::__r|cfree|tcache|arena"),
    ("copying, clearing, comparing memory", r"^_*(mem(cpy|move|set|cmp|chr)|bcmp|strlen)"),
    ("hashing", r"SipHasher|core::hash|Hash.*::hash|hash_one|hashbrown"),
    ("HTTP/2: h2, hpack, http", r"\bh2::|\bhttp::|hpack|http_body"),
    ("hyper", r"\bhyper(_util)?::"),
    ("gRPC: tonic, tower", r"\btonic(_\w+)?::|\btower"),
    ("protobuf", r"\bprost|exproto_sidecar::proto\b|utf8"),
    ("MQTT: session, codec, pool", r"exproto_sidecar::broker|rumqttc"),
    ("handler leg", r"exproto_sidecar::handler"),
    ("adapter", r"exproto_sidecar::adapter"),
    ("connection", r"exproto_sidecar::(connection|transport|auth|rate)"),
    ("metrics", r"exproto_sidecar::metrics|\bmetrics|quanta|exproto_sidecar::telemetry|\btracing"),
    ("runtime: tokio, mio, futures", r"\btokio|\bmio::|futures_|slab::|\bparking_lot"),
    ("time", r"clock_gettime|Instant|Timespec|vdso|SystemTime"),
    ("buffers: bytes", r"\bbytes::"),
    ("locks", r"pthread|Mutex|futex|__lll_"),
    ("system calls and their wrappers", r"^_*(write|writev|send|sendto|sendmsg|recv|recvfrom|recvmsg|read|epoll_\w+|syscall|ioctl)(@|$)|std::sys|std::io|std::net|rustix|socket2"),
    ("of the gateway, other", r"exproto_sidecar"),
]


def fail(text):
    sys.exit(f"profile.py: {text}")


def group(function):
    for name, pattern in GROUPS:
        if re.search(pattern, function):
            return name
    return "other"


def callgrind(options, settings, messages):
    """Instructions by function; by caller and function; messages in a callback."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        around = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        report = run(options, settings, messages, around)
        return *read(out), report["handler"]["messages_per_callback"]


def run(options, settings, messages, around):
    more = ["--messages", str(messages), "--warmup", "0s", "--timeout", "120s"]
    report = figures.measure(options, settings, more, around)
    arrived = report["messages"]["arrived"]
    if arrived != messages:
        fail(f"{arrived} of {messages} messages arrived")
    return report


def read(out):
    """callgrind's file: instructions by function, and by caller and function with all that
    the function calls."""
    names, own, called_by = {}, Counter(), Counter()

    def named(text):
        number, _, name = text.strip().partition(" ")
        return names.setdefault(number, name) if name else names[number]

    function, called = "", None
    for line in out.open():
        if line.startswith("fn="):
            function = named(line[3:])
        elif line.startswith("cfn="):
            called = named(line[4:])
        elif line[0] in "+-*0123456789" and " " in line:
            cost = int(line.split()[1])
            if called is None:
                own[function] += cost
            else:
                called_by[function, called] += cost
                called = None
    return own, called_by


def strace(options, settings, messages):
    """Calls by name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        # -D: the gateway stays the process that is started.
        around = ["strace", "-D", "-f", "-c", "-o", str(out)]
        run(options, settings, messages, around)
        lines = (line.split() for line in out.read_text().splitlines())
        # % time, seconds, usecs/call, calls, (errors), syscall
        return Counter({c[-1]: int(c[3]) for c in lines if len(c) > 4 and c[3].isdigit()})


def each(few, many, messages):
    """What a message took, of two runs."""
    return {name: (many[name] - few[name]) / messages for name in many}


def table(title, rows, total, least=0.005):
    print(f"\n{title}\n\n| | a message | share |\n|---|---|---|")
    for name, cost in rows:
        if cost >= total * least:
            print(f"| {name} | {cost:,.0f} | {cost / total:.1%} |")
    print(f"| **all** | **{total:,.0f}** | |", flush=True)


def profile(options, settings, arguments):
    few, many = arguments.messages
    first, first_callers, _ = callgrind(options, settings, few)
    second, second_callers, joined = callgrind(options, settings, many)
    own = each(first, second, many - few)
    total = sum(own.values())
    groups = Counter()
    for function, cost in own.items():
        groups[group(function)] += cost
    table(f"instructions ({joined:.1f} messages a callback)", groups.most_common(), total)
    callers = each(first_callers, second_callers, many - few)
    whole = Counter()
    for (_, function), cost in callers.items():
        whole[function] += cost
    for title, costs in (("by function", own), ("with all that they call", whole)):
        largest = Counter(costs).most_common(arguments.functions)
        if largest:
            table(title, [(f"`{name}`", cost) for name, cost in largest], total)
    if arguments.callers:
        wanted = {
            (caller, function): cost
            for (caller, function), cost in callers.items()
            if arguments.callers in group(function) and group(caller) != group(function)
        }
        rows = Counter(wanted).most_common(80)
        rows = [(f"`{function}` of `{caller}`", cost) for (caller, function), cost in rows]
        table(f"by caller: {arguments.callers}", rows, total, 0.001)


def syscalls(options, settings, arguments):
    few, many = arguments.messages
    calls = each(
        strace(options, settings, few), strace(options, settings, many), many - few
    )
    calls.pop("total", None)
    shown = sorted(calls.items(), key=lambda call: -call[1])
    text = ", ".join(f"{name} {count:.2f}" for name, count in shown if count >= 0.005)
    print(f"\nsystem calls a message: {sum(calls.values()):.2f} ({text})", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [name for name, *_ in SCENARIOS]
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}; all by default")
    parser.add_argument("--functions", type=int, default=0, help="how many of the largest to show")
    parser.add_argument("--callers", help="shows who calls this group, by a word of its name")
    parser.add_argument("--messages", type=int, nargs=2, default=(4000, 12000),
                        help="of the two runs that are compared")
    parser.add_argument("--only", choices=["instructions", "syscalls"])
    arguments = parser.parse_args()
    for tool in ("valgrind", "strace"):
        if not shutil.which(tool):
            fail(f"{tool} is not here. Debian and Ubuntu: apt-get install {tool}")
    if unknown := set(arguments.names) - set(known):
        fail(f"no scenario is called {', '.join(unknown)}")
    figures.OUT.mkdir(parents=True, exist_ok=True)
    for name, options, settings in SCENARIOS:
        if arguments.names and name not in arguments.names:
            continue
        print(f"\n### {name}", flush=True)
        if arguments.only != "syscalls":
            profile(options, settings, arguments)
        if arguments.only != "instructions":
            syscalls(options, settings, arguments)


if __name__ == "__main__":
    main()
