"""An engine that does not start, and says how its OpenMP threads would wait."""

import os
import socket
import sys

from protos.baton.v1 import channel_pb2, worker_pb2
from worker.channel import EngineChannel

channel = EngineChannel(socket.socket(fileno=int(sys.argv[1])), on_closed=lambda: None)
channel.start()
error = worker_pb2.Error(message=os.environ["OMP_WAIT_POLICY"])
failed = channel_pb2.EngineFailed(error=error)
channel.send(channel_pb2.EngineToFront(failed=failed))
channel.close()
