"""Continue lines of the terminal, and serve the engine's metrics to Prometheus meanwhile."""

import argparse
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sf_local import Engine, SamplingParams


class Metrics(BaseHTTPRequestHandler):
    engine: Engine

    def do_GET(self) -> None:
        if self.path != "/metrics":
            self.send_error(404)
            return
        body = self.engine.metrics().encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


parser = argparse.ArgumentParser()
parser.add_argument("--vmfb", default="demo", help="artifact, or what is compiled once")
parser.add_argument("--port", type=int, default=9090, help="0 takes any that is free")
args = parser.parse_args()
with Engine.from_source(args.vmfb, progress=True) as Metrics.engine:
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/metrics", flush=True)
    params = SamplingParams(max_new_tokens=24)
    for line in filter(None, map(str.strip, sys.stdin)):
        print(Metrics.engine.generate(line, params).text, flush=True)
    server.shutdown()
