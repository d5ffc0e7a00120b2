"""A handler of the streaming service as those for EMQX are written: it reads a stream to its end, then answers.

Echoes a device's bytes, and writes down which connections were closed.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.append(str(Path(__file__).resolve().parents[2] / "proto"))
pb, rpc = grpc.protos_and_services("exproto.proto")


class Handler(rpc.ConnectionHandlerServicer):
    def __init__(self, channel, seen):
        self.adapter = rpc.ConnectionAdapterStub(channel)
        self.seen = seen

    def OnSocketCreated(self, requests, context):
        for _ in requests:
            pass
        return pb.EmptySuccess()

    def OnReceivedBytes(self, requests, context):
        for request in requests:
            self.adapter.Send(pb.SendBytesRequest(conn=request.conn, bytes=request.bytes), timeout=4)
        return pb.EmptySuccess()

    def OnReceivedMessages(self, requests, context):
        for _ in requests:
            pass
        return pb.EmptySuccess()

    def OnTimerTimeout(self, requests, context):
        for _ in requests:
            pass
        return pb.EmptySuccess()

    def OnSocketClosed(self, requests, context):
        for request in requests:
            self.seen.write(f"closed {request.conn}\n")
            self.seen.flush()
        return pb.EmptySuccess()


def main():
    port, adapter, path = sys.argv[1:]
    with grpc.insecure_channel(f"127.0.0.1:{adapter}") as channel, open(path, "a") as seen:
        # As few threads as EMQX's example has.
        server = grpc.server(ThreadPoolExecutor(max_workers=10), options=[("grpc.so_reuseport", 0)])
        rpc.add_ConnectionHandlerServicer_to_server(Handler(channel, seen), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        server.start()
        print("listening", flush=True)
        server.wait_for_termination()


if __name__ == "__main__":
    main()
