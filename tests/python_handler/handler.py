"""A handler that notes every callback on its output before it answers, and remembers nothing: it can be killed at any time.

A device's bytes say how they are answered: `sleep` never, `fail CODE` with that gRPC status, `fail CODE 3` so the first three
times. Everything else is taken and, with --adapter, sent back.
"""

import argparse
import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.append(str(Path(__file__).resolve().parents[2] / "proto"))
pb, rpc = grpc.protos_and_services("exproto.proto")
STATUSES = {status.value[0]: status for status in grpc.StatusCode}


def note(*words):
    os.write(1, (" ".join(words) + "\n").encode())  # whole, whatever other threads do


class Unary(rpc.ConnectionUnaryHandlerServicer):
    def __init__(self, adapter):
        self.adapter = adapter
        self.failed = Counter()  # times, by conn

    def OnSocketCreated(self, request, context):
        note("created", str(request.conninfo.peername.port), request.conn)
        return pb.EmptySuccess()

    def OnReceivedBytes(self, request, context):
        conn, words = request.conn, request.bytes.decode().split()
        note("bytes", conn, *words)
        match words:
            case ["sleep"]:
                threading.Event().wait()
            case ["fail", code, *times]:
                if not times or self.failed[conn] < int(times[0]):
                    self.failed[conn] += 1
                    context.abort(STATUSES[int(code)], "as the device wishes")
        if self.adapter:
            self.adapter.Send(pb.SendBytesRequest(conn=conn, bytes=request.bytes), timeout=4)
        return pb.EmptySuccess()

    def OnReceivedMessages(self, request, context):
        return pb.EmptySuccess()

    def OnTimerTimeout(self, request, context):
        return pb.EmptySuccess()

    def OnSocketClosed(self, request, context):
        note("closed", request.conn, request.reason)
        return pb.EmptySuccess()


class Streams(rpc.ConnectionHandlerServicer):
    """The older service, as those for EMQX are written: it reads a stream to its end, then answers."""

    def __init__(self, unary):
        def each(callback):
            def of_stream(requests, context):
                for request in requests:
                    callback(request, context)
                return pb.EmptySuccess()

            return of_stream

        for name in dir(rpc.ConnectionHandlerServicer):
            if name.startswith("On"):
                setattr(self, name, each(getattr(unary, name)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--streams", action="store_true", help="serves the older service, and no other")
    parser.add_argument("--adapter", metavar="PORT", help="sends bytes back")
    parser.add_argument("--key", type=Path, help="PEM file, for TLS")
    parser.add_argument("--cert", type=Path, help="PEM file")
    args = parser.parse_args()

    adapter = args.adapter and rpc.ConnectionAdapterStub(grpc.insecure_channel(f"127.0.0.1:{args.adapter}"))
    # As few threads as EMQX's example has.
    server = grpc.server(ThreadPoolExecutor(max_workers=10), options=[("grpc.so_reuseport", 0)])
    unary = Unary(adapter)
    if args.streams:
        rpc.add_ConnectionHandlerServicer_to_server(Streams(unary), server)
    else:
        rpc.add_ConnectionUnaryHandlerServicer_to_server(unary, server)
    address = f"{args.host}:{args.port}"
    if args.cert:
        pair = (args.key.read_bytes(), args.cert.read_bytes())
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        server.add_insecure_port(address)
    server.start()
    note("listening")
    server.wait_for_termination()


if __name__ == "__main__":
    main()
