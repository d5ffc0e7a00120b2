#!/usr/bin/env python3
"""The figures of docs/performance.md, measured on this machine.

    cargo build --release
    scripts/figures.py                    all of them, some 40 minutes
    scripts/figures.py --runs 1 uplink    once each, those whose names contain "uplink"

Starts Mosquitto and, for each figure, a gateway of its own (both from PATH and
target/release), on free ports of the loopback; runs `exproto-bench` so many times; takes
the run in the middle: by throughput, by p99 in an open loop, by the median until all have it
of a fan-out, by memory when idle. Prints a table in Markdown, then which targets the figures
reach, and keeps the reports of all runs in target/figures. Nothing else should run on the
machine: the load average is printed with each figure for that.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"
OUT = ROOT / "target/figures"

STREAMING = {
    "EXPROTO_HANDLER__STREAMING": "true",
    "EXPROTO_HANDLER__SERVICE_NAME": "ConnectionHandler",
}

FEW_16 = "uplink, 200 devices, window 16"
FEW_1 = "uplink, 200 devices, window 1"
MANY_1 = "uplink, 10,000 devices, window 1"
FEW_OPEN = "uplink, 200 devices, open loop at 5,000 a second"
MANY_OPEN = "uplink, 10,000 devices, open loop at 5,000 a second"
STREAMS = "uplink, 200 devices, window 16, streaming"
ECHO = "echo, 200 devices, window 16"
DOWNLINK = "downlink, 200 devices, window 16"
FAN_OUT = "fan-out, 10,000 devices"
IDLE = "idle, 10,000 devices"
STORM = "storm, 10,000 devices"

# Name, options of the bench, further settings of the gateway. Two pairs differ in the number of
# devices alone: with a window of one, where more devices have more under way, and at an equal
# rate below the highest, where the devices are all the difference.
FIGURES = [
    (FEW_16, "uplink --devices 200 --window 16", {}),
    (FEW_1, "uplink --devices 200 --window 1", {}),
    ("uplink, 3,200 devices, window 1", "uplink --devices 3200 --window 1", {}),
    (MANY_1, "uplink --devices 10000 --window 1", {}),
    (FEW_OPEN, "uplink --devices 200 --rate 5000", {}),
    (MANY_OPEN, "uplink --devices 10000 --rate 5000", {}),
    (STREAMS, "uplink --devices 200 --window 16", STREAMING),
    ("uplink, 3,200 devices, window 1, streaming", "uplink --devices 3200 --window 1", STREAMING),
    (ECHO, "echo --devices 200 --window 16", {}),
    ("echo, 3,200 devices, window 1", "echo --devices 3200 --window 1", {}),
    (DOWNLINK, "downlink --devices 200 --window 16", {}),
    ("downlink, 3,200 devices, window 1", "downlink --devices 3200 --window 1", {}),
    (FAN_OUT, "fanout --devices 10000 --messages 10 --warmup 0s", {}),
    (IDLE, "idle --devices 10000", {}),
    (STORM, "storm --devices 10000", {}),
]


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Program:
    """A process that is ended with the block."""

    def __init__(self, arguments, log, **kwargs):
        self.log = open(log, "w")
        self.process = subprocess.Popen(arguments, stdout=self.log, stderr=self.log, **kwargs)

    def __enter__(self):
        return self.process

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def patiently(what, process, look):
    for _ in range(300):
        if process.poll() is not None:
            sys.exit(f"{what} has ended with {process.returncode}; see {OUT}")
        try:
            return look()
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{what} is not there; see {OUT}")


def measure(options, settings, more, around=()):
    """One run: its report. `more` are options of the bench that come last, `around` is what the
    gateway is started with, such as a profiler."""
    mqtt, device, adapter, handler, admin = (port() for _ in range(5))
    files = {"EXPROTO_BENCH_MQTT": f"mqtt://127.0.0.1:{mqtt}"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("EXPROTO_")}
    env |= {
        "EXPROTO_LISTENERS__TCP__DEFAULT__BIND": f"127.0.0.1:{device}",
        "EXPROTO_LISTENERS__TCP__DEFAULT__MAX_CONN_RATE": "infinity",
        "EXPROTO_SERVER__BIND": f"127.0.0.1:{adapter}",
        "EXPROTO_ADMIN__BIND": f"127.0.0.1:{admin}",
        "EXPROTO_HANDLER__ADDRESS": f"http://127.0.0.1:{handler}",
        "EXPROTO_BROKER__URL": f"mqtt://127.0.0.1:{mqtt}",
    } | settings
    search = {"PATH": os.environ["PATH"] + ":/usr/sbin"}
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder) / "mosquitto.conf"
        # Mosquitto's own limits must not be what is measured.
        rules.write_text(
            f"listener {mqtt} 127.0.0.1\nallow_anonymous true\n"
            "max_queued_messages 0\nmax_inflight_messages 0\n"
        )
        broker = ["mosquitto", "-c", str(rules)]
        with Program(broker, OUT / "mosquitto.log", env=os.environ | search) as broker:
            connect = lambda: socket.create_connection(("127.0.0.1", mqtt), 1).close()
            patiently("mosquitto", broker, connect)
            command = [*around, BIN / "exproto-sidecar"]
            with Program(command, OUT / "gateway.log", env=env) as gateway:
                live = f"http://127.0.0.1:{admin}/healthz"
                patiently("the gateway", gateway, lambda: urllib.request.urlopen(live, timeout=1))
                report = OUT / "report.json"
                command = [
                    BIN / "exproto-bench", *options.split(),
                    "--gateway", f"127.0.0.1:{device}", "--adapter", f"127.0.0.1:{adapter}",
                    "--handler", f"127.0.0.1:{handler}", "--connect-rate", "3000",
                    "--payload", "64", "--qos", "1", "--json", report,
                    "--pid", f"gateway={gateway.pid}", "--pid", f"broker={broker.pid}",
                ]
                if options.startswith("storm"):
                    command = [part for part in command if part not in ("--connect-rate", "3000")]
                command += more
                bench = subprocess.run(
                    command, env=os.environ | files, capture_output=True, text=True
                )
                if bench.returncode != 0:
                    sys.exit(f"exproto-bench {options}: {bench.returncode}\n{bench.stderr}")
                return json.loads(report.read_text())


def process(report, name):
    return next(each for each in report["processes"] if each["name"] == name)


def cpu(report):
    """The gateway's processor time for a message or connection, in µs; None where it was too
    short to tell."""
    gateway = process(report, "gateway")
    return gateway.get("cpu_us_per_message") or gateway.get("cpu_us_per_connection")


def latency(report, which):
    """In ms; of a fan-out until the last device has it. None where nothing was sent."""
    if report["scenario"] == "idle":
        return None
    times = report["fan_out"]["latency_us"] if report["fan_out"] else report["latency_us"]
    return times[which] / 1e3 if times else None


def memory(report):
    """KiB for a connection; None where they are too few to tell."""
    each = process(report, "gateway")["memory"]["per_connection"]
    return each / 1024 if each and report["connections"]["opened"] >= 3000 else None


def rate(report):
    return report["throughput"]


def worth(report):
    """What the runs are ordered by."""
    if report["scenario"] == "idle":
        return -(memory(report) or 0)
    if report["fan_out"]:
        return -latency(report, "p50")
    if report["rate"] and report["scenario"] != "storm":
        return -(latency(report, "p99") or 0)
    return rate(report) or 0


class Target(NamedTuple):
    """What figures should reach: their reports' value, and the bound."""

    text: str
    figures: tuple
    value: Callable
    reached: Callable
    shown: str


def at_least(text, figure, bound, value=rate, shown="{:,.0f} a second"):
    return Target(text, (figure,), value, lambda found: found >= bound, shown)


def at_most(text, figures, bound, value, shown):
    return Target(text, figures, value, lambda found: found <= bound, shown)


def ratio(many, few):
    return cpu(many) / cpu(few) if cpu(many) and cpu(few) else None


TARGETS = [
    at_least(f"{FEW_16}: 10,000 a second", FEW_16, 10_000),
    at_most(f"{FEW_16}: 60 µs of the gateway each", (FEW_16,), 60, cpu, "{:.0f} µs"),
    at_most(f"{FEW_OPEN}: p99 of 5 ms", (FEW_OPEN,), 5, lambda r: latency(r, "p99"), "{:.1f} ms"),
    at_least(f"{ECHO}: 12,000 a second", ECHO, 12_000),
    at_least(f"{DOWNLINK}: 10,000 a second", DOWNLINK, 10_000),
    at_least(f"{STREAMS}: 20,000 a second", STREAMS, 20_000),
    at_most("uplink, window 1: a message of 10,000 devices takes at most 1.2 times the processor "
            "time of one of 200", (MANY_1, FEW_1), 1.2, ratio, "{:.2f} times"),
    at_most("the same at 5,000 a second", (MANY_OPEN, FEW_OPEN), 1.2, ratio, "{:.2f} times"),
    at_least(f"{STORM}: 5,000 connections a second", STORM, 5_000),
    at_most(f"{IDLE}: 4 KiB each", (IDLE,), 4, memory, "{:.1f} KiB"),
    at_most(f"{FAN_OUT}: all have the slowest of the messages within 1 s", (FAN_OUT,), 1000,
            lambda r: latency(r, "max"), "{:,.0f} ms"),
]


def told(value, form):
    return "" if value is None else form.format(value)


def spread(reports):
    """The lowest and the highest of all runs."""
    parts = []
    shown = [
        (rate, "{:,.0f}", "a second"),
        (cpu, "{:.0f}", "µs"),
        (lambda report: latency(report, "p99"), "{:,.1f}", "ms p99"),
        (memory, "{:.1f}", "KiB"),
    ]
    for value, form, unit in shown:
        found = [each for each in map(value, reports) if each is not None]
        if found:
            parts.append(f"{form.format(min(found))}–{form.format(max(found))} {unit}")
    return "; ".join(parts)


def row(name, report, reports, load):
    processors = [process(report, name)["cpu"] for name in ("gateway", "bench")]
    cells = [
        name,
        told(rate(report), "{:,.0f}"),
        told(cpu(report), "{:.0f}"),
        told(latency(report, "p50"), "{:,.1f}"),
        told(latency(report, "p99"), "{:,.1f}"),
        told(report["handler"]["messages_per_callback"], "{:.1f}"),
        told(memory(report), "{:.1f}"),
        f"{report['messages']['lost']}",
        " / ".join(told(each, "{:.2f}") or "?" for each in processors),
        spread(reports) if len(reports) > 1 else "",
        f"{load:.1f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def targets(reports):
    """Those whose figures were measured: reports by name."""
    print("\n| target | reached |\n|---|---|")
    for target in TARGETS:
        if not all(name in reports for name in target.figures):
            continue
        value = target.value(*(reports[name] for name in target.figures))
        if value is None:
            answer = "too short to tell"
        else:
            answer = ("yes" if target.reached(value) else "**no**") + ": " + target.shown.format(value)
        print(f"| {target.text} | {answer} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of figures; all by default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--duration", default="20s", help="of each run")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    print(
        "| figure | a second | gateway's µs each | p50 ms | p99 ms | messages a callback "
        "| KiB a connection | lost | processors: gateway / bench | lowest–highest | load before |"
    )
    print("|---" * 11 + "|")
    middles = {}
    for number, (name, options, settings) in enumerate(FIGURES):
        if arguments.names and not any(part in name for part in arguments.names):
            continue
        load = os.getloadavg()[0]
        endless = "--messages" not in options and not options.startswith("storm")
        more = ["--duration", arguments.duration] if endless else []
        reports = [measure(options, settings, more) for _ in range(arguments.runs)]
        for run, report in enumerate(reports):
            (OUT / f"{number:02}-{run}.json").write_text(json.dumps(report))
        middles[name] = sorted(reports, key=worth)[len(reports) // 2]
        row(name, middles[name], reports, load)
    targets(middles)


if __name__ == "__main__":
    main()
