"""A handler that notes every callback on its output before it answers, and remembers nothing: it can be killed at any time."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.append(str(Path(__file__).resolve().parents[2] / "proto"))
pb, rpc = grpc.protos_and_services("exproto.proto")


def note(*words):
    os.write(1, (" ".join(words) + "\n").encode())  # whole, whatever other threads do


class Handler(rpc.ConnectionUnaryHandlerServicer):
    def OnSocketCreated(self, request, context):
        note("created", request.conn, str(request.conninfo.peername.port))
        return pb.EmptySuccess()

    def OnReceivedBytes(self, request, context):
        note("bytes", request.conn, request.bytes.decode())
        return pb.EmptySuccess()

    def OnSocketClosed(self, request, context):
        note("closed", request.conn, request.reason)
        return pb.EmptySuccess()


def main():
    # As few threads as EMQX's example has.
    server = grpc.server(ThreadPoolExecutor(max_workers=10), options=[("grpc.so_reuseport", 0)])
    rpc.add_ConnectionUnaryHandlerServicer_to_server(Handler(), server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    print("listening", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
