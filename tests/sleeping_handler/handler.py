"""A handler that falls asleep over the bytes of every device and never wakes up."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.append(str(Path(__file__).resolve().parents[2] / "proto"))
pb, rpc = grpc.protos_and_services("exproto.proto")


class Handler(rpc.ConnectionUnaryHandlerServicer):
    def OnSocketCreated(self, request, context):
        return pb.EmptySuccess()

    def OnReceivedBytes(self, request, context):
        os.write(1, f"asleep {request.conn}\n".encode())  # whole, whatever other threads do
        while True:
            time.sleep(3600)

    def OnSocketClosed(self, request, context):
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
