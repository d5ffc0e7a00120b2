#!/usr/bin/env python3
"""The figures of docs/performance.md, measured on this machine.

    cargo build --release
    scripts/figures.py                    all of them, about half an hour
    scripts/figures.py --runs 1 uplink    once each, those whose names contain "uplink"

Starts Mosquitto and, for each figure, a gateway of its own (both from PATH and
target/release), on free ports of the loopback; runs `exproto-bench` so many times; takes
the run in the middle by throughput. Prints a table in Markdown, and keeps the reports of
all runs in target/figures. Nothing else should run on the machine: the load average
is printed with each figure for that.
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

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "target/release"
OUT = ROOT / "target/figures"

STREAMING = {
    "EXPROTO_HANDLER__STREAMING": "true",
    "EXPROTO_HANDLER__SERVICE_NAME": "ConnectionHandler",
}

# Name, options of the bench, further settings of the gateway.
FIGURES = [
    ("uplink, 200 devices, window 16", "uplink --devices 200 --window 16", {}),
    ("uplink, 3,200 devices, window 1", "uplink --devices 3200 --window 1", {}),
    ("uplink, 10,000 devices, window 1", "uplink --devices 10000 --window 1", {}),
    ("uplink, 200 devices, open loop at 5,000 a second", "uplink --devices 200 --rate 5000", {}),
    ("uplink, 200 devices, window 16, streaming", "uplink --devices 200 --window 16", STREAMING),
    ("uplink, 3,200 devices, window 1, streaming", "uplink --devices 3200 --window 1", STREAMING),
    ("echo, 200 devices, window 16", "echo --devices 200 --window 16", {}),
    ("echo, 3,200 devices, window 1", "echo --devices 3200 --window 1", {}),
    ("downlink, 200 devices, window 16", "downlink --devices 200 --window 16", {}),
    ("downlink, 3,200 devices, window 1", "downlink --devices 3200 --window 1", {}),
    ("fan-out, 10,000 devices", "fanout --devices 10000 --messages 10 --warmup 0s", {}),
    ("idle, 10,000 devices", "idle --devices 10000", {}),
    ("storm, 10,000 devices", "storm --devices 10000", {}),
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


def worth(report):
    """What the runs are ordered by."""
    if report["fan_out"]:
        return -report["fan_out"]["latency_us"]["p50"]
    return report["throughput"] or 0


def row(name, report, runs, load):
    gateway = next(each for each in report["processes"] if each["name"] == "gateway")
    bench = next(each for each in report["processes"] if each["name"] == "bench")
    cpu = gateway.get("cpu_us_per_message") or gateway.get("cpu_us_per_connection")
    latency = report["latency_us"] or {}
    if report["fan_out"]:
        latency = report["fan_out"]["latency_us"]
    memory = gateway["memory"]["per_connection"]
    rate = report["throughput"]
    cells = [
        name,
        f"{rate:,.0f}" if rate else "",
        f"{cpu:.0f}" if cpu and not report["scenario"] == "idle" else "",
        f"{latency['p50'] / 1e3:,.1f}" if latency else "",
        f"{latency['p99'] / 1e3:,.1f}" if latency else "",
        f"{report['handler']['messages_per_callback']:.1f}"
        if report["handler"]["messages_per_callback"] else "",
        f"{memory / 1024:.1f}" if memory and report["connections"]["opened"] >= 3000 else "",
        f"{report['messages']['lost']}",
        f"{gateway['cpu']:.2f} / {bench['cpu']:.2f}" if gateway["cpu"] else "",
        f"{min(runs):,.0f} - {max(runs):,.0f}" if rate else "",
        f"{load:.1f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of the names of figures; all by default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--duration", default="20s", help="of each run")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    print(
        "| figure | a second | gateway's µs each | p50 ms | p99 ms | messages a callback "
        "| KiB a connection | lost | processors: gateway / bench | a second, all runs | load before |"
    )
    print("|---" * 11 + "|")
    for number, (name, options, settings) in enumerate(FIGURES):
        if arguments.names and not any(part in name for part in arguments.names):
            continue
        load = os.getloadavg()[0]
        endless = "--messages" not in options and not options.startswith("storm")
        more = ["--duration", arguments.duration] if endless else []
        reports = [measure(options, settings, more) for _ in range(arguments.runs)]
        for run, report in enumerate(reports):
            (OUT / f"{number:02}-{run}.json").write_text(json.dumps(report))
        middle = sorted(reports, key=worth)[len(reports) // 2]
        row(name, middle, [report["throughput"] or 0 for report in reports], load)


if __name__ == "__main__":
    main()
